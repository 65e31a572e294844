"""A schedule of loads that keeps a budget whatever the timing: what runtime and simulator execute.

The rule both follow. Uses are numbered in the order of the workload. One loader takes the loads in
order and starts a load once the loads before it are done and at least `after` uses are. A use
starts when the use before it and the load that serves it are done. When use `last_use` of a load is
done its memory is given back, and only then does the use count as done.

So while use u runs, or is waited for, no load is in memory but those with after <= u <= last_use,
however fast or slow loads and uses are, and also where an early exit jumps ahead (loads whose uses
are all left out are skipped). The sum of their bytes and of the activations of u is known before
anything runs. That is why the budget is met by construction and not by measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from odsora_compiler.errors import PackageError, RunError
from odsora_compiler.planning.workload import Workload

PLAN_SCHEMA = 1


@dataclass(frozen=True)
class Load:
    """Chunk number `chunk` is read for its uses from `first_use` to `last_use`, once `after` uses
    are done."""

    chunk: int
    first_use: int
    last_use: int
    after: int


@dataclass(frozen=True)
class SchedulePlan:
    """Loads in order, of first use. `budget`: bytes that they and the activations never exceed.

    `chunks`: the workload's chunks by name; `uses`: per use, the chunk's index. `peak_bytes`: the
    most that can be in memory, under the worst timing. `profile`, `predicted_seconds` and
    `bound_seconds`: what the simulation of a device says, and what no schedule can beat there.
    """

    budget: int
    chunks: tuple[str, ...]
    uses: tuple[int, ...]
    loads: tuple[Load, ...]
    peak_bytes: int
    profile: str = ""
    predicted_seconds: float = 0.0
    bound_seconds: float = 0.0

    @cached_property
    def serving(self) -> tuple[int, ...]:
        """Per use, the index of the load that serves it.

        Raises `RunError` where a use has none, or a load comes too late or out of order.
        """
        found: list[int | None] = [None] * len(self.uses)
        open_loads: dict[int, int] = {}
        starts = {load.first_use: index for index, load in enumerate(self.loads)}
        for use, chunk in enumerate(self.uses):
            if use in starts and self.loads[starts[use]].chunk == chunk:
                open_loads[chunk] = starts[use]
            index = open_loads.get(chunk)
            if index is not None and use <= self.loads[index].last_use:
                found[use] = index
        ordered = all(
            earlier.first_use < later.first_use and earlier.after <= later.after
            for earlier, later in zip(self.loads, self.loads[1:], strict=False)
        )
        possible = all(
            0 <= load.after <= load.first_use <= load.last_use < len(self.uses)
            for load in self.loads
        )
        served = tuple(index for index in found if index is not None)
        if not ordered or not possible or len(served) < len(self.uses):
            raise RunError("the schedule does not load every chunk before it is used, in order")
        return served

    @cached_property
    def released(self) -> tuple[tuple[int, ...], ...]:
        """Per use, the loads whose memory is given back after it."""
        found: list[list[int]] = [[] for _ in self.uses]
        for index, load in enumerate(self.loads):
            found[load.last_use].append(index)
        return tuple(map(tuple, found))

    @property
    def prefetch_depth(self) -> int:
        """Most loads that may be done or under way ahead of the use that runs."""
        edges = [0] * (len(self.uses) + 1)
        for load in self.loads:
            edges[load.after] += 1
            edges[load.first_use] -= 1
        return max(accumulate(edges), default=0)

    def residents(self, workload: Workload) -> tuple[Residents, ...]:
        """Which chunks stay, phase by phase."""
        return tuple(_residents(self, workload))

    def check(self, workload: Workload) -> None:
        """Raise `RunError` unless this is a schedule of `workload` that keeps its budget."""
        names = tuple(chunk.name for chunk in workload.chunks)
        uses = tuple(use.chunk for use in workload.uses)
        if (names, uses) != (self.chunks, self.uses):
            raise RunError(
                "the schedule was made for other chunks or another order of calls",
                "Plan again for this bundle.",
            )
        _ = self.serving
        peak = max(occupancy(workload, self.loads), default=0)
        if peak > self.budget:
            raise RunError(f"the schedule takes up to {peak} bytes, its budget is {self.budget}")

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return {"schema": PLAN_SCHEMA, **asdict(self)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SchedulePlan:
        """The inverse of `to_data`. Raises `PackageError` on what is not such data."""
        try:
            if data["schema"] != PLAN_SCHEMA:
                raise PackageError(
                    f"a plan of schema {data['schema']}, this release reads {PLAN_SCHEMA}",
                    "Plan again with this release.",
                )
            plan = cls(
                int(data["budget"]),
                tuple(map(str, data["chunks"])),
                tuple(map(int, data["uses"])),
                tuple(
                    Load(**{key: int(value) for key, value in each.items()})
                    for each in data["loads"]
                ),
                int(data["peak_bytes"]),
                str(data["profile"]),
                float(data["predicted_seconds"]),
                float(data["bound_seconds"]),
            )
            _ = plan.serving
        except (KeyError, TypeError, ValueError, AttributeError, RunError) as error:
            raise PackageError(f"damaged plan: {error!r}") from error
        return plan

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_data()) + "\n")

    @classmethod
    def load(cls, path: Path) -> SchedulePlan:
        """Read what `save` wrote; raises `PackageError` when it cannot be used."""
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise PackageError(f"{path}: not a plan: {error}") from error
        return cls.from_data(data)


@dataclass(frozen=True)
class Residents:
    """A phase: calls of one function of a component, with nothing else between them.

    `uses`: where it is. `chunks` stay from its first use of them to its last, `streamed` are loaded
    more than once for it, or used once. `bytes`: those of the chunks that stay. `loads`: how many
    have their first use in the phase.
    """

    component: str
    function: str
    calls: int
    uses: range
    chunks: tuple[str, ...]
    streamed: tuple[str, ...]
    bytes: int
    loads: int


def place_loads(workload: Workload, keep: Sequence[bool], budget: int) -> tuple[Load, ...] | None:
    """The loads where chunks stay after use u until their next use if `keep[u]`, each as early as
    the budget allows; None where the budget does not allow to keep that much.

    What is needed (a chunk in its use, and from use to use where it is kept) is reserved first.
    Loads are in the order of first use; taken in that order, each starts as soon as its bytes are
    free from then on. No other starts in this order let any use begin earlier.
    """
    spans = _spans(workload, keep)
    sizes = [chunk.resident_bytes for chunk in workload.chunks]
    taken = _occupied(workload, spans)
    if max(taken, default=0) > budget:
        return None
    loads = []
    lower = 0
    for chunk, first, last in spans:
        after, room = first, budget - sizes[chunk]
        while after > lower and taken[after - 1] <= room:
            after -= 1
            taken[after] += sizes[chunk]
        lower = after
        loads.append(Load(chunk, first, last, after))
    return tuple(loads)


def plan_of(workload: Workload, loads: Sequence[Load], budget: int) -> SchedulePlan:
    """The plan of these loads; nothing of a device is filled in."""
    return SchedulePlan(
        budget,
        tuple(chunk.name for chunk in workload.chunks),
        tuple(use.chunk for use in workload.uses),
        tuple(loads),
        max(occupancy(workload, loads), default=0),
    )


def occupancy(workload: Workload, loads: Sequence[Load]) -> list[int]:
    """Per use, most bytes that can be in memory while it runs or is waited for."""
    return _occupied(workload, [(load.chunk, load.after, load.last_use) for load in loads])


def _occupied(workload: Workload, spans: Sequence[tuple[int, int, int]]) -> list[int]:
    edges = [0] * (len(workload.uses) + 1)
    for chunk, first, last in spans:
        edges[first] += workload.chunks[chunk].resident_bytes
        edges[last + 1] -= workload.chunks[chunk].resident_bytes
    held = accumulate(edges[:-1])
    return [use.activation_bytes + size for use, size in zip(workload.uses, held, strict=True)]


def _spans(workload: Workload, keep: Sequence[bool]) -> list[tuple[int, int, int]]:
    """Chunk, first and last use of every load, in the order of first use."""
    last_use: dict[int, int] = {}
    spans: list[tuple[int, int, int]] = []
    for index in range(len(workload.uses) - 1, -1, -1):
        chunk, later = workload.uses[index].chunk, workload.next_uses[index]
        stays = later is not None and keep[index]
        last_use[index] = last_use[later] if stays and later is not None else index
        spans.append((chunk, index, last_use[index]))
    first = {(chunk, last): index for chunk, index, last in spans}
    return [span for span in reversed(spans) if first[span[0], span[2]] == span[1]]


def _residents(plan: SchedulePlan, workload: Workload) -> list[Residents]:
    found = []

    def phase(use: int) -> tuple[str, str]:
        return workload.chunks[workload.uses[use].chunk].component, workload.uses[use].function

    for (component, function), group in groupby(range(len(workload.uses)), phase):
        uses = list(group)
        chunks = list(dict.fromkeys(workload.uses[use].chunk for use in uses))
        loads = [plan.serving[use] for use in uses]
        count = dict.fromkeys(chunks, 0)
        for load in dict.fromkeys(loads):
            count[plan.loads[load].chunk] += 1
        calls = len({workload.uses[use].call for use in uses})
        stays = [chunk for chunk in chunks if count[chunk] == 1 and calls > 1]
        found.append(
            Residents(
                component,
                function,
                calls,
                range(uses[0], uses[-1] + 1),
                tuple(workload.chunks[chunk].name for chunk in stays),
                tuple(workload.chunks[chunk].name for chunk in chunks if chunk not in stays),
                sum(workload.chunks[chunk].resident_bytes for chunk in stays),
                sum(plan.loads[load].first_use >= uses[0] for load in dict.fromkeys(loads)),
            )
        )
    return found
