"""Most bytes of a function's values in memory at once."""

from __future__ import annotations

import operator

import torch
from graph_builder import GraphBuilder

from odsora_compiler.analysis.footprint import activation_bytes

aten = torch.ops.aten


def test_a_residual_and_the_widest_value() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    first = graph.linear(x, "a", 8)
    hidden = graph.linear(first, "b", 32)
    active = graph.call(aten.relu.default, hidden)
    back = graph.linear(active, "c", 8)
    function = graph.finish(y=graph.call(aten.add.Tensor, first, back))
    # x and first of 16 numbers each, hidden and its relu of 64.
    assert activation_bytes(function, "fp16") == 2 * (16 + 16 + 64 + 64)
    assert activation_bytes(function, "fp32") == 4 * (16 + 16 + 64 + 64)


def test_values_are_freed_at_their_last_use_and_outputs_are_not() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 4, 4)
    early = graph.call(aten.relu.default, x)
    value = x
    for _ in range(10):
        value = graph.call(aten.tanh.default, value)
    one = graph.finish(y=value)
    assert activation_bytes(one, "fp32") == 4 * (16 + 2 * 16)
    both = graph.finish(early=early, y=value)
    assert activation_bytes(both, "fp32") == 4 * (16 + 16 + 2 * 16)


def test_a_reshape_takes_nothing_and_holds_what_it_shows() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 4, 4)
    made = graph.call(aten.relu.default, x)
    flat = graph.call(aten.view.default, made, [16])
    other = graph.call(aten.tanh.default, x)
    function = graph.finish(
        y=graph.call(aten.add.Tensor, graph.call(aten.view.default, other, [16]), flat)
    )
    assert activation_bytes(function, "fp32") == 4 * (16 * 4)


def test_parts_of_a_split_are_one_value() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 8)
    parts = graph.call(aten.split.Tensor, graph.call(aten.relu.default, x), 4, -1)
    left = graph.call(operator.getitem, parts, 0)
    right = graph.call(operator.getitem, parts, 1)
    function = graph.finish(y=graph.call(aten.add.Tensor, left, right))
    # x, the parts together, and either what they are parts of or their sum.
    assert activation_bytes(function, "fp32") == 4 * (16 + 16 + 16)


def test_logits_of_attention_count() -> None:
    graph = GraphBuilder()
    q, k, v = (graph.input(name, 1, 2, 64, 8) for name in "qkv")
    function = graph.finish(y=graph.call(aten.scaled_dot_product_attention.default, q, k, v))
    assert activation_bytes(function, "fp16") == 2 * (4 * 2 * 64 * 8 + 2 * 64 * 64)


def test_integers_keep_their_size() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 16, dtype=torch.int64)
    function = graph.finish(y=graph.call(aten.neg.default, x))
    assert activation_bytes(function, "fp16") == 8 * 32
