"""Choosing what stays in memory: candidates by rule, the best by simulation, then local search.

What a plan may choose is which chunks stay from one use to the next; the rest follows
(`plan.place_loads`). A *choice* is a list of chunks to keep, most wanted first, and bytes to leave
for chunks that come and go; `_kept` turns it into a bit for every use, segment by segment, with all
that the budget allows there. So residents may differ between phases whose activations differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from odsora_compiler.planning.bound import lower_bound
from odsora_compiler.planning.plan import Load, SchedulePlan, place_loads, plan_of
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.simulate import Costs, finish_time
from odsora_compiler.planning.workload import Use, Workload

_PHASES = 5  # offsets tried for residents that are spread evenly
_RESERVES = (0.0, 0.5, 1.0, 2.0, 3.0)  # room for chunks that come and go, in largest chunks
_GOOD_ENOUGH = 1.002  # of the bound: the search stops here
_SEARCH = 400  # plans that local search may try for a segment
_SHORT = 450  # uses in the workload the search works on, where repeated calls can be left out
_LEAST_REPEATS = 4  # calls of a kind that are left then


@dataclass(frozen=True)
class _Choice:
    """For one segment. `reserve`: bytes left free. `fill`: keep what else fits, gap by gap."""

    chunks: tuple[int, ...] = ()
    reserve: int = 0
    fill: bool = False


def make_plan(workload: Workload, profile: DeviceProfile, budget: int) -> SchedulePlan:
    """A schedule within `budget` bytes, as fast on the device as the search finds.

    Raises `UsageError` naming the least budget where `budget` is below it. Deterministic.
    """
    workload.check_budget(budget)
    bound = lower_bound(workload, profile, budget).seconds
    short = _shortened(workload)
    search = _Search(short, profile, budget)
    choices = search.run()
    loads = _placed(workload, choices, budget)
    plan = plan_of(workload, loads, budget)
    seconds = finish_time(Costs(workload, profile), plan.loads, plan.serving)
    return replace(
        plan, profile=profile.name, predicted_seconds=seconds, bound_seconds=min(bound, seconds)
    )


class _Search:
    def __init__(self, workload: Workload, profile: DeviceProfile, budget: int) -> None:
        self.workload = workload
        self.budget = budget
        self.costs = Costs(workload, profile)
        self.goal = _GOOD_ENOUGH * lower_bound(workload, profile, budget).seconds
        # To begin with, what fits beside two chunks in turn stays: in small networks, everything.
        self.choices = [
            _Choice(reserve=_largest(workload, segment), fill=True) for segment in workload.segments
        ]
        self.seconds, self.loading = self._try(self.choices)
        self.tried: set[tuple[int, _Choice]] = set()

    def run(self) -> list[_Choice]:
        """The best choice found for every segment."""
        for index, segment in enumerate(self.workload.segments):
            chunks = _cycle(self.workload, segment)
            if not chunks:
                continue
            if self.seconds > self.goal:
                for choice in self._candidates(segment, chunks):
                    self._offer(index, choice)
                self._improve(index, chunks)
            # As fast with fewer loads is better: they cost energy.
            self._offer(index, replace(self.choices[index], reserve=0, fill=True))
        return self.choices

    def _offer(self, index: int, choice: _Choice) -> bool:
        if (index, choice) in self.tried:
            return False
        self.tried.add((index, choice))
        choices = [*self.choices]
        choices[index] = choice
        seconds, loading = self._try(choices)
        same = seconds <= max(self.goal, self.seconds * (1 + 1e-9))
        better = seconds < self.seconds * (1 - 1e-9) or (same and loading < self.loading)
        if better:
            self.choices, self.seconds, self.loading = choices, seconds, loading
        return better

    def _try(self, choices: Sequence[_Choice]) -> tuple[float, float]:
        """Seconds of the run, and of its loads together."""
        loads = _placed(self.workload, choices, self.budget)
        seconds = finish_time(self.costs, loads, _serving(loads, self.workload))
        return seconds, sum(self.costs.load[load.chunk] for load in loads)

    def _candidates(self, segment: range, chunks: Sequence[int]) -> Iterator[_Choice]:
        sizes = {chunk: self.workload.chunks[chunk].resident_bytes for chunk in chunks}
        room = self.budget - max(
            use.activation_bytes for use in self.workload.uses[segment.start : segment.stop]
        )
        computing: dict[int, float] = defaultdict(float)
        for use in segment:
            computing[self.workload.uses[use].chunk] += self.costs.compute[use]
        loading = {chunk: self.costs.load[chunk] for chunk in chunks}
        largest = max(sizes.values())
        by_size = sorted(chunks, key=lambda chunk: -loading[chunk])
        for part in _RESERVES:
            reserve = int(part * largest)
            held = room - largest - reserve
            for fill in (False, True):
                yield _Choice(tuple(by_size), reserve, fill)
                for phase in range(_PHASES):
                    offset = (phase + 0.5) / _PHASES
                    even = dict.fromkeys(chunks, 1.0)
                    for pace in (even, computing):
                        kept = _spread(chunks, sizes, loading, pace, held, offset)
                        yield _Choice(tuple(kept), reserve, fill)

    def _improve(self, index: int, chunks: Sequence[int]) -> None:
        """Add, drop and swap residents, one change at a time, as long as that helps."""
        left = _SEARCH
        largest = _largest(self.workload, self.workload.segments[index])
        reserves = [int(part * largest) for part in _RESERVES]
        improving = True
        while improving and left > 0 and self.seconds > self.goal:
            improving = False
            for choice in _neighbours(self.choices[index], chunks, reserves):
                left -= 1
                if left < 0 or self.seconds <= self.goal:
                    return
                if self._offer(index, choice):
                    improving = True
                    break


def _neighbours(
    choice: _Choice, chunks: Sequence[int], reserves: Sequence[int]
) -> Iterator[_Choice]:
    inside = [chunk for chunk in chunks if chunk in choice.chunks]
    outside = [chunk for chunk in chunks if chunk not in choice.chunks]
    place = {chunk: index for index, chunk in enumerate(chunks)}
    for reserve in reserves:
        yield replace(choice, reserve=reserve)
        yield replace(choice, reserve=reserve, fill=not choice.fill)
    for chunk in outside:
        yield replace(choice, chunks=(*choice.chunks, chunk))
        yield replace(choice, chunks=(chunk, *choice.chunks))
    for chunk in inside:
        yield replace(choice, chunks=tuple(each for each in choice.chunks if each != chunk))
    for old in inside:
        for new in sorted(outside, key=lambda chunk: abs(place[chunk] - place[old])):
            yield replace(
                choice, chunks=tuple(new if each == old else each for each in choice.chunks)
            )


def _spread(
    chunks: Sequence[int],
    sizes: dict[int, int],
    loading: dict[int, float],
    pace: dict[int, float],
    held: int,
    offset: float,
) -> list[int]:
    """Residents of at most `held` bytes, such that loading the others keeps pace with `pace`.

    Walking through the cycle, a chunk is streamed while what was streamed lags behind its even
    share, else it stays. The share is lowered until the residents fit.
    """
    total = sum(loading.values())
    beat = sum(pace.values()) or 1.0
    low, high = 0.0, 1.0  # the part of all loading that is streamed
    best: list[int] = []
    for _ in range(12):
        part = (low + high) / 2
        kept, debt = [], offset * total / len(chunks)
        for chunk in chunks:
            debt += part * total * pace[chunk] / beat
            if debt >= loading[chunk]:
                debt -= loading[chunk]
            else:
                kept.append(chunk)
        if sum(sizes[chunk] for chunk in kept) <= held:
            best, high = kept, part
        else:
            low = part
    return best


def _largest(workload: Workload, segment: range) -> int:
    return max(workload.chunks[workload.uses[use].chunk].resident_bytes for use in segment)


def _cycle(workload: Workload, segment: range) -> list[int]:
    """Chunks that are used more than once, in the order of their first use."""
    seen: dict[int, int] = defaultdict(int)
    for use in segment:
        seen[workload.uses[use].chunk] += 1
    return [chunk for chunk, count in seen.items() if count > 1]


def _placed(workload: Workload, choices: Sequence[_Choice], budget: int) -> tuple[Load, ...]:
    loads = place_loads(workload, _kept(workload, choices, budget), budget)
    assert loads is not None, "what is kept fits by construction"
    return loads


def _kept(workload: Workload, choices: Sequence[_Choice], budget: int) -> list[bool]:
    """Per use, whether its chunk stays until its next use."""
    keep = [False] * len(workload.uses)
    sizes = [chunk.resident_bytes for chunk in workload.chunks]
    free = [budget - use.activation_bytes - sizes[use.chunk] for use in workload.uses]
    gaps: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for use, later in enumerate(workload.next_uses):
        if later is not None:
            gaps[workload.uses[use].chunk].append((use, later))

    def offer(gap: tuple[int, int], size: int, reserve: int) -> None:
        start, end = gap
        if not keep[start] and min(free[start + 1 : end], default=budget) >= size + reserve:
            keep[start] = True
            for use in range(start + 1, end):
                free[use] -= size

    for segment, choice in zip(workload.segments, choices, strict=True):
        for chunk in choice.chunks:
            for gap in gaps[chunk]:
                offer(gap, sizes[chunk], choice.reserve)
        if choice.fill:
            later_first = sorted(
                (later, use)
                for use, later in enumerate(
                    workload.next_uses[segment.start : segment.stop], segment.start
                )
                if later is not None
            )
            for later, use in later_first:
                offer((use, later), sizes[workload.uses[use].chunk], choice.reserve)
    return keep


def _serving(loads: Sequence[Load], workload: Workload) -> list[int]:
    """As `SchedulePlan.serving`, of loads that are known to be in order."""
    current: dict[int, int] = {}
    found = []
    upcoming = 0
    for index, use in enumerate(workload.uses):
        if upcoming < len(loads) and loads[upcoming].first_use == index:
            current[use.chunk] = upcoming
            upcoming += 1
        found.append(current[use.chunk])
    return found


def _shortened(workload: Workload) -> Workload:
    """A workload with fewer of the calls that repeat, for the search; small ones as they are."""
    if len(workload.uses) <= _SHORT:
        return workload
    runs = _equal_calls(workload)
    repeats = max(_LEAST_REPEATS, int(max(map(len, runs)) * _SHORT / len(workload.uses)))
    wanted = [call for run in runs for call in run[:repeats]]
    return workload.with_calls(wanted)


def _equal_calls(workload: Workload) -> list[list[int]]:
    """Calls in runs that use the same chunks in the same way."""
    by_call: dict[int, list[Use]] = defaultdict(list)
    for use in workload.uses:
        by_call[use.call].append(replace(use, call=0))
    runs: list[list[int]] = []
    before: list[Use] | None = None
    for call, uses in by_call.items():
        if uses == before:
            runs[-1].append(call)
        else:
            runs.append([call])
        before = uses
    return runs
