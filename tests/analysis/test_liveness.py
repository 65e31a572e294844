"""Values alive between the steps of a function."""

from __future__ import annotations

import operator

import torch
from graph_builder import GraphBuilder

from odsora_compiler.analysis.liveness import liveness

aten = torch.ops.aten


def names(values: tuple) -> list[str]:
    return [value.node.name for value in values]


def test_a_residual_is_alive_until_it_is_added() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    first = graph.linear(x, "a", 8)
    hidden = graph.linear(first, "b", 32)
    back = graph.linear(hidden, "c", 8)
    added = graph.call(aten.add.Tensor, first, back)
    result = liveness(graph.finish(y=graph.call(aten.relu.default, added)))

    assert [names(values) for values in result.live] == [
        [],
        [first.name],
        [first.name, hidden.name],
        [first.name, back.name],
        [added.name],
        [],
    ]
    assert [result.crossing_bytes(p) for p in range(6)] == [0, 64, 64 + 256, 128, 64, 0]
    assert names(result.live_after(hidden)) == [first.name, hidden.name]


def test_inputs_weights_and_outputs_do_not_count() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    early = graph.linear(x, "a", 8)
    late = graph.linear(x, "b", 8)
    result = liveness(graph.finish(early=early, late=late))

    assert result.live == ((), (), ())


def test_parts_belong_to_the_step_that_makes_them() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    parts = graph.call(aten.split.Tensor, graph.linear(x, "a", 8), 4, -1)
    left = graph.call(operator.getitem, parts, 0)
    middle = graph.call(aten.relu.default, left)
    right = graph.call(operator.getitem, parts, 1)
    result = liveness(graph.finish(y=graph.call(aten.add.Tensor, middle, right)))

    assert [node.name for node in result.steps[1]] == [parts.name, left.name, right.name]
    assert names(result.live[2]) == [left.name, right.name]
    assert names(result.live[3]) == [right.name, middle.name]
    assert all(result.can_cut(position) for position in range(5))


def test_values_that_stay_in_one_piece_cannot_be_cut() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    parts = graph.call(aten.split.Tensor, graph.linear(x, "a", 8), 4, -1)
    result = liveness(graph.finish(y=graph.call(aten.cat.default, parts)))

    assert [result.can_cut(position) for position in range(4)] == [True, True, False, True]
    assert result.crossing_bytes(2) == 64


def test_nodes_left_out_are_never_alive() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    table = graph.call(aten.arange.default, 8)
    first = graph.call(aten.mul.Tensor, x, table)
    function = graph.finish(y=graph.call(aten.add.Tensor, first, table))

    assert names(liveness(function).live[1]) == [table.name]
    left_out = liveness(function, order=[n for n in function.operators() if n is not table])
    assert [names(values) for values in left_out.live] == [
        [],
        [first.name],
        [],
    ]
