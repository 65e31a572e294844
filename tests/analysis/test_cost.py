"""FLOPs of nodes, held against PyTorch's own counter, and bytes in the precision of lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_builder import GraphBuilder
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from odsora_compiler.analysis.cost import (
    function_flops,
    is_contraction,
    node_flops,
    value_bytes,
    weight_bytes,
)
from odsora_compiler.ir.weights import EncodedWeights, LookupTable, TensorWeights

aten = torch.ops.aten


def built(target: Any, shapes: list[tuple[int, ...]], *rest: Any, **kwargs: Any) -> fx.Node:
    graph = GraphBuilder()
    inputs = [graph.input(f"x{index}", *shape) for index, shape in enumerate(shapes)]
    return graph.call(target, *inputs, *rest, **kwargs)


def counted(run: Callable[..., Any], shapes: list[tuple[int, ...]]) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*(torch.zeros(shape) for shape in shapes))
    return counter.get_total_flops()


CONTRACTIONS: list[tuple[Any, Any, list[tuple[int, ...]], tuple[Any, ...]]] = [
    (aten.linear.default, F.linear, [(2, 5, 8), (6, 8)], ()),
    (aten.mm.default, torch.mm, [(3, 4), (4, 5)], ()),
    (aten.bmm.default, torch.bmm, [(2, 3, 4), (2, 4, 5)], ()),
    (aten.matmul.default, torch.matmul, [(2, 3, 4, 5), (5, 6)], ()),
    (aten.conv1d.default, F.conv1d, [(2, 4, 9), (6, 4, 3)], (None, [2])),
    (
        aten.conv2d.default,
        F.conv2d,
        [(2, 4, 9, 7), (6, 2, 3, 3)],
        (None, [1, 1], [1, 1], [1, 1], 2),
    ),
    (aten.conv3d.default, F.conv3d, [(1, 4, 3, 8, 8), (6, 4, 1, 2, 2)], (None, [1, 2, 2])),
    (aten.conv_transpose1d.default, F.conv_transpose1d, [(2, 4, 5), (4, 3, 4)], (None, [2])),
    (aten.conv_transpose2d.input, F.conv_transpose2d, [(2, 4, 5, 5), (4, 3, 4, 4)], (None, [2, 2])),
    (aten.conv_transpose3d.input, F.conv_transpose3d, [(1, 4, 3, 3, 3), (4, 2, 2, 2, 2)], ()),
]


@pytest.mark.parametrize(
    ("target", "run", "shapes", "rest"), CONTRACTIONS, ids=lambda item: str(item)[:30]
)
def test_contractions_count_as_pytorch_counts_them(
    target: Any, run: Any, shapes: list[tuple[int, ...]], rest: tuple[Any, ...]
) -> None:
    node = built(target, shapes, *rest)

    assert is_contraction(node)
    assert node_flops(node) == counted(lambda *x: run(*x, *rest), shapes) > 0


def test_attention_counts_both_products_and_the_softmax() -> None:
    shapes = [(2, 4, 10, 8), (2, 4, 7, 8), (2, 4, 7, 6)]
    node = built(aten.scaled_dot_product_attention.default, shapes)
    logits = 2 * 4 * 10 * 7

    assert node_flops(node) == 2 * logits * 8 + 2 * logits * 6 + logits


def test_a_bias_adds_one_an_output() -> None:
    shapes = [(2, 5, 8), (6, 8), (6,)]
    assert node_flops(built(aten.linear.default, shapes)) == 2 * 60 * 8 + 60
    shapes = [(3, 5), (3, 4), (4, 5)]
    assert node_flops(built(aten.addmm.default, shapes)) == 2 * 15 * 4 + 15
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4, 5)]
    assert node_flops(built(aten.baddbmm.default, shapes)) == 2 * 30 * 4 + 30
    shapes = [(1, 4, 8, 8), (6, 4, 3, 3), (6,)]
    assert node_flops(built(aten.conv2d.default, shapes)) == 2 * 216 * 36 + 216
    shapes = [(1, 4, 3, 3), (4, 6, 2, 2), (6,)]
    assert node_flops(built(aten.conv_transpose2d.input, shapes)) == 2 * 36 * 24 + 96


@pytest.mark.parametrize("transposed", [False, True])
def test_the_general_convolution_counts_like_the_special_one(transposed: bool) -> None:
    shapes = [(2, 4, 9), (4, 4, 3)]
    rest = (None, [2], [0], [1], transposed, [0], 1)
    special = F.conv_transpose1d if transposed else F.conv1d
    node = built(aten.convolution.default, shapes, *rest)

    assert node_flops(node) == counted(lambda x, w: special(x, w, stride=2), shapes)


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("bqd,bkd->bqk", [(2, 3, 5), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        ("...d,de->...e", [(2, 3, 5), (5, 4)], 2 * 2 * 3 * 5 * 4),
        ("i,j->ij", [(3,), (4,)], 12),
        ("ij->i", [(3, 4)], 12),
        ("ij,jk", [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], 2 * 2 * 3 * 4 + 2 * 2 * 4 * 5),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]], flops: int) -> None:
    graph = GraphBuilder()
    operands = [graph.input(f"x{index}", *shape) for index, shape in enumerate(shapes)]

    assert node_flops(graph.call(aten.einsum.default, equation, operands)) == flops


def test_other_operators_count_elements_and_movement_is_free() -> None:
    graph = GraphBuilder()
    x = graph.input("x", 2, 3, 4)
    gelu = graph.call(aten.gelu.default, x, approximate="tanh")
    mean = graph.call(aten.mean.dim, gelu, [-1], True)
    view = graph.call(aten.view.default, mean, [6])
    function = graph.finish(y=view)

    assert [node_flops(node) for node in (x, gelu, mean, view)] == [0, 24, 24, 0]
    assert function_flops(function) == 48
    assert not is_contraction(gelu)


def test_bytes_follow_the_precision_of_lowering() -> None:
    numbers, flags = torch.zeros(3, 4), torch.zeros(5, dtype=torch.bool)
    counts = torch.zeros(2, dtype=torch.int32)

    assert value_bytes(numbers, "fp16") == 24
    assert value_bytes(numbers, "fp32") == 48
    assert value_bytes((numbers, [flags, counts]), "fp16") == 24 + 5 + 8


def test_a_compressed_weight_counts_indices_and_tables() -> None:
    dense = TensorWeights({"a": torch.zeros(6, 10), "n": torch.zeros(4, dtype=torch.int8)})
    table = LookupTable(4, torch.zeros(6, 10, dtype=torch.uint8), torch.zeros(2, 16))
    weights = EncodedWeights(dense, {"a": table})

    assert weight_bytes(dense, "a", "fp16") == 120
    assert weight_bytes(weights, "a", "fp16") == 30 + 2 * 16 * 2
    assert weight_bytes(weights, "a", "fp32") == 30 + 2 * 16 * 4
    assert weight_bytes(weights, "n", "fp16") == 4
