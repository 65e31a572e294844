"""What nodes cost: floating-point operations, and bytes in the precision of lowering.

FLOPs count a multiplication and an addition as two. Exact for contractions (linear, matrix
products, convolutions, attention, einsum); every other operator counts one an element, an estimate
good enough to tell cheap from dear. Nothing here measures time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import WeightStore

aten = torch.ops.aten

FLOAT_BYTES = {"fp16": 2, "fp32": 4}


def function_flops(function: Function) -> int:
    """FLOPs of one run of `function`."""
    return sum(node_flops(node) for node in function.operators())


def node_flops(node: fx.Node) -> int:
    """FLOPs of one run of `node`; 0 for inputs, weights and what only moves or makes numbers.

    Other operators count one for each element of their output, reductions one for each of their
    input.
    """
    if node.op != "call_function" or node.target in _MOVEMENT:
        return 0
    if is_contraction(node):
        return _CONTRACTIONS[node.target](node)
    elements = value_elements(node.meta["val"])
    if torch.Tag.reduction in getattr(node.target, "tags", ()):
        inputs = (value_elements(used.meta["val"]) for used in node.all_input_nodes)
        elements = max([elements, *inputs])
    return elements


def is_contraction(node: fx.Node) -> bool:
    """Whether `node` multiplies and sums: matrix products, convolutions, attention."""
    return node.target in _CONTRACTIONS


def value_elements(value: Any) -> int:
    """Numbers in all tensors of `value` (a tensor or a tree of them)."""
    return sum(t.numel() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def value_bytes(value: Any, precision: str) -> int:
    """Bytes of `value` (a tensor or a tree of them) once lowered.

    Floating-point numbers take 2 (`"fp16"`) or 4 bytes (`"fp32"`), others their own size.
    """
    return sum(
        t.numel() * _element_bytes(t.dtype, precision)
        for t in pytree.tree_leaves(value)
        if isinstance(t, torch.Tensor)
    )


def weight_bytes(weights: WeightStore, name: str, precision: str) -> int:
    """Bytes of the weight `name` once lowered; of a compressed one, its indices and tables."""
    spec = weights.spec(name)
    table = weights.encoding(name)
    if table is None:
        return spec.elements * _element_bytes(spec.dtype, precision)
    indices = math.ceil(spec.elements * table.bits / 8)
    return indices + table.table.numel() * FLOAT_BYTES[precision]


def _element_bytes(dtype: torch.dtype, precision: str) -> int:
    return FLOAT_BYTES[precision] if dtype.is_floating_point else dtype.itemsize


# ------------------------------------------------------------------ contractions


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(argument.meta["val"].shape)


def _linear(node: fx.Node) -> int:
    outputs = value_elements(node.meta["val"])
    bias = outputs if _argument(node, 2, "bias") is not None else 0
    return 2 * outputs * _shape(node.args[0])[-1] + bias


def _product(first: int, added: bool) -> Callable[[fx.Node], int]:
    """A matrix product whose left factor is argument `first`; `added`: plus another tensor."""

    def flops(node: fx.Node) -> int:
        outputs = value_elements(node.meta["val"])
        return 2 * outputs * _shape(node.args[first])[-1] + (outputs if added else 0)

    return flops


def _convolution(node: fx.Node) -> int:
    if node.target is aten.convolution.default and _argument(node, 6, "transposed"):
        return _transposed_convolution(node)
    outputs = value_elements(node.meta["val"])
    bias = outputs if _argument(node, 2, "bias") is not None else 0
    return 2 * outputs * math.prod(_shape(node.args[1])[1:]) + bias


def _transposed_convolution(node: fx.Node) -> int:
    inputs = math.prod(_shape(node.args[0]))
    bias = value_elements(node.meta["val"]) if _argument(node, 2, "bias") is not None else 0
    return 2 * inputs * math.prod(_shape(node.args[1])[1:]) + bias


def _attention(node: fx.Node) -> int:
    """Both matrix products, and one for each logit (the softmax)."""
    query, key, value = (_shape(node.args[index]) for index in range(3))
    logits = math.prod(query[:-1]) * key[-2]
    return 2 * logits * (query[-1] + value[-1]) + logits


def _einsum(node: fx.Node) -> int:
    """Operands are contracted two at a time from the left, as PyTorch does it."""
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    terms, result = _einsum_terms(equation, [_shape(operand) for operand in operands])
    flops = 0
    sizes = terms[0]
    for index, term in enumerate(terms[1:], start=2):
        joined = {**term, **{key: max(size, term.get(key, 1)) for key, size in sizes.items()}}
        later = {key for other in terms[index:] for key in other} | result
        sizes = {key: size for key, size in joined.items() if key in later}
        flops += math.prod(joined.values()) * (2 if len(sizes) < len(joined) else 1)
    return flops or math.prod(terms[0].values())


def _einsum_terms(
    equation: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[dict[str, int]], set[str]]:
    """Per operand, index → size, and the indices of the result. `...` gives indices of digits."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    for text, shape in zip(left.split(","), shapes, strict=True):
        before, dots, after = text.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        # Ellipses of several operands broadcast from their last dimension.
        keys = [*before, *(str(hidden - 1 - i) for i in range(hidden)), *after]
        terms.append(dict(zip(keys, shape, strict=True)))
    every = [key for term in terms for key in term]
    if arrow:
        kept = set(right.replace(".", "")) | {key for key in every if key.isdigit()}
    else:
        kept = {key for key in every if key.isdigit() or every.count(key) == 1}
    return terms, kept


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


_CONTRACTIONS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.mm.default: _product(0, added=False),
    aten.bmm.default: _product(0, added=False),
    aten.matmul.default: _product(0, added=False),
    aten.mv.default: _product(0, added=False),
    aten.dot.default: _product(0, added=False),
    aten.addmm.default: _product(1, added=True),
    aten.baddbmm.default: _product(1, added=True),
    aten.conv1d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv3d.padding: _convolution,
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: _einsum,
}

# Operators whose result needs no memory of its own: the same numbers in the same order.
SAME_MEMORY: set[Any] = {
    operator.getitem,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
}

# Operators that arrange, copy or make numbers without computing any.
_MOVEMENT: set[Any] = {
    *SAME_MEMORY,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    aten.stack.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.roll.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.clone.default,
    aten.copy.default,
    aten._to_copy.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
}
