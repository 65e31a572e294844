"""A component's possible cuts, and a cut made: chunks marked on the nodes, and a plan with reasons.

Which cut is made is the partitioner's business (`analysis.partition`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from odsora_compiler.analysis.cost import value_bytes, weight_bytes
from odsora_compiler.analysis.outline import Outline
from odsora_compiler.analysis.partition import CutPoints, Span
from odsora_compiler.ir.program import Chunk, Component, Plan


def cut_points(component: Component, precision: str) -> CutPoints:
    """Where all functions of `component` can be cut, its sizes counted in `precision`."""
    functions = list(component.functions.values())
    names = dict.fromkeys(name for each in functions for name in each.weight_names())
    sizes = {name: weight_bytes(component.weights, name, precision) for name in names}
    outlines = [
        Outline(each, sizes, lambda value: value_bytes(value, precision)) for each in functions
    ]
    return CutPoints(outlines, sizes)


def cut(
    component: Component,
    points: CutPoints,
    spans: Sequence[Span],
    budget: int,
    precision: str,
    cost: str,
) -> None:
    """Cut `component` into `spans`: nodes get their chunk's index, the component its plan.

    `budget`: most bytes of weights that were allowed in a span; `cost`: why these, in words.
    """
    uncut(component)
    for index, span in enumerate(spans):
        for outline, start, stop in zip(
            points.outlines, points.points[span.start], points.points[span.stop], strict=True
        ):
            for node in (node for step in outline.liveness.steps[start:stop] for node in step):
                node.meta["chunk"] = index
    chunks = tuple(
        Chunk(
            span.weight_bytes,
            {
                outline.function.name: outline.liveness.crossing_bytes(stop)
                for outline, stop in zip(points.outlines, points.points[span.stop], strict=True)
            },
            _reason(points, span, budget),
        )
        for span in spans
    )
    component.plan = Plan(int(budget), precision, cost, chunks)


def uncut(component: Component) -> None:
    """Take back what `cut` did."""
    component.plan = None
    for function in component.functions.values():
        for node in function.operators():
            node.meta.pop("chunk", None)


def size_text(size: int) -> str:
    """A number of bytes for people: `12.3 MB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def count_text(number: int, what: str) -> str:
    """`1 chunk`, `2 chunks`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _reason(points: CutPoints, span: Span, budget: int) -> str:
    """Why a chunk ends where it does, told for the first function."""
    if span.stop == points.last:
        return "the end" if span.start else "all weights fit in one chunk"
    start, stop = points.points[span.start][0], points.points[span.stop][0]
    live = points.outlines[0].liveness.live[stop]
    own = sorted((v for v in live if v.made >= start), key=lambda v: -v.bytes)
    passing = [value for value in live if value.made < start]
    parts = [f"{_place(points, span.stop)}: hands on " + _listing([v.node for v in own])]
    parts[0] += f" ({size_text(sum(value.bytes for value in own))})"
    if passing:
        total = size_text(sum(value.bytes for value in passing))
        parts.append(f"{count_text(len(passing), 'earlier value')} passing by ({total})")
    parts.append(_why_not_later(points, span, budget))
    return "; ".join(parts)


def _why_not_later(points: CutPoints, span: Span, budget: int) -> str:
    later = (each for each, _ in points.spans(span.start) if each.stop > span.stop)
    narrow = next(each for each in later if each.handed_bytes <= span.handed_bytes)
    if narrow.weight_bytes <= budget:
        return "a later cut would fit, but the plan as a whole would cost more"
    where = "to the end" if narrow.stop == points.last else _place(points, narrow.stop)
    return (
        f"the next cut as narrow, {where}, makes a chunk of {size_text(narrow.weight_bytes)}, over "
        f"the budget of {size_text(budget)}"
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
