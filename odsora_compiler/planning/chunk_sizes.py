"""Choosing how finely to cut the components of a program, such that a whole run in so much memory
takes the least time.

Nothing is known here of how cuts are made: `Cuts` offers them, from few large chunks to many small
ones, and the planner tells of each how long the run would take. Components that take turns are
chosen one after another, the others each on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from odsora_compiler.ir.manifest import ComponentEntry
from odsora_compiler.planning.bound import lower_bound
from odsora_compiler.planning.from_program import ProgramWorkloads
from odsora_compiler.planning.plan import SchedulePlan
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Workload

_TIE = 1.005  # times that differ by less are equal: a model of a device is no better
_WORSE = 1.02  # after a cut that is so much worse than the best, finer ones are given up,
_PATIENCE = 2  # as after so many that bring nothing
_NEARLY = 1.02  # estimates of memory are that good
_SWEEPS = 2  # over components that take turns


class Cuts(Protocol):
    """Two or more ways to cut a component, numbered: from few large chunks to many small ones, at
    last the one that needs least memory."""

    def __len__(self) -> int: ...

    def estimate(self, number: int) -> ComponentEntry:
        """About what the manifest will say of the component; the same object for the same cut."""

    def entry(self, number: int) -> ComponentEntry:
        """The same exactly, with more work."""


@dataclass(frozen=True)
class ChosenCuts:
    """`numbers`: component → the cut to make. `plan`: of the whole run then, `workload`."""

    numbers: Mapping[str, int]
    workload: Workload
    plan: SchedulePlan


class CutSearch:
    """`cuts`: of every component that is called; `memory`: bytes for all of a run.

    `narrowest`: about the workload that needs least memory, exactly where it may be too much.
    """

    def __init__(
        self,
        runs: ProgramWorkloads,
        cuts: Mapping[str, Cuts],
        profile: DeviceProfile,
        memory: int,
    ) -> None:
        self._runs = runs
        self._cuts = cuts
        # Seconds measured of chunks by name are not those of chunks to come.
        self._profile = replace(profile, chunk_seconds={})
        self._memory = memory
        self._numbers = {name: len(each) - 1 for name, each in cuts.items()}
        self._entries = {name: each.estimate(len(each) - 1) for name, each in cuts.items()}
        self.narrowest = runs.workload(self._entries)
        if self.narrowest.least_budget * _NEARLY > memory:
            self._entries = {name: each.entry(len(each) - 1) for name, each in cuts.items()}
            self.narrowest = runs.workload(self._entries)

    def run(self) -> ChosenCuts:
        """The cuts with which the run takes least time.

        Raises `UsageError` where the memory is less than `narrowest` needs.
        """
        self.narrowest.check_budget(self._memory)
        for names, calls in self._runs.groups():
            for _ in range(_SWEEPS if len(names) > 1 else 1):
                before = dict(self._numbers)
                for name in names:
                    self._choose(name, calls)
                if before == self._numbers:
                    break
        workload = self._runs.workload(self._entries)
        plan = make_plan(workload, self._profile, self._memory)
        return ChosenCuts(dict(self._numbers), workload, plan)

    def _choose(self, name: str, calls: Sequence[int]) -> None:
        """Cut `name` such that these calls take least time, the others being cut as they are.

        Of cuts that tie, the one with fewest chunks.
        """
        goal = _TIE * self._fastest(name, calls)
        found: list[tuple[float, int]] = []
        best, waited = float("inf"), 0
        for number, workload in self._offered(name, calls):
            seconds = make_plan(workload, self._profile, self._memory).predicted_seconds
            found.append((seconds, number))
            waited = 0 if seconds * _TIE < best else waited + 1
            best = min(best, seconds)
            if seconds <= goal or seconds > best * _WORSE or waited == _PATIENCE:
                break
        # Times were told from estimates; that it fits must be certain. The narrowest cut does.
        equal = sorted(found, key=lambda item: (max(item[0], best * _TIE), item[1]))
        for number in [*(number for _, number in equal), len(self._cuts[name]) - 1]:
            self._numbers[name] = number
            self._entries[name] = self._cuts[name].entry(number)
            workload = self._runs.workload(self._entries).with_calls(calls)
            if workload.least_budget <= self._memory:
                return

    def _offered(self, name: str, calls: Sequence[int]) -> Iterator[tuple[int, Workload]]:
        """Cuts that seem to fit, coarse ones first, with the workload of these calls.

        The narrowest is not among them: it is for where nothing else fits.
        """
        seen: ComponentEntry | None = None
        for number in range(len(self._cuts[name]) - 1):
            entry = self._cuts[name].estimate(number)
            if entry is not seen:
                seen = entry
                workload = self._runs.workload({**self._entries, name: entry}).with_calls(calls)
                if workload.least_budget <= self._memory:
                    yield number, workload

    def _fastest(self, name: str, calls: Sequence[int]) -> float:
        """Seconds that these calls take at least, roughly: the bound of a fine cut that is free."""
        free = replace(self._profile, load_overhead=0.0, call_overhead=0.0)
        fine = self._cuts[name].estimate(len(self._cuts[name]) - 2)
        workload = self._runs.workload({**self._entries, name: fine}).with_calls(calls)
        budget = max(self._memory, workload.least_budget)
        return lower_bound(workload, free, budget).seconds
