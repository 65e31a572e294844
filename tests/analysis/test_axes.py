"""Axis analysis: cases worked by hand, and random chains held against index tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from odsora_compiler.analysis.axes import AxisAnalysis, Place, axis_names, dims_text
from odsora_compiler.analysis.axes_factors import size_of
from odsora_compiler.errors import UsageError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.weights import TensorWeights

aten = torch.ops.aten
Call = Callable[..., fx.Node]


def build(
    inputs: dict[str, tuple[tuple[int, ...], str | None]], body: Callable[..., fx.Node]
) -> tuple[Function, AxisAnalysis, fx.Node]:
    """A function of `inputs` (name → shape and axes); `body(call, *inputs)` gives its value."""
    function = Function("base")
    nodes = []
    for name, (shape, axes) in inputs.items():
        node = function.graph.placeholder(name)
        node.meta["val"] = fake_tensor(shape, torch.float32)
        if axes is not None:
            node.meta["axes"] = axes
        nodes.append(node)
    function.graph.output(()).meta["names"] = ("out",)
    editor = Editor(function, "")
    result = body(editor.call, *nodes)
    function.output_node.args = ((result,),)
    return function, axis_names(function), result


def text(inputs: dict[str, tuple[tuple[int, ...], str | None]], body: Any) -> str:
    """The axes of what `body` computes."""
    _, axes, result = build(inputs, body)
    assert not axes.conflicts
    return axes.text(result)


def sized(axes: AxisAnalysis, node: fx.Node) -> str:
    """The axes with their sizes; `_` for the name of an anonymous one."""
    words = [" ".join(f"{a.name or '_'}{a.size}" for a in p) or "1" for p in axes.dims(node)]
    return " ".join(f"({word})" if " " in word else word for word in words)


VIDEO = {"x": ((2, 6, 3, 4, 5), "b c t h w")}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([2, 6, 60], "b c (t h w)"),
        ([12, 12, 5], "(b c) (t h) w"),
        ([2, 2, 3, 3, 20], "b c:2 c:3 t (h w)"),
        ([2, 6, 3, 2, 2, 5], "b c t h:2 h:2 w"),
        ([-1], "(b c t h w)"),
        ([2, 1, 6, 3, 4, 1, 5], "b 1 c t h 1 w"),
    ],
)
def test_reshape(shape: list[int], expected: str) -> None:
    assert text(VIDEO, lambda call, x: call(aten.view.default, x, shape)) == expected


def test_reshape_across_axes_that_do_not_divide_is_not_guessed() -> None:
    got = text({"x": ((3, 4), "t h")}, lambda call, x: call(aten.view.default, x, [4, 3]))
    assert got == "4 3"


def test_find_gives_the_place_within_a_product() -> None:
    _, axes, result = build(VIDEO, lambda call, x: call(aten.view.default, x, [12, 60]))
    assert axes.find(result, "h") == Place(dim=1, outer=3, size=4, inner=5)
    assert axes.find(result, "c") == Place(dim=0, outer=2, size=6, inner=1)
    assert axes.find(result, "missing") is None


def test_permute_transpose_and_size_one_dimensions() -> None:
    def body(call: Call, x: fx.Node) -> fx.Node:
        x = call(aten.permute.default, x, [0, 2, -2, -1, 1])
        x = call(aten.transpose.int, x, 1, -1)
        return call(aten.squeeze.dim, call(aten.unsqueeze.default, x, 2), 2)

    assert text(VIDEO, body) == "b c h w t"


def test_expand_keeps_axes_and_makes_anonymous_ones() -> None:
    x = {"x": ((1, 3), "b t")}
    assert text(x, lambda call, x: call(aten.expand.default, x, [7, -1, 3])) == "7 1 t"


def test_an_axis_is_named_by_what_it_meets_later() -> None:
    """Text repeated for every frame turns out to be one copy a frame when frames attend to it."""

    def body(call: Call, x: fx.Node, y: fx.Node) -> fx.Node:
        nonlocal rows
        repeated = call(aten.expand.default, call(aten.unsqueeze.default, y, 1), [2, 3, 5, 6])
        rows = call(aten.view.default, repeated, [6, 5, 6])
        frames = call(aten.view.default, x, [6, 4, 6])
        return call(aten.bmm.default, frames, call(aten.transpose.int, rows, 1, 2))

    rows: Any = None
    inputs = {"x": ((2, 3, 4, 6), "b t s c"), "y": ((2, 5, 6), "b l c")}
    _, axes, scores = build(inputs, body)
    assert axes.text(scores) == "(b t) s l"
    assert axes.text(rows) == "(b t) l c"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 0, 60), "b2 (t3 h4 w5) c6"),
        ((1, 20, 60), "b2 (t2 h4 w5) c6"),
        ((1, 0, 20), "b2 (h4 w5) c6"),
        ((1, -20, 9223372036854775807), "b2 (h4 w5) c6"),
        ((1, 0, 30), "b2 _30 c6"),
        ((1, 10, 30), "b2 _20 c6"),
        ((2, 0, 6, 2), "b2 (t3 h4 w5) c3"),
        ((0, 0, 1), "1 (t3 h4 w5) c6"),
    ],
)
def test_slice(arguments: tuple[int, ...], expected: str) -> None:
    inputs = {"x": ((2, 60, 6), "b (t h w) c"), "z": ((3, 4), "t h")}
    _, axes, result = build(inputs, lambda call, x, z: call(aten.slice.Tensor, x, *arguments))
    assert sized(axes, result) == expected


def test_every_second_of_an_anonymous_axis_leaves_its_outer_part() -> None:
    """As in rotary embeddings that take even and odd features apart and stack them again."""

    def body(call: Call, x: fx.Node) -> fx.Node:
        even, odd = (call(aten.slice.Tensor, x, 1, start, 8, 2) for start in (0, 1))
        both = call(aten.stack.default, [odd, even], -1)
        return call(aten.add.Tensor, call(aten.view.default, both, [3, 8]), x)

    _, axes, result = build({"x": ((3, 8), "t _")}, body)
    assert not axes.conflicts
    assert axes.text(result) == "t (4 2)"


def test_split_and_getitem() -> None:
    def body(call: Call, x: fx.Node) -> fx.Node:
        parts = call(aten.split_with_sizes.default, x, [1, 2], 2)
        return call(operator.getitem, parts, 1)

    _, axes, result = build(VIDEO, body)
    assert sized(axes, result) == "b2 c6 t2 h4 w5"


def test_concatenation_adds_axes_of_one_name_and_skips_empty_tensors() -> None:
    def body(call: Call, x: fx.Node) -> fx.Node:
        empty = call(aten.slice.Tensor, x, 2, 0, 0)
        early = call(aten.slice.Tensor, x, 2, 0, 2)
        return call(aten.cat.default, [empty, x, early], 2)

    _, axes, result = build(VIDEO, body)
    assert sized(axes, result) == "b2 c6 t5 h4 w5"


def test_concatenation_of_different_axes_is_not_named() -> None:
    def body(call: Call, x: fx.Node, y: fx.Node) -> fx.Node:
        return call(aten.cat.default, [y, x], 1)

    inputs = {"x": ((2, 12, 6), "b (t s) c"), "y": ((2, 5, 6), "b l c"), "z": ((3,), "t")}
    _, axes, result = build(inputs, lambda call, x, y, z: body(call, x, y))
    assert sized(axes, result) == "b2 _17 c6"


def test_matmul_keeps_batch_rows_and_columns() -> None:
    def body(call: Call, x: fx.Node, y: fx.Node) -> fx.Node:
        return call(aten.matmul.default, x, y)

    inputs = {"x": ((2, 3, 4, 6), "b t s _"), "y": ((3, 6, 5), "_ c l")}
    _, axes, result = build(inputs, body)
    assert axes.text(result) == "b t s l"
    x, y = axes.function.placeholders
    assert axes.text(x) == "b t s c"
    assert axes.text(y) == "t c l"


def test_linear_channels_are_new_and_weights_name_nothing() -> None:
    """The same weight behind two inputs does not make their channels one."""

    def body(call: Call, x: fx.Node, y: fx.Node, weight: fx.Node) -> fx.Node:
        return call(
            aten.add.Tensor,
            call(aten.sum.dim_IntList, call(aten.linear.default, x, weight), [1]),
            call(aten.sum.dim_IntList, call(aten.linear.default, y, weight), [1]),
        )

    inputs = {"x": ((2, 3, 4), "b t c"), "y": ((2, 5, 4), "b l d"), "w": ((7, 4), None)}
    assert text(inputs, body) == "b 7"


def test_convolution_and_padding_derive_axes_of_the_same_name() -> None:
    def body(call: Call, x: fx.Node, weight: fx.Node) -> fx.Node:
        padded = call(aten.constant_pad_nd.default, x, [0, 1, 0, 0, 1, 0])
        return call(aten.conv3d.default, padded, weight, None, [1, 2, 2])

    _, axes, result = build(VIDEO | {"w": ((8, 6, 2, 2, 2), None)}, body)
    assert sized(axes, result) == "b2 _8 t3 h2 w3"


def test_attention_names_keys_values_and_scores() -> None:
    def body(call: Call, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node) -> fx.Node:
        return call(aten.scaled_dot_product_attention.default, q, k, v, mask)

    inputs = {
        "q": ((6, 2, 4, 8), "(b t) heads s _"),
        "k": ((6, 2, 5, 8), "_ _ l c"),
        "v": ((6, 2, 5, 3), "_ _ _ e"),
        "mask": ((6, 1, 4, 5), None),
        "t": ((3,), "t"),
    }
    _, axes, result = build(inputs, lambda call, q, k, v, mask, t: body(call, q, k, v, mask))
    _, k, v, mask, _ = axes.function.placeholders
    assert axes.text(result) == "(b t) heads s e"
    assert axes.text(k) == "(b t) heads l c"
    assert axes.text(v) == "(b t) heads l e"
    assert dims_text(axes.operand(result, mask)) == "(b t) 1 s l"


def test_einsum_repeat_and_reductions() -> None:
    def body(call: Call, x: fx.Node, y: fx.Node) -> fx.Node:
        x = call(aten.repeat.default, x, [1, 1, 2])
        x = call(aten.einsum.default, "btc,bl->tcl", [x, y])
        return call(aten.mean.dim, x, [0], True)

    assert text({"x": ((2, 3, 4), "b t c"), "y": ((2, 5), "b l")}, body) == "1 (2 c) l"


def test_one_table_serves_different_axes() -> None:
    """Rows and columns of a square frame add the same table; neither name sticks to it."""

    def body(call: Call, x: fx.Node) -> fx.Node:
        table = call(aten.arange.default, 4)
        x = call(aten.add.Tensor, x, table)
        return call(aten.add.Tensor, x, call(aten.unsqueeze.default, table, 1))

    _, axes, result = build({"x": ((4, 4, 4), "t h w")}, body)
    (table,) = axes.function.graph.find_nodes(op="call_function", target=aten.arange.default)
    add, unsqueeze = table.users
    assert not axes.conflicts
    assert axes.is_table(unsqueeze) and not axes.is_table(add)
    assert axes.text(table) == "4"
    assert dims_text(axes.operand(add, table)) == "w"
    # Through the unsqueeze, as the last addition sees it.
    naming = axes.naming(result, unsqueeze)
    assert dims_text(axes.operand(unsqueeze, table, naming)) == "h"


def test_operators_without_a_rule_give_anonymous_axes() -> None:
    got = text(VIDEO, lambda call, x: call(aten.rot90.default, x, 1, [3, 4]))
    assert got == "2 6 3 5 4"


def test_an_overload_that_the_rule_of_its_name_does_not_fit_is_not_guessed() -> None:
    got = text(VIDEO, lambda call, x: call(aten.max.other, x, x))
    assert got == "2 6 3 4 5"
    got = text(VIDEO, lambda call, x: call(operator.getitem, call(aten.max.dim, x, 1), 0))
    assert got == "b t h w"
    got = text(VIDEO, lambda call, x: call(operator.getitem, call(aten.sort.default, x, 1), 0))
    assert got == "2 6 3 4 5"


def test_axes_of_different_names_are_reported_and_kept_apart() -> None:
    _, axes, result = build(
        {"x": ((2, 3), "b t"), "y": ((2, 3), "b c")},
        lambda call, x, y: call(aten.add.Tensor, x, y),
    )
    assert axes.conflicts == [f"{result.name}: axis t meets axis c"]


def test_product_of_input_axes_needs_sizes_from_other_inputs() -> None:
    known = {"x": ((2, 12), "b (t s)"), "y": ((3,), "t")}
    _, axes, x = build(known, lambda call, x, y: call(aten.neg.default, x))
    assert sized(axes, x) == "b2 (t3 s4)"
    assert axes.sizes("t") == {3} and axes.sizes("s") == {4} and not axes.sizes("c")

    _, axes, x = build({"x": ((2, 12), "b (t s)")}, lambda call, x: call(aten.neg.default, x))
    assert sized(axes, x) == "b2 _12"
    assert axes.conflicts == [
        "input 'x': the sizes of (t s), 12 in all, are not given by other inputs"
    ]


def test_malformed_axes_are_refused() -> None:
    with pytest.raises(UsageError, match="names 2 dimensions"):
        build({"x": ((2, 3, 4), "b t")}, lambda call, x: x)


# ------------------------------------------------------------------ random chains

SIZES = {"b": 2, "t": 4, "h": 4, "w": 2, "c": 8}  # powers of two: reshapes always align

STEPS = ["permute", "transpose", "merge", "cut", "expand", "repeat", "interleave", "slice"]
STEPS += ["stride", "cat", "stack", "unbind", "select", "split", "table"]


@st.composite
def chains(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Operators by name with raw numbers, which `apply` makes fit the shape they meet."""
    names = st.sampled_from(STEPS)
    numbers = st.lists(st.integers(0, 1000), min_size=4, max_size=4)
    return draw(st.lists(st.tuples(names, numbers), min_size=1, max_size=9))


def apply(call: Call, x: fx.Node, step: str, numbers: list[int]) -> fx.Node:
    """One operator of a chain; x as it is where it would not fit or grow too large."""
    shape = list(x.meta["val"].shape)
    rank = len(shape)
    dim, other = numbers[0] % rank, numbers[1] % rank
    size = shape[dim]
    large = x.meta["val"].numel() > 8192 or rank > 7
    if step == "permute":
        order = sorted(range(rank), key=lambda index: (numbers[index % 4] * (index + 3)) % 17)
        return call(aten.permute.default, x, order)
    if step == "transpose":
        return call(aten.transpose.int, x, dim, other)
    if step == "merge" and dim + 1 < rank:
        merged = [*shape[:dim], size * shape[dim + 1], *shape[dim + 2 :]]
        return call(aten.view.default, x, merged)
    if step == "cut" and size % 2 == 0 and not large:
        inner = 2 if numbers[2] % 2 else size // 2
        return call(aten.view.default, x, [*shape[:dim], size // inner, inner, *shape[dim + 1 :]])
    if step == "expand" and not large:
        x = call(aten.unsqueeze.default, x, dim)
        return call(aten.expand.default, x, [*shape[:dim], 2, *shape[dim:]])
    if step == "repeat" and not large:
        return call(aten.repeat.default, x, [2 if i == dim else 1 for i in range(rank)])
    if step == "interleave" and not large:
        return call(aten.repeat_interleave.self_int, x, 2, dim)
    if step == "slice" and size % 2 == 0:
        start = (numbers[2] % 2) * size // 2
        return call(aten.slice.Tensor, x, dim, start, start + size // 2)
    if step == "stride" and size % 2 == 0:
        return call(aten.slice.Tensor, x, dim, numbers[2] % 2, size, 2)
    if step == "cat" and not large:
        return call(aten.cat.default, [x, x], dim)
    if step == "stack" and not large:
        return call(aten.stack.default, [x, x], dim)
    if step == "unbind" and rank > 1:
        return call(operator.getitem, call(aten.unbind.int, x, dim), numbers[2] % size)
    if step == "select" and rank > 1:
        return call(aten.select.int, x, dim, numbers[2] % size)
    if step == "split" and size % 2 == 0:
        parts = call(aten.split.Tensor, x, size // 2, dim)
        return call(operator.getitem, parts, numbers[2] % 2)
    if step == "table":
        return call(aten.mul.Tensor, x, call(aten.ones.default, shape[dim:]))
    return x


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_random_chains_agree_with_index_tensors(chain: list[tuple[str, list[int]]]) -> None:
    """Push each input axis's index through the real operators: it may vary along the places that
    the analysis gives that axis's name, and along no other, and must vary along a single one."""

    def body(call: Call, x: fx.Node) -> fx.Node:
        for step, numbers in chain:
            x = apply(call, x, step, numbers)
        return call(aten.mul.Tensor, x, 1.0)

    shape = tuple(SIZES.values())
    function, axes, result = build({"x": (shape, " ".join(SIZES))}, body)
    dims = axes.dims(result)
    assert not axes.conflicts
    sizes = [axis.size for product in dims for axis in product]
    names = [axis.name for product in dims for axis in product]
    assert [size_of(product) for product in dims] == list(result.meta["val"].shape)
    for position, (name, size) in enumerate(SIZES.items()):
        index = torch.arange(float(size)).view([-1 if i == position else 1 for i in range(5)])
        value = evaluate(function, TensorWeights({}), {"x": index.expand(shape).contiguous()})
        pushed = value["out"].reshape(sizes)
        for dim, found in enumerate(names):
            if found != name:
                # Along every other axis the index stays the same.
                first = pushed.narrow(dim, 0, 1)
                assert torch.equal(pushed, first.expand_as(pushed)), (axes.text(result), name)
        if names.count(name) == 1:
            values = pushed.movedim(names.index(name), 0).reshape(sizes[names.index(name)], -1)[
                :, 0
            ]
            repeats = any(step in ("cat", "repeat") for step, _ in chain)
            assert repeats or len(values.unique()) == len(values)
