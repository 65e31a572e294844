"""Concurrent Inference with Dynamic Loading: cut components into chunks that load one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from odsora_compiler.analysis.cost import value_bytes, weight_bytes
from odsora_compiler.analysis.outline import Outline
from odsora_compiler.analysis.partition import COST, CutPoints, Span, least_budget, partition
from odsora_compiler.errors import PassError
from odsora_compiler.ir.program import Chunk, Component, Plan, Program
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.options import ByteSize

_DEFAULT_PART = 8
_DEFAULT_LEAST = 10**6  # reading less than that at a time is mostly waiting for the storage
_DEFAULT_MOST = 256 * 10**6


@dataclass(frozen=True)
class CIDL(Pass):
    """Cut every function of every component into chunks of at most `budget` bytes of weights.

        a ─ b ─ c ─ d ─ e ─ f        a ─ b ─┊─ c ─ d ─┊─ e ─ f

    While a chunk computes, the next one can be read from storage. All functions of a component are
    cut at the same weights, so that a package holds one chunk of each over one copy of them. Nodes
    get their chunk's index, the component a plan with a reason for every cut; the functions
    themselves do not change.

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

    def run(self, program: Program, context: Context) -> None:
        """Give every component a plan. Raises `PassError` where `budget` is too small."""
        for component in program.components.values():
            self._cut(component, context)

    def _cut(self, component: Component, context: Context) -> None:
        precision = context.precision
        functions = list(component.functions.values())
        names = dict.fromkeys(name for each in functions for name in each.weight_names())
        sizes = {name: weight_bytes(component.weights, name, precision) for name in names}
        outlines = [
            Outline(each, sizes, lambda value: value_bytes(value, precision)) for each in functions
        ]
        points = CutPoints(outlines, sizes)
        budget = self.budget or _default_budget(points)
        spans = partition(points, budget)
        if spans is None:
            raise _impossible(component, points, budget)

        for outline in outlines:
            for node in outline.function.operators():
                node.meta.pop("chunk", None)
        for index, span in enumerate(spans):
            for outline, start, stop in zip(
                outlines, points.points[span.start], points.points[span.stop], strict=True
            ):
                for node in (node for step in outline.liveness.steps[start:stop] for node in step):
                    node.meta["chunk"] = index
        chunks = tuple(
            Chunk(
                span.weight_bytes,
                {
                    outline.function.name: outline.liveness.crossing_bytes(stop)
                    for outline, stop in zip(outlines, points.points[span.stop], strict=True)
                },
                _reason(points, span, budget),
            )
            for span in spans
        )
        component.plan = Plan(int(budget), context.precision, COST, chunks)
        context.note(_summary(component.name, component.plan))


def _default_budget(points: CutPoints) -> int:
    wanted = sum(points.sizes.values()) // _DEFAULT_PART
    wanted = min(max(wanted, _DEFAULT_LEAST), _DEFAULT_MOST)
    return max(wanted, least_budget(points).weight_bytes)


def _impossible(component: Component, points: CutPoints, budget: int) -> PassError:
    least = least_budget(points)
    node = points.heaviest(least)
    return PassError(
        f"cidl: component '{component.name}' cannot be cut into chunks of at most "
        f"{_text(budget)} of weights: '{node.name}' ({node.meta['provenance']}) and what cannot be "
        f"parted from it needs {_text(least.weight_bytes)}",
        f"The smallest possible budget is cidl{{budget={least.weight_bytes}}}.",
    )


def _summary(name: str, plan: Plan) -> str:
    largest = max(chunk.weight_bytes for chunk in plan.chunks)
    crossing = max((max(chunk.crossing_bytes.values()) for chunk in plan.chunks), default=0)
    return (
        f"{name}: {_count(len(plan.chunks), 'chunk')} of at most {_text(largest)} of weights "
        f"(budget {_text(plan.budget)}), at most {_text(crossing)} cross a cut"
    )


def _reason(points: CutPoints, span: Span, budget: int) -> str:
    """Why a chunk ends where it does, told for the first function."""
    if span.stop == points.last:
        return "the end" if span.start else "all weights fit in one chunk"
    start, stop = points.points[span.start][0], points.points[span.stop][0]
    live = points.outlines[0].liveness.live[stop]
    own = sorted((v for v in live if v.made >= start), key=lambda v: -v.bytes)
    passing = [value for value in live if value.made < start]
    parts = [f"{_place(points, span.stop)}: hands on " + _listing([v.node for v in own])]
    parts[0] += f" ({_text(sum(value.bytes for value in own))})"
    if passing:
        total = _text(sum(value.bytes for value in passing))
        parts.append(f"{_count(len(passing), 'earlier value')} passing by ({total})")
    parts.append(_why_not_later(points, span, budget))
    return "; ".join(parts)


def _why_not_later(points: CutPoints, span: Span, budget: int) -> str:
    later = [each for each, _ in points.spans(span.start) if each.stop > span.stop]
    narrow = next(each for each in later if each.handed_bytes <= span.handed_bytes)
    if narrow.weight_bytes <= budget:
        return "a later cut would fit, but the plan as a whole would cost more"
    where = "to the end" if narrow.stop == points.last else _place(points, narrow.stop)
    return (
        f"the next cut as narrow, {where}, makes a chunk of {_text(narrow.weight_bytes)}, over "
        f"the budget of {_text(budget)}"
    )


def _place(points: CutPoints, point: int) -> str:
    """A cut in the words of the model: which module it comes after or lies in."""
    steps = points.outlines[0].liveness.steps
    position = points.points[point][0]
    if position == 0:
        return "before everything"
    before = steps[position - 1][0]
    module = before.meta["provenance"].module
    following = steps[position][0].meta["provenance"].module if position < len(steps) else ""
    if not module:
        return f"after {before.name}"
    inside = following == module or following.startswith(f"{module}.")
    return f"in {module}, after {before.name}" if inside else f"after {module}"


def _listing(nodes: list[fx.Node]) -> str:
    names = [node.name for node in nodes[:3]]
    more = [f"{len(nodes) - 3} more"] if len(nodes) > 3 else []
    return ", ".join([*names, *more]) or "nothing"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _text(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
