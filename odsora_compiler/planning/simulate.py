"""What a plan would do on a device, without running anything: when what is loaded and computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from odsora_compiler.planning.plan import Load, SchedulePlan
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Workload

Lane = Literal["load", "compute", "stall", "evict"]


@dataclass(frozen=True)
class Event:
    """`name`: the chunk. Seconds from the start of the run."""

    lane: Lane
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What happened when. `memory`: (seconds, bytes in memory from then on), in order of time."""

    events: tuple[Event, ...]
    memory: tuple[tuple[float, int], ...]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Most bytes that were in memory at once."""
        return max((size for _, size in self.memory), default=0)

    def total(self, lane: Lane) -> float:
        """Seconds of all events of a lane."""
        return sum(event.end - event.start for event in self.events if event.lane == lane)


def simulate(workload: Workload, plan: SchedulePlan, profile: DeviceProfile) -> Timeline:
    """Execute `plan` with one loader and one computer. Raises `RunError` where it does not fit.

    A stall is the time in which a use waits for its chunk. Letting go of a chunk takes no time.
    """
    plan.check(workload)
    costs = Costs(workload, profile)
    load_starts, load_ends, use_starts, use_ends = run_times(costs, plan.loads, plan.serving)
    events: list[Event] = []
    changes: list[tuple[float, int, int]] = []

    def name(chunk: int) -> str:
        return plan.chunks[chunk]

    for index, load in enumerate(plan.loads):
        size = workload.chunks[load.chunk].resident_bytes
        events.append(Event("load", name(load.chunk), load_starts[index], load_ends[index]))
        changes.append((load_starts[index], 1, size))
        changes.append((use_ends[load.last_use], 0, -size))
    before, held = 0.0, 0
    for index, use in enumerate(workload.uses):
        if use_starts[index] > before:
            events.append(Event("stall", name(use.chunk), before, use_starts[index]))
        # What a use needs is counted from the end of the one before, so a plan is not called
        # smaller than it may turn out where the device waits less than foreseen.
        changes.append((before, 1, use.activation_bytes - held))
        events.append(Event("compute", name(use.chunk), use_starts[index], use_ends[index]))
        for released in plan.released[index]:
            chunk = name(plan.loads[released].chunk)
            events.append(Event("evict", chunk, use_ends[index], use_ends[index]))
        before, held = use_ends[index], use.activation_bytes
    changes.append((before, 0, -held))
    return Timeline(
        tuple(sorted(events, key=lambda event: (event.start, event.end))), _memory(changes), before
    )


class Costs:
    """Seconds per load of each chunk and per use, as lists: what the inner loops read."""

    def __init__(self, workload: Workload, profile: DeviceProfile) -> None:
        self.load = [profile.load_seconds(chunk) for chunk in workload.chunks]
        self.compute = [
            profile.compute_seconds(use, workload.chunks[use.chunk]) for use in workload.uses
        ]


def run_times(
    costs: Costs, loads: Sequence[Load], serving: Sequence[int]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Starts and ends of loads, starts and ends of uses."""
    done = [0.0]
    load_starts: list[float] = []
    load_ends: list[float] = []
    use_starts: list[float] = []
    free = 0.0
    for use, (seconds, server) in enumerate(zip(costs.compute, serving, strict=True)):
        while len(load_ends) <= server:
            load = loads[len(load_ends)]
            load_starts.append(max(free, done[load.after]))
            free = load_starts[-1] + costs.load[load.chunk]
            load_ends.append(free)
        use_starts.append(max(done[use], load_ends[server]))
        done.append(use_starts[-1] + seconds)
    return load_starts, load_ends, use_starts, done[1:]


def finish_time(costs: Costs, loads: Sequence[Load], serving: Sequence[int]) -> float:
    """Seconds the loads and uses take: the end of the last use."""
    return max(run_times(costs, loads, serving)[3], default=0.0)


def _memory(changes: list[tuple[float, int, int]]) -> tuple[tuple[float, int], ...]:
    """Bytes over time; at the same time, what is given back goes before what is taken."""
    changes.sort()
    sizes = accumulate(change for _, _, change in changes)
    return tuple((time, size) for (time, _, _), size in zip(changes, sizes, strict=True))
