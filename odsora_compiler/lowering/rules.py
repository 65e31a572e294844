"""The legalization rules: what is rewritten because coremltools drops, refuses or loses it.

A rule keeps the function's values; the graph stays ordinary ATen that PyTorch can run. Facts about
coremltools are those of version 9.0's torch.export front end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.edit import Editor
from odsora_compiler.lowering.high_rank import (
    is_high_rank_permutation,
    is_view_of_high_rank_view,
    merge_views,
    permute_in_low_rank,
)
from odsora_compiler.rewrite.rules import Rule

aten = torch.ops.aten

# What stands for minus infinity in half precision, as in coremltools: attention scores of ordinary
# size can be added without an overflow, and exp() of it is zero.
HALF_MASK = 3e4
HALF_MAX = 65504.0


# ------------------------------------------------------------------ arguments by keyword


def _has_keyword_for_positional(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.kwargs:
        return False
    return any(a.name in node.kwargs and not a.kwarg_only for a in schema.arguments)


def _make_positional(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    named: dict[str, Any] = dict(node.kwargs)
    args = list(node.args)
    positional = [a for a in target._schema.arguments if not a.kwarg_only]
    for argument in positional[len(args) :]:
        if not any(a.name in named for a in positional[len(args) :]):
            break
        default = argument.default_value if argument.has_default_value() else None
        args.append(named.pop(argument.name, default))
    return editor.call(target, *args, **named)


# ------------------------------------------------------------------ arithmetic


def _is_tanh_gelu(node: fx.Node) -> bool:
    return node.kwargs.get("approximate", "none") == "tanh"


def _spell_out_tanh_gelu(editor: Editor, node: fx.Node) -> fx.Node:
    x = node.args[0]
    cube = editor.call(aten.pow.Tensor_Scalar, x, 3)
    inner = editor.call(aten.add.Tensor, x, editor.call(aten.mul.Tensor, cube, 0.044715))
    scaled = editor.call(aten.mul.Tensor, inner, math.sqrt(2 / math.pi))
    shifted = editor.call(aten.add.Tensor, editor.call(aten.tanh.default, scaled), 1)
    return editor.call(aten.mul.Tensor, editor.call(aten.mul.Tensor, x, 0.5), shifted)


def _alpha(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)


def _has_alpha(node: fx.Node) -> bool:
    return _alpha(node) != 1


def _multiply_by_alpha(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    x, y, alpha = node.args[0], node.args[1], _alpha(node)
    if target in (aten.rsub.Tensor, aten.rsub.Scalar):
        # rsub(x, y, alpha) is y − alpha·x.
        return editor.call(target, editor.call(aten.mul.Tensor, x, alpha), y)
    if isinstance(y, fx.Node):
        return editor.call(target, x, editor.call(aten.mul.Tensor, y, alpha))
    return editor.call(target, x, y * alpha)


def _factors(node: fx.Node) -> tuple[Any, Any]:
    return node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)


def _has_factors(node: fx.Node) -> bool:
    return _factors(node) != (1, 1)


def _multiply_by_factors(editor: Editor, node: fx.Node) -> fx.Node:
    x, *matrices = node.args
    beta, alpha = _factors(node)
    product = editor.call(aten.matmul.default, *matrices)
    if alpha != 1:
        product = editor.call(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    return editor.call(aten.add.Tensor, product, editor.call(aten.mul.Tensor, x, beta))


def _spell_out_addcmul(editor: Editor, node: fx.Node) -> fx.Node:
    x, y, z = node.args[:3]
    product = editor.call(aten.mul.Tensor, y, z)
    value = node.kwargs.get("value", 1)
    if value != 1:
        product = editor.call(aten.mul.Tensor, product, value)
    return editor.call(aten.add.Tensor, x, product)


def _spell_out_rms_norm(editor: Editor, node: fx.Node) -> fx.Node:
    args = [*node.args, None, None][:4]
    x, shape, weight, eps = args
    assert isinstance(x, fx.Node) and isinstance(shape, (list, tuple))
    eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    square = editor.call(aten.mul.Tensor, x, x)
    mean = editor.call(aten.mean.dim, square, [i - len(shape) for i in range(len(shape))], True)
    scale = editor.call(aten.rsqrt.default, editor.call(aten.add.Tensor, mean, eps))
    normed = editor.call(aten.mul.Tensor, x, scale)
    return normed if weight is None else editor.call(aten.mul.Tensor, normed, weight)


def _normalise_groups_as_layers(editor: Editor, node: fx.Node) -> fx.Node:
    given = dict(zip(("x", "groups", "weight", "bias", "eps"), node.args, strict=False))
    x, groups, weight, bias = (given.get(name) for name in ("x", "groups", "weight", "bias"))
    eps = given.get("eps", 1e-5)
    assert isinstance(x, fx.Node) and isinstance(groups, int)
    shape = list(x.meta["val"].shape)
    each = math.prod(shape[1:]) // groups
    rows = editor.call(aten.view.default, x, [shape[0], groups, each])
    normed = editor.call(aten.layer_norm.default, rows, [each], None, None, eps)
    out = editor.call(aten.view.default, normed, shape)
    channels = [shape[1]] + [1] * (len(shape) - 2)
    if weight is not None:
        factor = editor.call(aten.view.default, weight, channels)
        out = editor.call(aten.mul.Tensor, out, factor)
    if bias is not None:
        out = editor.call(aten.add.Tensor, out, editor.call(aten.view.default, bias, channels))
    return out


def _divide_one(editor: Editor, node: fx.Node) -> fx.Node:
    one = editor.call(aten.full.default, [], 1.0, dtype=node.meta["val"].dtype)
    return editor.call(aten.div.Tensor, one, node.args[0])


def _spell_out_log_softmax(editor: Editor, node: fx.Node) -> fx.Node:
    x, dim = node.args[:2]
    assert isinstance(x, fx.Node)
    dtype = node.meta["val"].dtype
    if x.meta["val"].dtype != dtype:
        x = _cast(editor, x, dtype)
    return editor.call(aten.sub.Tensor, x, editor.call(aten.logsumexp.default, x, [dim], True))


# ------------------------------------------------------------------ einsum


def _terms(node: fx.Node) -> tuple[list[str], str] | None:
    """Letters of the operands and of the result, `...` spelt as letters; None if not plain."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(operands):
        return None
    spare = "".join(chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in left)
    if "..." in left:
        ranks = [
            operand.meta["val"].dim() - len(term.replace("...", ""))
            for term, operand in zip(terms, operands, strict=True)
            if "..." in term
        ]
        width = max(ranks)
        if width > len(spare):
            return None
        batch = iter(ranks)
        terms = [
            term.replace("...", spare[width - next(batch) : width]) if "..." in term else term
            for term in terms
        ]
        right = right.replace("...", spare[:width])
    return terms, right


def _is_outer_product(node: fx.Node) -> bool:
    parsed = _terms(node)
    if parsed is None:
        return False
    terms, right = parsed
    letters = set("".join(terms))
    return (
        len(terms) > 1
        and letters == set(right)
        and len(right) == len(letters)
        and all(len(set(term)) == len(term) for term in terms)
    )


def _multiply_broadcast(editor: Editor, node: fx.Node) -> fx.Node:
    parsed = _terms(node)
    assert parsed is not None
    terms, right = parsed
    operands: Any = node.args[1]
    product = None
    for term, operand in zip(terms, operands, strict=True):
        order = [term.index(letter) for letter in right if letter in term]
        if order != list(range(len(order))):
            operand = editor.call(aten.permute.default, operand, order)
        for position, letter in enumerate(right):
            if letter not in term:
                operand = editor.call(aten.unsqueeze.default, operand, position)
        product = operand if product is None else editor.call(aten.mul.Tensor, product, operand)
    assert product is not None
    return product


# ------------------------------------------------------------------ dtypes


def _mixes_dtypes(node: fx.Node) -> bool:
    tensors: Any = node.args[0]
    return len({tensor.meta["val"].dtype for tensor in tensors}) > 1


def _cast_to_common(editor: Editor, node: fx.Node) -> fx.Node:
    tensors: Any = node.args[0]
    target: Any = node.target
    dtype = node.meta["val"].dtype
    cast = [
        tensor if tensor.meta["val"].dtype == dtype else _cast(editor, tensor, dtype)
        for tensor in tensors
    ]
    return editor.call(target, cast, *node.args[1:])


def _cast(editor: Editor, tensor: Any, dtype: torch.dtype) -> fx.Node:
    return editor.call(aten._to_copy.default, tensor, dtype=dtype)


def _searches_everywhere(node: fx.Node) -> bool:
    return len(node.args) < 2 or node.args[1] is None


def _search_flat(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    shape = list(node.meta["val"].shape)
    found = editor.call(target, editor.call(aten.view.default, node.args[0], [-1]), 0)
    return editor.call(aten.view.default, found, shape) if shape else found


def _reduces_in_other_dtype(node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x.meta["val"].dtype != node.meta["val"].dtype


def _cast_then_reduce(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    x = _cast(editor, node.args[0], node.meta["val"].dtype)
    return editor.call(target, x, *node.args[1:], **kwargs)


# ------------------------------------------------------------------ tensors of one value


def _fill_value(node: fx.Node) -> float | bool:
    return _FILLS[node.target](node)


_FILLS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.new_ones.default: lambda node: 1,
    aten.ones.default: lambda node: 1,
    aten.ones_like.default: lambda node: 1,
    aten.new_zeros.default: lambda node: 0,
    aten.zeros.default: lambda node: 0,
    aten.zeros_like.default: lambda node: 0,
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
}


def _is_large_fill(node: fx.Node) -> bool:
    return not (node.target is aten.full.default and node.meta["val"].numel() == 1)


def _expand_one_value(editor: Editor, node: fx.Node) -> fx.Node:
    value = node.meta["val"]
    ones = [1] * value.dim()
    one = editor.call(aten.full.default, ones, _fill_value(node), dtype=value.dtype)
    return editor.call(aten.expand.default, one, list(value.shape)) if value.dim() else one


def _choose_from_tensors(editor: Editor, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype

    def tensor(value: Any) -> fx.Node:
        if not isinstance(value, fx.Node):
            return editor.call(aten.full.default, [1], value, dtype=dtype)
        return value if value.meta["val"].dtype == dtype else _cast(editor, value, dtype)

    condition, one, other = node.args
    chosen = editor.call(aten.where.self, condition, tensor(one), tensor(other))
    shape = list(node.meta["val"].shape)
    return chosen if shape else editor.call(aten.view.default, chosen, shape)


# ------------------------------------------------------------------ operators by other names

_LOGIC: dict[Any, Any] = {
    aten.__and__.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.__xor__.Tensor: aten.logical_xor.default,
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.bitwise_xor.Tensor: aten.logical_xor.default,
}


def _is_on_flags(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _call_logic(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(_LOGIC[node.target], *node.args)


def _has_default_stride(node: fx.Node) -> bool:
    return len(node.args) < 3 or not node.args[2]


def _spell_out_stride(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    x, kernel = node.args[:2]
    return editor.call(target, x, kernel, kernel, *node.args[3:])


# ------------------------------------------------------------------ attention


def _head_size(node: fx.Node) -> int:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    return int(query.meta["val"].shape[-1])


def _has_scale(node: fx.Node) -> bool:
    return node.kwargs.get("scale") is not None


def _scale_the_query(editor: Editor, node: fx.Node) -> fx.Node:
    kwargs: dict[str, Any] = dict(node.kwargs)
    scale: Any = kwargs.pop("scale")
    query: Any = node.args[0]
    factor = scale * math.sqrt(_head_size(node))
    if not math.isclose(factor, 1, rel_tol=1e-7):
        query = editor.call(aten.mul.Tensor, query, factor)
    target: Any = node.target
    return editor.call(target, query, *node.args[1:], **kwargs)


def _groups_queries(node: fx.Node) -> bool:
    return bool(node.kwargs.get("enable_gqa", False))


def _repeat_keys(editor: Editor, node: fx.Node) -> fx.Node:
    query, key, value, *rest = node.args
    assert isinstance(query, fx.Node)
    heads = query.meta["val"].shape[-3]

    def repeat(x: Any) -> Any:
        *batch, own, tokens, size = x.meta["val"].shape
        if own == heads:
            return x
        folded = editor.call(aten.view.default, x, [-1, own, 1, tokens * size])
        wide = editor.call(aten.expand.default, folded, [-1, own, heads // own, tokens * size])
        return editor.call(aten.view.default, wide, [*batch, heads, tokens, size])

    kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}
    target: Any = node.target
    return editor.call(target, query, repeat(key), repeat(value), *rest, **kwargs)


# ------------------------------------------------------------------ half precision

# Operator → positions of the arguments that may be a mask's fill value.
_MASK_FILLS: dict[Any, tuple[int, ...]] = {
    aten.masked_fill.Scalar: (2,),
    aten.mul.Tensor: (1,),
    aten.mul.Scalar: (1,),
    aten.full.default: (1,),
}


def _is_too_negative(value: Any) -> bool:
    return isinstance(value, (int, float)) and value < -HALF_MAX


def _fills_beyond_half(node: fx.Node) -> bool:
    places = (place for place in _MASK_FILLS[node.target] if place < len(node.args))
    return node.meta["val"].dtype.is_floating_point and any(
        _is_too_negative(node.args[place]) for place in places
    )


def _fill_within_half(editor: Editor, node: fx.Node) -> fx.Node:
    target: Any = node.target
    args = [
        -HALF_MASK if place in _MASK_FILLS[target] and _is_too_negative(arg) else arg
        for place, arg in enumerate(node.args)
    ]
    kwargs: dict[str, Any] = dict(node.kwargs)
    return editor.call(target, *args, **kwargs)


def _rule(
    name: str,
    why: str,
    targets: set[Any],
    check: Callable[[fx.Node], bool],
    rewrite: Callable[[Editor, fx.Node], fx.Node],
) -> Rule:
    return Rule(name, why, frozenset(targets), check, rewrite)


_SDPA = aten.scaled_dot_product_attention.default

DEFAULT_RULES: tuple[Rule, ...] = (
    _rule(
        "positional",
        "many converters read positional arguments only",
        set(),
        _has_keyword_for_positional,
        _make_positional,
    ),
    _rule(
        "tanh-gelu",
        "the front end drops `approximate`; Core ML's own operation is fused back from this form",
        {aten.gelu.default},
        _is_tanh_gelu,
        _spell_out_tanh_gelu,
    ),
    _rule(
        "alpha",
        "the front end drops `alpha`",
        {
            aten.add.Tensor,
            aten.add.Scalar,
            aten.sub.Tensor,
            aten.sub.Scalar,
            aten.rsub.Tensor,
            aten.rsub.Scalar,
        },
        _has_alpha,
        _multiply_by_alpha,
    ),
    _rule(
        "matrix-factors",
        "the front end multiplies by whole factors only",
        {aten.addmm.default, aten.baddbmm.default},
        _has_factors,
        _multiply_by_factors,
    ),
    _rule(
        "addcmul",
        "the front end does not know it",
        {aten.addcmul.default},
        lambda node: True,
        _spell_out_addcmul,
    ),
    _rule(
        "rms-norm",
        "the front end takes it with all four arguments only",
        {aten.rms_norm.default},
        lambda node: True,
        _spell_out_rms_norm,
    ),
    _rule(
        "group-norm",
        "the front end squares deviations, which overflow half precision beyond 255, and splits "
        "the channels, which makes rank 6 of a video",
        {aten.group_norm.default},
        lambda node: True,
        _normalise_groups_as_layers,
    ),
    _rule(
        "reciprocal",
        "Core ML's own operation adds 1e-4 to its operand",
        {aten.reciprocal.default},
        lambda node: True,
        _divide_one,
    ),
    _rule(
        "log-softmax",
        "the front end takes the logarithm of a softmax, which is infinite where that is zero",
        {aten.log_softmax.int},
        lambda node: True,
        _spell_out_log_softmax,
    ),
    _rule(
        "outer-einsum",
        "the front end fails on the transpose of an outer product",
        {aten.einsum.default},
        _is_outer_product,
        _multiply_broadcast,
    ),
    _rule(
        "common-dtype",
        "stack and concat of different dtypes are refused",
        {aten.stack.default, aten.cat.default},
        _mixes_dtypes,
        _cast_to_common,
    ),
    _rule(
        "reduce-dtype",
        "the front end drops `dtype` and cannot sum booleans",
        {
            aten.sum.default,
            aten.sum.dim_IntList,
            aten.mean.default,
            aten.mean.dim,
            aten.cumprod.default,
        },
        _reduces_in_other_dtype,
        _cast_then_reduce,
    ),
    _rule(
        "search-everywhere",
        "without a dimension, the front end searches the last one",
        {aten.argmax.default, aten.argmin.default},
        _searches_everywhere,
        _search_flat,
    ),
    _rule(
        "fill",
        "some are unknown to the front end, and a constant of full size would be stored",
        set(_FILLS),
        _is_large_fill,
        _expand_one_value,
    ),
    _rule(
        "where-number",
        "the front end chooses between tensors only",
        {aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar},
        lambda node: True,
        _choose_from_tensors,
    ),
    _rule(
        "logic",
        "the front end knows them by another name",
        set(_LOGIC),
        _is_on_flags,
        _call_logic,
    ),
    _rule(
        "pool-stride",
        "the front end takes max pooling with a stride only",
        {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default},
        _has_default_stride,
        _spell_out_stride,
    ),
    _rule(
        "high-rank-permute",
        "Core ML has no tensors of rank above 5",
        {aten.permute.default, aten.transpose.int},
        is_high_rank_permutation,
        permute_in_low_rank,
    ),
    _rule(
        "high-rank-view",
        "Core ML has no tensors of rank above 5",
        {aten.view.default},
        is_view_of_high_rank_view,
        merge_views,
    ),
    _rule(
        "sdpa-scale",
        "Core ML's fused attention has no scale; with one, the front end takes it apart",
        {_SDPA},
        _has_scale,
        _scale_the_query,
    ),
    _rule(
        "sdpa-groups",
        "the front end drops `enable_gqa`",
        {_SDPA},
        _groups_queries,
        _repeat_keys,
    ),
)

# Only for half precision: they change values, of masks, that half precision does not have.
HALF_RULES: tuple[Rule, ...] = (
    _rule(
        "half-mask",
        "masked scores become -inf in half precision, and NaN where a whole row is masked",
        set(_MASK_FILLS),
        _fills_beyond_half,
        _fill_within_half,
    ),
)
