"""Concurrent Inference with Dynamic Loading: cut components into chunks that load one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from odsora_compiler.analysis.cutting import count_text, cut, cut_points, size_text, uncut
from odsora_compiler.analysis.partition import (
    COST,
    NARROW_COST,
    PACED_COST,
    CutPoints,
    Pace,
    Span,
    least_budget,
    partition,
)
from odsora_compiler.errors import PassError
from odsora_compiler.ir.manifest import ComponentEntry
from odsora_compiler.ir.program import Component, Plan, Program
from odsora_compiler.lowering.chunks import LoweringSettings
from odsora_compiler.lowering.forecast import forecast
from odsora_compiler.lowering.interface import Precision
from odsora_compiler.lowering.joining import FinestCut
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.options import ByteSize
from odsora_compiler.planning.chunk_sizes import CutSearch
from odsora_compiler.planning.from_program import ProgramWorkloads
from odsora_compiler.planning.plan import SchedulePlan
from odsora_compiler.planning.profile import DeviceProfile, find_profile
from odsora_compiler.planning.workload import Workload

_DEFAULT_PART = 8
_DEFAULT_LEAST = 10**6  # reading less than that at a time is mostly waiting for the storage
_DEFAULT_MOST = 256 * 10**6
_DEFAULT_PROFILE = "iphone15pro"
_PARTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # of the memory, tried as budgets


@dataclass(frozen=True)
class CIDL(Pass):
    """Cut every function of every component into chunks, by their weights or for a whole run.

        a ─ b ─ c ─ d ─ e ─ f        a ─ b ─┊─ c ─ d ─┊─ e ─ f

    While a chunk computes, the next one can be read from storage. All functions of a component are
    cut at the same weights, so that a package holds one chunk of each over one copy of them. Nodes
    get their chunk's index, the component a plan with a reason for every cut; the functions
    themselves do not change.

    With `budget`, chunks have at most so many bytes of weights. With `memory`, weights and
    activations of the whole program have at most so many bytes at any time, and the chunks are
    such that running it takes least time on a device, as odsora-plan predicts it.

    Source: On-device Sora, arXiv 2502.04363, section 3.3 (cut there by hand).
    """

    name = "cidl"
    establishes = frozenset({"plan"})

    budget: ByteSize | None = option(
        None,
        "most bytes of weights in a chunk, in the precision of lowering; none: an eighth of the "
        "component's weights, at least 1MB and at most 256MB, or the smallest possible budget if "
        "that is more",
    )
    memory: ByteSize | None = option(
        None, "instead of budget: most bytes of weights and activations in a whole run"
    )
    profile: str = option(
        _DEFAULT_PROFILE, "for memory: name of a device profile, or path of its .json"
    )

    def __post_init__(self) -> None:
        if self.budget is not None and self.memory is not None:
            raise ValueError("budget= is for each chunk, memory= for the whole run: give one")
        if self.memory is None and self.profile != _DEFAULT_PROFILE:
            raise ValueError("profile= is for memory=, which is not given")
        find_profile(self.profile)

    def run(self, program: Program, context: Context) -> None:
        """Give every component a plan. Raises `PassError` where the option's bytes are too few."""
        fitted = self._fit(program, context) if self.memory else set()
        for name, component in program.components.items():
            if name not in fitted:
                points = cut_points(component, context.precision)
                budget = self.budget or _default_budget(points, least_budget(points).weight_bytes)
                spans = partition(points, budget)
                if spans is None:
                    raise _impossible(component, points, budget)
                cut(component, points, spans, budget, context.precision, COST)
            assert component.plan is not None
            context.note(_summary(name, component.plan))

    def _fit(self, program: Program, context: Context) -> set[str]:
        """Cut the components that are called, for a run within the memory; their names."""
        profile = find_profile(self.profile)
        memory = int(self.memory or 0)
        called: dict[str, Counter[str]] = {}
        for node in program.calls():
            component, function = map(str, node.args)
            called.setdefault(component, Counter())[function] += 1
        cuts = {
            name: _Cuts(program.component(name), counts, context.precision, profile, memory)
            for name, counts in called.items()
        }
        runs = ProgramWorkloads(program, context.precision, profile)
        search = CutSearch(runs, cuts, profile, memory)
        if memory < search.narrowest.least_budget:
            for name in cuts:
                uncut(program.component(name))
            raise _too_small(search.narrowest, memory)
        chosen = search.run()
        for name, number in chosen.numbers.items():
            cuts[name].make(number)
        context.note(_prediction(chosen.plan))
        return set(cuts)


class _Cuts:
    """The ways to cut a component, for `planning.chunk_sizes`: by a budget, at last the narrowest.

    `calls`: of each of its functions in a run.
    """

    def __init__(
        self,
        component: Component,
        calls: Mapping[str, int],
        precision: str,
        profile: DeviceProfile,
        memory: int,
    ) -> None:
        self._component = component
        self._settings = LoweringSettings(cast(Precision, precision))
        self._points = cut_points(component, precision)
        self._finest = FinestCut(component, self._points, self._settings)
        self._memory = memory
        self._calls = calls
        rate = profile.compute_rate(component.compute_units, component.name)
        self._bytes_per_flop = profile.read_bandwidth / rate
        widened = profile.weight_expansion.get(precision, 1.0)
        self._expansions = (widened, profile.activation_expansion)
        least = least_budget(self._points).weight_bytes
        whole = self._points.weight_bytes
        budgets = {int(min(whole, memory) / part) for part in _PARTS}
        budgets |= {_default_budget(self._points, least)} | ({whole} if whole < memory else set())
        self._budgets = [*sorted((each for each in budgets if each > least), reverse=True), least]
        self._spans: dict[int, list[Span]] = {}
        self._estimates: dict[tuple[int, ...], ComponentEntry] = {}
        self._entries: dict[int, ComponentEntry] = {}

    def __len__(self) -> int:
        return len(self._budgets) + 1

    def estimate(self, number: int) -> ComponentEntry:
        """About what lowering makes of that cut."""
        spans = self._cut(number)
        stops = tuple(span.stop for span in spans)
        if stops not in self._estimates:
            self._estimates[stops] = self._finest.joined(spans) or self.entry(number)
        return self._estimates[stops]

    def entry(self, number: int) -> ComponentEntry:
        """What lowering makes of that cut."""
        if number not in self._entries:
            self.make(number)
            self._entries[number] = forecast(self._component, self._settings).entry
        return self._entries[number]

    def make(self, number: int) -> None:
        """Cut the component so."""
        spans = self._cut(number)
        if number < len(self._budgets):
            budget, cost = self._budgets[number], PACED_COST
        else:
            budget, cost = max(span.weight_bytes for span in spans), NARROW_COST
        cut(self._component, self._points, spans, budget, self._settings.precision, cost)

    def _cut(self, number: int) -> list[Span]:
        if number not in self._spans:
            if number < len(self._budgets):
                budget = self._budgets[number]
                spans = partition(self._points, budget, self._pace(budget))
                assert spans is not None, "no budget is below the least"
            else:
                spans = self._finest.narrowest(*self._expansions)
            self._spans[number] = spans
        return self._spans[number]

    def _pace(self, budget: int) -> Pace:
        """While chunks come and go, two are in memory; the rest of it is for those that stay."""
        count = sum(self._calls.values())
        kept = (self._memory - 2 * budget) / max(self._points.weight_bytes, 1)
        return Pace(
            min(max(1 / count, 1 - kept), 1.0),
            {name: self._bytes_per_flop * calls / count for name, calls in self._calls.items()},
        )


def _default_budget(points: CutPoints, least: int) -> int:
    wanted = min(max(points.weight_bytes // _DEFAULT_PART, _DEFAULT_LEAST), _DEFAULT_MOST)
    return max(wanted, least)


def _impossible(component: Component, points: CutPoints, budget: int) -> PassError:
    least = least_budget(points)
    node = points.heaviest(least)
    return PassError(
        f"cidl: component '{component.name}' cannot be cut into chunks of at most "
        f"{size_text(budget)} of weights: '{node.name}' ({node.meta['provenance']}) and what "
        f"cannot be parted from it needs {size_text(least.weight_bytes)}",
        f"The smallest possible budget is cidl{{budget={least.weight_bytes}}}.",
    )


def _too_small(narrowest: Workload, memory: int) -> PassError:
    use = narrowest.most_needed()
    chunk = narrowest.chunks[use.chunk]
    return PassError(
        f"cidl: a run does not fit in {size_text(memory)}: however finely component "
        f"'{chunk.component}' is cut, a chunk of its function '{use.function}' takes "
        f"{size_text(chunk.resident_bytes)} and its activations {size_text(use.activation_bytes)}",
        f"The least possible memory is cidl{{memory={narrowest.least_budget}}}.",
    )


def _summary(name: str, plan: Plan) -> str:
    largest = max(chunk.weight_bytes for chunk in plan.chunks)
    crossing = max((max(chunk.crossing_bytes.values()) for chunk in plan.chunks), default=0)
    return (
        f"{name}: {count_text(len(plan.chunks), 'chunk')} of at most {size_text(largest)} of "
        f"weights (budget {size_text(plan.budget)}), at most {size_text(crossing)} cross a cut"
    )


def _prediction(plan: SchedulePlan) -> str:
    ratio = plan.predicted_seconds / plan.bound_seconds if plan.bound_seconds else 1.0
    return (
        f"a run in {size_text(plan.budget)} on {plan.profile}: predicted "
        f"{plan.predicted_seconds:.4g} s, bound {plan.bound_seconds:.4g} s, ratio {ratio:.3f}"
    )
