"""The cutting algorithm, held against enumerating all plans."""

from __future__ import annotations

import operator
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
import torch
from graph_builder import GraphBuilder
from torch import fx

from odsora_compiler.analysis.cost import node_flops, value_bytes
from odsora_compiler.analysis.outline import Outline
from odsora_compiler.analysis.partition import (
    CutPoints,
    Pace,
    Span,
    finest,
    least_budget,
    partition,
)
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import WeightSpec

aten = torch.ops.aten


def fp16(value: object) -> int:
    return value_bytes(value, "fp16")


def cut_points(specs: dict[str, WeightSpec], *functions: Function) -> CutPoints:
    sizes = {name: 2 * spec.elements for name, spec in specs.items()}
    return CutPoints([Outline(function, sizes, fp16) for function in functions], sizes)


def random_graph(seed: int) -> GraphBuilder:
    """Linears of several widths, some sharing weights, sums of equal widths, splits, functions."""
    chance = random.Random(seed)
    graph = GraphBuilder()
    values = [graph.input("x", 2, 8), graph.input("z", 2, 8)]
    for index in range(chance.randint(8, 22)):
        x = chance.choice(values[-5:])
        width = x.meta["val"].shape[-1]
        kind = chance.random()
        alike = [v for v in values if v.meta["val"].shape[-1] == width]
        if kind < 0.4:
            values.append(graph.linear(x, f"w{index}", chance.choice([4, 8, 8, 16])))
        elif kind < 0.5:
            shared = f"shared{width}"
            values.append(graph.linear(x, shared, 8))
        elif kind < 0.75:
            values.append(graph.call(aten.add.Tensor, x, chance.choice(alike)))
        elif kind < 0.85:
            parts = graph.call(aten.split.Tensor, x, width // 2, -1)
            values += [graph.call(operator.getitem, parts, half) for half in (0, 1)]
        else:
            values.append(graph.call(aten.relu.default, x))
    last = graph.linear(values[-1], "last", 4)
    graph.finish(y=last, side=chance.choice(values[2:]))
    graph.editor.erase_dead()
    return graph


def varied(function: Function, seed: int) -> Function:
    """A function of the same weights in the same order with other nodes in between."""
    chance = random.Random(seed)
    other = function.copy("other", base="base")
    editor = Editor(other, "test")
    for node in list(other.operators()):
        if isinstance(node.meta["val"], torch.Tensor) and chance.random() < 0.3:
            doubled = editor.after(node).call(aten.mul.Tensor, node, 2)
            editor.replace(node, doubled, [user for user in node.users if user is not doubled])
    return other


# ------------------------------------------------------------------ all plans


def all_plans(points: CutPoints) -> Iterator[tuple[int, ...]]:
    inner = range(1, points.last)
    for count in range(points.last):
        for chosen in combinations(inner, count):
            yield (0, *chosen, points.last)


class Priced:
    """A plan's weights and cost, computed from the graphs without the partitioner's tables."""

    def __init__(self, points: CutPoints, plan: tuple[int, ...]) -> None:
        self.count = len(plan) - 1
        self.weights: list[set[str]] = [set() for _ in range(self.count)]
        self.aligned = True
        self.handed = 0
        for which, outline in enumerate(points.outlines):
            home: dict[fx.Node, int] = {}
            for index, (start, stop) in enumerate(pairwise(plan)):
                begin, end = points.points[start][which], points.points[stop][which]
                for step in outline.liveness.steps[begin:end]:
                    home.update(dict.fromkeys(step, index))
            mine: list[set[str]] = [set() for _ in range(self.count)]
            for node, index in home.items():
                mine[index] |= {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
                if any(home.get(user, index) > index for user in node.users):
                    self.handed += fp16(node.meta["val"])
            if which and mine != self.weights:
                self.aligned = False
            self.weights = [a | b for a, b in zip(self.weights, mine, strict=True)]
        sizes = [sum(points.sizes[name] for name in names) for names in self.weights]
        self.largest = max(sizes)
        self.squares = sum(size**2 for size in sizes)
        structures = Counter(
            tuple(
                outline.structures(points.points[start][which], [points.points[stop][which]])[0]
                for which, outline in enumerate(points.outlines)
            )
            for start, stop in pairwise(plan)
        )
        self.alike = max(structures.values())
        self.bytes = (self.handed + sum(sizes), self.count)


def path(spans: list[Span]) -> tuple[int, ...]:
    return (0, *(span.stop for span in spans))


@pytest.mark.parametrize("functions", [1, 2])
def test_plans_are_the_best_of_all(functions: int) -> None:
    checked = cut = 0
    for seed in range(60):
        graph = random_graph(seed)
        variants = [graph.function]
        if functions == 2:
            variants.append(varied(graph.function, seed))
        points = cut_points(graph.specs, *variants)
        if not 2 < points.last <= 10:
            continue
        plans = {plan: Priced(points, plan) for plan in all_plans(points)}
        plans = {plan: priced for plan, priced in plans.items() if priced.aligned}
        least = min(priced.largest for priced in plans.values())
        whole = plans[0, points.last].largest
        print(f"seed {seed}: {points.last} points, {least} of {whole} bytes at least")
        assert least_budget(points).weight_bytes == least
        assert partition(points, least - 1) is None
        for budget in sorted({least, (2 * least + whole) // 3, (least + whole) // 2, whole}):
            spans = partition(points, budget)
            assert spans is not None
            ours = plans[path(spans)]
            allowed = [priced for priced in plans.values() if priced.largest <= budget]
            assert ours in allowed
            assert [span.weight_bytes for span in spans] == [
                sum(points.sizes[name] for name in names) for names in ours.weights
            ]
            assert sum(span.handed_bytes for span in spans) == ours.handed
            cheap = [p for p in allowed if p.bytes == min(p.bytes for p in allowed)]
            assert ours in cheap
            alike = [p for p in cheap if p.alike == max(p.alike for p in cheap)]
            assert ours in alike
            if ours.alike == 1:
                assert ours.squares == min(priced.squares for priced in alike)
            checked += 1
            cut += len(spans) > 1
    assert checked > 40
    assert cut > 20


def test_between_two_weights_the_cut_is_where_the_fewest_bytes_cross() -> None:
    for seed in range(60):
        print(f"seed {seed}")
        graph = random_graph(seed)
        points = cut_points(graph.specs, graph.function)
        (outline,) = points.outlines
        alive = outline.liveness
        for (position,) in points.points[1:-1]:
            first = last = position
            while first > 0 and not outline.needs[first - 1]:
                first -= 1
            while last < len(outline.needs) and not outline.needs[last]:
                last += 1
            fewest = min(alive.crossing_bytes(p) for p in range(first, last + 1))
            assert alive.crossing_bytes(position) == fewest


# ------------------------------------------------------------------ graphs of known shape


def block(graph: GraphBuilder, x: fx.Node, name: str, padding: int = 0) -> fx.Node:
    """A residual MLP: 2·w·4w numbers; only `x` is alive at its ends."""
    width = x.meta["val"].shape[-1]
    h = graph.call(aten.layer_norm.default, x, [width], module=name)
    h = graph.linear(h, f"{name}.up", 4 * width, module=f"{name}.up")
    h = graph.call(aten.gelu.default, h, module=name)
    for _ in range(padding):
        h = graph.call(aten.mul.Tensor, h, 1.5, module=name)
    h = graph.linear(h, f"{name}.down", width, module=f"{name}.down")
    return graph.call(aten.add.Tensor, x, h, module=name)


def residual_network(depth: int, padding: int = 0) -> GraphBuilder:
    graph = GraphBuilder()
    x = graph.linear(graph.input("x", 2, 8), "head", 8)
    for index in range(depth):
        x = block(graph, x, f"block{index}", padding)
    graph.finish(y=graph.linear(x, "tail", 4))
    return graph


BLOCK = 2 * 2 * 8 * 32  # bytes of a block's weights in fp16


def modules(points: CutPoints, span: Span) -> set[str]:
    (outline,) = points.outlines
    needs = outline.needs[points.points[span.start][0] : points.points[span.stop][0]]
    return {name.partition(".")[0] for names in needs for name in names}


def test_residual_blocks_are_not_cut_open() -> None:
    graph = residual_network(9)
    points = cut_points(graph.specs, graph.function)
    spans = partition(points, 3 * BLOCK + 10)
    assert spans is not None

    assert all(span.handed_bytes in (0, 2 * 8 * 2) for span in spans)
    found = [modules(points, span) for span in spans]
    assert found[0] >= {"head", "block0"}
    assert found[1:3] == [
        {f"block{index}" for index in range(start, start + 3)}
        for start in (len(found[0]) - 1, len(found[0]) + 2)
    ]
    keys = [points.outlines[0].structures(*ends(points, span))[0] for span in spans]
    assert keys[1] == keys[2] != keys[0]


def ends(points: CutPoints, span: Span) -> tuple[int, list[int]]:
    return points.points[span.start][0], [points.points[span.stop][0]]


def test_everything_in_one_chunk_when_it_fits() -> None:
    graph = residual_network(3)
    points = cut_points(graph.specs, graph.function)
    total = sum(points.sizes.values())

    assert partition(points, total) == [Span(0, points.last, total, 0)]
    assert len(partition(points, total - 1) or []) > 1


def test_skip_connections_are_crossed_where_they_are_few() -> None:
    # Down and up with skips, as in a U-Net: wide values outside, narrow ones inside.
    graph = GraphBuilder()
    x = graph.input("x", 64, 16)
    skips = []
    for level in range(3):
        x = graph.linear(x, f"down{level}", 16)
        skips.append(x)
        x = graph.call(aten.view.default, x, [x.meta["val"].shape[0] // 2, 32])
        x = graph.linear(x, f"shrink{level}", 16)
    for level in range(4):
        x = graph.linear(x, f"middle{level}", 16)
    for level, skip in reversed(list(enumerate(skips))):
        x = graph.linear(x, f"grow{level}", 32)
        x = graph.call(aten.view.default, x, list(skip.meta["val"].shape))
        x = graph.linear(graph.call(aten.add.Tensor, x, skip), f"up{level}", 16)
    graph.finish(y=x)
    points = cut_points(graph.specs, graph.function)
    total = sum(points.sizes.values())
    spans = partition(points, total * 2 // 3)
    assert spans is not None

    # In the middle all skips cross; two cuts beside it hand on less than any single one.
    skipped = sum(fp16(skip.meta["val"]) for skip in skips)
    assert max(span.handed_bytes for span in spans) < skipped
    single = [
        span.handed_bytes
        for span, _ in points.spans(0, total * 2 // 3)
        if total - span.weight_bytes <= total * 2 // 3
    ]
    assert sum(span.handed_bytes for span in spans) < min(single)


def test_a_shared_weight_is_stored_and_counted_in_each_chunk() -> None:
    graph = GraphBuilder()
    x = graph.linear(graph.input("x", 2, 16), "tied", 16)
    x = graph.linear(x, "a", 16)
    x = graph.linear(x, "b", 16)
    graph.finish(y=graph.linear(x, "tied", 16))
    points = cut_points(graph.specs, graph.function)
    size = 2 * 16 * 16

    spans = partition(points, 2 * size)
    assert spans is not None
    assert [span.weight_bytes for span in spans] == [2 * size, 2 * size]
    spans = partition(points, 3 * size - 1)
    assert spans is not None
    assert sum(span.weight_bytes for span in spans) == 4 * size
    whole = partition(points, 3 * size)
    assert whole is not None
    assert len(whole) == 1


def test_a_value_costs_its_bytes_once_however_far_it_goes() -> None:
    # `context` is made first and read last: cuts between cost the same wherever it ends.
    graph = GraphBuilder()
    context = graph.linear(graph.input("c", 32, 8), "context", 8)
    x = graph.linear(graph.input("x", 2, 8), "head", 8)
    for index in range(4):
        x = block(graph, x, f"block{index}")
    pooled = graph.call(aten.mean.dim, context, [0], True)
    graph.finish(y=graph.linear(graph.call(aten.add.Tensor, x, pooled), "tail", 8))
    points = cut_points(graph.specs, graph.function)
    spans = partition(points, BLOCK + 300)
    assert spans is not None

    assert sum(span.handed_bytes for span in spans) == 32 * 8 * 2 + (len(spans) - 1) * 2 * 8 * 2
    assert len(spans) == 4


def test_cheap_values_are_computed_anew_and_dear_ones_cross() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 64, 32)
    mask = graph.call(aten.gt.Scalar, graph.input("m", 32), 0)
    small = graph.call(aten.cos.default, graph.weight("small", 32))
    large = graph.call(aten.mul.Tensor, graph.weight("large", 32, 32), 2)
    noise = graph.call(aten.rand.default, [32])
    for index in range(39):
        x = graph.linear(x, f"w{index}", 32)
        x = graph.call(aten.add.Tensor, x, small)
        x = graph.call(aten.masked_fill.Scalar, x, mask, 0.0)
    x = graph.call(aten.linear.default, x, large)
    graph.finish(y=graph.call(aten.add.Tensor, x, noise))
    points = cut_points(graph.specs, graph.function)
    (outline,) = points.outlines

    assert outline.anew == {mask, small}
    assert outline.light == {"small"}
    spans = partition(points, 5 * 2 * 32 * 32 + 2 * 32)
    assert spans is not None
    # `large` is in one chunk, next to its reader; `small` is in all; only the noise crosses.
    weights = sum(span.weight_bytes for span in spans)
    assert weights == sum(points.sizes.values()) + (len(spans) - 1) * 2 * 32
    crossing = 2 * 32 + (len(spans) - 1) * 2 * 64 * 32
    assert sum(span.handed_bytes for span in spans) == crossing


def test_what_inputs_are_turned_into_is_cut_where_it_was_traced() -> None:
    # `text` is read late, from a cheap value of an input: it stays where it is, ahead of `head`.
    graph = GraphBuilder()
    text = graph.call(aten.squeeze.dim, graph.input("t", 2, 1, 8), 1)
    text = graph.linear(text, "text", 8)
    x = graph.linear(graph.input("x", 2, 8), "head", 8)
    graph.finish(y=graph.linear(graph.call(aten.add.Tensor, x, text), "tail", 8))
    points = cut_points(graph.specs, graph.function)

    assert [next(iter(names)) for names in points.outlines[0].needs if names] == [
        "text",
        "head",
        "tail",
    ]


# ------------------------------------------------------------------ several functions


def test_functions_of_other_weights_can_still_be_cut() -> None:
    def chain(name: str, first: str) -> GraphBuilder:
        graph = GraphBuilder(name)
        x = graph.input("x", 2, 8)
        for weight in (f"{first}0", "shared0", f"{first}1", "shared1", f"{first}2"):
            x = graph.linear(x, weight, 8)
        graph.finish(y=x)
        return graph

    one, other, third = chain("one", "a"), chain("other", "b"), chain("third", "c")
    specs = {**one.specs, **other.specs, **third.specs}
    points = cut_points(specs, one.function, other.function, third.function)
    size = 2 * 8 * 8

    spans = partition(points, 4 * size)
    assert spans is not None
    assert sum(span.weight_bytes for span in spans) == 11 * size
    for span in spans:
        starts, stops = points.points[span.start], points.points[span.stop]
        shared = [
            {name for names in outline.needs[a:b] for name in names if name.startswith("shared")}
            for outline, a, b in zip(points.outlines, starts, stops, strict=True)
        ]
        assert shared[0] == shared[1] == shared[2]
    assert least_budget(points).weight_bytes == size


def test_functions_that_use_weights_in_another_order_share_a_chunk() -> None:
    def chain(name: str, order: str) -> GraphBuilder:
        graph = GraphBuilder(name)
        x = graph.input("x", 2, 8)
        for weight in order:
            x = graph.linear(x, weight, 8)
        graph.finish(y=x)
        return graph

    one, other = chain("one", "abcde"), chain("other", "acbde")
    points = cut_points(one.specs, one.function, other.function)
    least = least_budget(points)

    assert least.weight_bytes == 2 * 2 * 8 * 8
    assert points.heaviest(least).name in ("linear_default_1", "linear_default_2")
    assert partition(points, least.weight_bytes - 1) is None


def test_weights_used_at_different_places_stay_aligned() -> None:
    # `w` comes three times in one function and twice in the other.
    def chain(name: str, order: str) -> GraphBuilder:
        graph = GraphBuilder(name)
        x = graph.input("x", 2, 8)
        for weight in order:
            x = graph.linear(x, weight, 8)
        graph.finish(y=x)
        return graph

    one, other = chain("one", "wawbw"), chain("other", "wabw")
    points = cut_points(one.specs, one.function, other.function)
    for budget in range(100, 600, 64):
        spans = partition(points, budget)
        if spans is not None:
            assert Priced(points, path(spans)).aligned
    assert least_budget(points).weight_bytes == min(
        priced.largest
        for priced in (Priced(points, plan) for plan in all_plans(points))
        if priced.aligned
    )


def test_two_functions_of_seven_thousand_nodes_take_seconds() -> None:
    graph = residual_network(290, padding=19)
    other = varied(graph.function, 0)
    assert len(list(graph.function.graph.nodes)) > 7000
    start = time.process_time()
    points = cut_points(graph.specs, graph.function, other)
    spans = partition(points, 30 * BLOCK)
    seconds = time.process_time() - start

    print(f"{points.last} points, {len(spans or [])} chunks, {seconds:.2f} s")
    assert spans is not None
    assert len(spans) == 10
    assert seconds < 3


# ------------------------------------------------------------------ pace


def waiting(points: CutPoints, plan: tuple[int, ...], pace: Pace) -> int:
    """What reading or computing takes, whichever is more, in bytes read; added up over chunks."""
    priced = Priced(points, plan)
    total = 0
    for index, (start, stop) in enumerate(pairwise(plan)):
        computing = 0.0
        for which, outline in enumerate(points.outlines):
            begin, end = points.points[start][which], points.points[stop][which]
            nodes = [node for step in outline.liveness.steps[begin:end] for node in step]
            flops = sum(map(node_flops, nodes))
            computing += flops * pace.bytes_per_flop.get(outline.function.name, 0.0)
        size = sum(points.sizes[name] for name in priced.weights[index])
        total += int(max(pace.streamed * size, computing))
    return total


@pytest.mark.parametrize("functions", [1, 2])
def test_with_a_pace_reading_and_computing_are_balanced_as_well(functions: int) -> None:
    checked = moved = 0
    for seed in range(60):
        graph = random_graph(seed)
        variants = [graph.function]
        if functions == 2:
            variants.append(varied(graph.function, seed))
        points = cut_points(graph.specs, *variants)
        if not 2 < points.last <= 9:
            continue
        chance = random.Random(seed)
        pace = Pace(
            chance.choice([0.3, 1.0]), {"base": chance.choice([0.1, 0.5, 2.0]), "other": 0.1}
        )
        plans = {plan: Priced(points, plan) for plan in all_plans(points)}
        plans = {plan: priced for plan, priced in plans.items() if priced.aligned}
        least = min(priced.largest for priced in plans.values())
        whole = plans[0, points.last].largest
        for budget in {least, 2 * least, whole - 1} & set(range(whole)):
            costs = {
                plan: (priced.bytes[0] + waiting(points, plan, pace), priced.count)
                for plan, priced in plans.items()
                if priced.largest <= budget
            }
            if not costs:
                continue
            checked += 1
            spans = partition(points, budget, pace)
            assert spans is not None
            assert costs[path(spans)] == min(costs.values()), (seed, budget)
            moved += path(spans) != path(partition(points, budget) or [])
    assert checked > 20 and moved, (checked, moved)


def test_a_chunk_that_is_long_to_read_is_cut_where_much_is_computed() -> None:
    """Both cuts hand on as much; one of them leaves a chunk that is all reading."""
    graph = GraphBuilder()
    x = graph.input("x", 64, 8)
    little = graph.input("little", 1, 8)
    for index in range(2):
        x = graph.call(aten.add.Tensor, x, graph.linear(x, f"busy{index}", 8))
    for index in range(2):
        little = graph.call(aten.add.Tensor, little, graph.linear(little, f"idle{index}", 8))
    graph.finish(y=graph.linear(graph.call(aten.add.Tensor, x, little), "last", 8))
    points = cut_points(graph.specs, graph.function)
    size = 2 * 8 * 8
    rows = 2 * 64 * 8 * 8  # FLOPs of a linear on all rows

    # A busy layer is computed in the time in which two of them are read.
    pace = Pace(1.0, {"base": 2 * size / rows})
    spans = partition(points, 3 * size, pace)
    assert spans is not None
    for span in spans:
        assert {name[:4] for name in modules(points, span)} & {"busy", "last"}


def test_the_finest_cut_has_most_chunks() -> None:
    checked = 0
    for seed in range(40):
        graph = random_graph(seed)
        points = cut_points(graph.specs, graph.function, varied(graph.function, seed))
        if not 2 < points.last <= 9:
            continue
        checked += 1
        plans = [plan for plan in all_plans(points) if Priced(points, plan).aligned]
        assert len(finest(points)) == max(map(len, plans)) - 1
        assert path(finest(points)) in plans
    assert checked > 10
