"""How fast any schedule could be: lower bounds that hold whatever is loaded when.

Chunks are loaded one at a time and as wholes, uses run one at a time and in order, memory is never
more than the budget. Notation: use u computes for c(u) seconds with a(u) bytes of activations, its
chunk has b(u) bytes and loads in l(u) seconds. A gap lies between two successive uses of a chunk;
where it is *kept*, the chunk stays in memory from one to the other and is not loaded again.

- Computing: all c(u), after the first load.
- Loading: all l(u) but those of kept gaps, before the last use computes. At most so much is kept:
  * by places: while use u runs, there is room for budget - a(u) - b(u) bytes of kept chunks. Added
    up over the uses of a segment, a gap takes its bytes times the uses that lie in it.
  * by time: the same weighted with c(u), and whatever is being loaded needs room as well. Loads
    that overlap no computing are at most as long as computing pauses: T - sum of c. With a kept
    gap g saving l(g) and spanning C(g) seconds of computing, over all uses

        sum of kept b(g) (C(g) - l(g)) + sum of b(u) l(u) - (T - sum of c) max b
            <= sum of c(u) (budget - a(u) - b(u))

    Both are fractional knapsacks, so what they allow is at least what any schedule keeps.
- Both: what must be loaded before use u starts, by the same reasoning over the uses up to it, plus
  all that is computed from u on; the largest over many u. This is what counts when the first
  loading of everything dominates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.simulate import Costs
from odsora_compiler.planning.workload import Workload

_CUTS = 24  # prefixes for which the bound by places and time is worked out
_ROUNDS = 40  # halvings of an interval of time


@dataclass(frozen=True)
class Bound:
    """Seconds no schedule can beat: `compute` and `load` alone, and `seconds`, the tightest."""

    compute: float
    load: float
    seconds: float


@dataclass(frozen=True)
class _Gap:
    """From use `start` to use `end` of the same chunk: what keeping it saves and takes."""

    start: int
    end: int
    seconds: float
    size: int
    computing: float


def lower_bound(workload: Workload, profile: DeviceProfile, budget: int) -> Bound:
    """Bounds for any schedule of `workload` within `budget` bytes. Cheap: milliseconds."""
    workload.check_budget(budget)
    if not workload.uses:
        return Bound(0.0, 0.0, 0.0)
    prefixes = _Prefixes(workload, Costs(workload, profile), budget)
    total = prefixes.computed[-1]
    count = len(workload.uses)
    first_loads = [
        seconds + total - prefixes.computed[use] for use, seconds in prefixes.first_loads()
    ]
    cuts = sorted({round((index + 1) * count / _CUTS) - 1 for index in range(_CUTS)} - {-1})
    both = [prefixes.earliest_start(use) + total - prefixes.computed[use] for use in cuts]
    load = prefixes.least_loading(count - 1)
    return Bound(total, load, max(total, *first_loads, *both))


class _Prefixes:
    def __init__(self, workload: Workload, costs: Costs, budget: int) -> None:
        self.workload = workload
        chunks = [use.chunk for use in workload.uses]
        self.sizes = [workload.chunks[chunk].resident_bytes for chunk in chunks]
        self.loads = [costs.load[chunk] for chunk in chunks]
        self.compute = costs.compute
        self.computed = [0.0, *accumulate(self.compute)]
        self.gaps = [
            _Gap(
                use,
                later,
                self.loads[use],
                self.sizes[use],
                self.computed[later] - self.computed[use + 1],
            )
            for use, later in enumerate(workload.next_uses)
            if later is not None
        ]
        free = [
            budget - use.activation_bytes - size
            for use, size in zip(workload.uses, self.sizes, strict=True)
        ]
        covering = [0] * (len(chunks) + 1)
        for gap in self.gaps:
            covering[gap.start + 1] += gap.size
            covering[gap.end] -= gap.size
        kept_at_most = list(accumulate(covering[:-1]))
        largest = max(self.sizes)
        # Room that nothing could fill does not help elsewhere.
        self.room_kept = [min(pair) for pair in zip(free, kept_at_most, strict=True)]
        self.room = [
            min(each, kept + largest) for each, kept in zip(free, kept_at_most, strict=True)
        ]

    def first_loads(self) -> list[tuple[int, float]]:
        """Uses of chunks never used before, with the seconds of all first loads up to there."""
        seen: set[int] = set()
        found, seconds = [], 0.0
        for index, use in enumerate(self.workload.uses):
            if use.chunk not in seen:
                seen.add(use.chunk)
                seconds += self.loads[index]
                found.append((index, seconds))
        return found

    def least_loading(self, last: int) -> float:
        """Least seconds of loads for the uses up to `last`, by places."""
        kept = 0.0
        for segment in self.workload.segments:
            if segment.start > last:
                break
            within = [gap for gap in self.gaps if gap.start in segment and gap.end <= last]
            items = [(gap.seconds, float(gap.size * (gap.end - gap.start - 1))) for gap in within]
            room = sum(self.room_kept[segment.start : min(segment.stop, last + 1)])
            kept += _Knapsack(items).most(room) or 0.0
        return sum(self.loads[: last + 1]) - kept

    def earliest_start(self, use: int) -> float:
        """Seconds before which `use` cannot start in any schedule."""
        computed = self.computed[use]
        by_place = max(self.least_loading(use), computed + self.loads[0])
        knapsack = _Knapsack(
            [
                (gap.seconds, gap.size * (gap.computing - gap.seconds))
                for gap in self.gaps
                if gap.end <= use
            ]
        )
        room = sum(c * r for c, r in zip(self.compute[:use], self.room, strict=False))
        loads = sum(self.loads[: use + 1])
        room -= sum(b * x for b, x in zip(self.sizes[: use + 1], self.loads, strict=False))
        largest = max(self.sizes[: use + 1])

        def possible(time: float) -> bool:
            allowed = room + (time - computed) * largest
            kept = knapsack.most(allowed)
            return kept is not None and loads - kept <= time

        low, high = by_place, computed + loads
        if high <= low or possible(low):
            return low
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            low, high = (low, middle) if possible(middle) else (middle, high)
        return low


class _Knapsack:
    """Items of (value, size), of which fractions can be taken; one of negative size makes room."""

    def __init__(self, items: Sequence[tuple[float, float]]) -> None:
        gains = [item for item in items if item[1] <= 0]
        costs = sorted((each for each in items if each[1] > 0), key=_density, reverse=True)
        self._room = -sum(size for _, size in gains)
        self._values = [sum(value for value, _ in gains)]
        self._values += accumulate((value for value, _ in costs), initial=self._values.pop())
        self._sizes = list(accumulate((size for _, size in costs), initial=0.0))

    def most(self, room: float) -> float | None:
        """Most value that fits in `room`; None where not even nothing does."""
        room += self._room
        if room < 0:
            return None
        full = bisect_right(self._sizes, room) - 1
        value = self._values[full]
        if full + 1 < len(self._sizes):
            part = (room - self._sizes[full]) / (self._sizes[full + 1] - self._sizes[full])
            value += part * (self._values[full + 1] - value)
        return value


def _density(item: tuple[float, float]) -> float:
    return item[0] / item[1]
