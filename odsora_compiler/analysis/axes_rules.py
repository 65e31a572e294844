"""What each ATen operator does to the dimensions of its operands: the rule table of axis analysis.

A rule takes a `Visit` and returns the dimensions of the operator's value (a list of them for an
operator with several). An operator without a rule gets new anonymous axes: nothing is guessed. The
same goes for a rule that returns None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from odsora_compiler.analysis.arguments import operator_name
from odsora_compiler.analysis.axes_factors import (
    Dims,
    Product,
    derived,
    fresh,
    fresh_dims,
    leaves,
    regroup,
    size_of,
    split,
)


@dataclass
class Visit:
    """One operator being visited.

    `operand(node)`: dimensions of an operand as this operator sees them. `unify(a, b)`: let two
    dimensions be the same; sizes must be equal.
    """

    node: fx.Node
    arguments: dict[str, Any]
    operand: Callable[[fx.Node], Dims]
    unify: Callable[[Product, Product], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.node)

    @property
    def first(self) -> fx.Node:
        """The operand that the operator works on."""
        value = next(iter(self.arguments.values()))
        assert isinstance(value, fx.Node)
        return value

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """The argument `name` as a dimension counted from the left."""
        rank = len(shape_of(self.first)) if rank is None else rank
        value = self.arguments[name]
        assert isinstance(value, int)
        return value % rank if rank else 0


Rule = Callable[[Visit], Dims | list[Dims] | None]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's one tensor."""
    return tuple(node.meta["val"].shape)


def propagate(visit: Visit) -> Dims | list[Dims]:
    """Dimensions of the visited operator's value."""
    value = visit.node.meta["val"]
    rule = rule_for(visit.node)
    result = rule(visit) if rule is not None else None
    if isinstance(value, torch.Tensor):
        return result if _fits(result, value) else fresh_dims(value.shape)
    if isinstance(result, list) and all(map(_fits, result, value)):
        return result
    return [fresh_dims(item.shape) for item in value]


def _fits(dims: Dims | list[Dims] | None, value: torch.Tensor) -> TypeGuard[Dims]:
    """Whether a rule's result is of the value's shape; overloads of one name differ in theirs."""
    return isinstance(dims, tuple) and [*map(size_of, dims)] == [*value.shape]


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, or None."""
    name = operator_name(node)
    if name in RULES:
        return RULES[name]
    return _pointwise if is_pointwise(node) else None


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the value depends on the elements at its own position alone."""
    target: Any = node.target
    return torch.Tag.pointwise in getattr(target, "tags", ()) or operator_name(node) in _POINTWISE


_POINTWISE = {
    "_to_copy",
    "clone",
    "contiguous",
    "dropout",
    "empty_like",
    "fill",
    "full_like",
    "masked_fill",
    "ones_like",
    "rand_like",
    "randn_like",
    "type_as",
    "zeros_like",
}


# ------------------------------------------------------------------ elementwise


def _pointwise(visit: Visit) -> Dims:
    operands = [node for node in visit.node.all_input_nodes if _is_tensor(node)]
    return _broadcast(
        visit, visit.shape, [(shape_of(node), visit.operand(node)) for node in operands]
    )


def _broadcast(
    visit: Visit, shape: Sequence[int], operands: Sequence[tuple[Sequence[int], Dims]]
) -> Dims:
    dims: list[Product] = []
    for back in range(len(shape), 0, -1):
        same = [
            own[-back]
            for sizes, own in operands
            if len(sizes) >= back and sizes[-back] == shape[-back] > 1
        ]
        for other in same[1:]:
            visit.unify(same[0], other)
        dims.append(same[0] if same else fresh(shape[-back]))
    return tuple(dims)


def _same(visit: Visit) -> Dims:
    return visit.operand(visit.first)


def _same_first_of_several(visit: Visit) -> list[Dims]:
    values = visit.node.meta["val"]
    return [visit.operand(visit.first), *(fresh_dims(value.shape) for value in values[1:])]


# ------------------------------------------------------------------ views


def _view(visit: Visit) -> Dims | None:
    if 0 in visit.shape:
        return None
    dims = visit.operand(visit.first)
    return regroup(tuple(axis for product in dims for axis in product), visit.shape)


def _permute(visit: Visit) -> Dims:
    dims = visit.operand(visit.first)
    return tuple(dims[index] for index in visit.arguments["dims"])


def _transpose(visit: Visit) -> Dims:
    dims = list(visit.operand(visit.first))
    one, other = visit.dim("dim0"), visit.dim("dim1")
    dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


def _reverse(visit: Visit) -> Dims:
    return visit.operand(visit.first)[::-1]


def _expand(visit: Visit) -> Dims:
    return _broadcast(visit, visit.shape, [(shape_of(visit.first), visit.operand(visit.first))])


def _repeat(visit: Visit) -> Dims:
    dims, sizes = visit.operand(visit.first), shape_of(visit.first)
    added = len(visit.shape) - len(dims)
    padded = [((), 1)] * added + list(zip(dims, sizes, strict=True))
    return tuple(
        (*fresh(size // old), *product) if old and size else fresh(size)
        for (product, old), size in zip(padded, visit.shape, strict=True)
    )


def _repeat_interleave(visit: Visit) -> Dims | None:
    repeats = visit.arguments["repeats"]
    if not isinstance(repeats, int) or visit.arguments["dim"] is None:
        return None
    dims, dim = list(visit.operand(visit.first)), visit.dim()
    dims[dim] = (*dims[dim], *fresh(repeats))
    return tuple(dims)


def _unfold(visit: Visit) -> Dims | None:
    size, step, dim = visit.arguments["size"], visit.arguments["step"], visit.dim("dimension")
    dims, sizes = visit.operand(visit.first), shape_of(visit.first)
    if size != step or sizes[dim] % size:
        return None
    parts = regroup(dims[dim], (sizes[dim] // size, size))
    return None if parts is None else (*dims[:dim], parts[0], *dims[dim + 1 :], parts[1])


# ------------------------------------------------------------------ parts of a dimension


def _range(product: Product, start: int, length: int, step: int = 1) -> Product:
    """The positions start, start + step, … of a dimension, `length` of them."""
    total = size_of(product)
    if length == total and step == 1:
        return product
    if length <= 1:
        return ()
    axes = leaves(product)
    if step == 1:
        inner = total // axes[0].size
        if start % inner == 0 and length % inner == 0:
            return (*derived(axes[0], length // inner), *axes[1:])
        return fresh(length)
    last = axes[-1]
    if len(axes) == 1 and last.name is not None:
        return derived(last, length)
    if start < step and last.size % step == 0 and length == total // step:
        return (*axes[:-1], split(last, last.size // step)[0]) if last.size > step else axes[:-1]
    return fresh(length)


def _slice(visit: Visit) -> Dims:
    dims, dim = list(visit.operand(visit.first)), visit.dim()
    start, _ = slice_bounds(visit.arguments, shape_of(visit.first)[dim])
    dims[dim] = _range(dims[dim], start, visit.shape[dim], visit.arguments["step"])
    return tuple(dims)


def slice_bounds(arguments: dict[str, Any], size: int) -> tuple[int, int]:
    """Start and end of a `slice` within 0..size."""
    start, end, _ = slice(arguments["start"], arguments["end"]).indices(size)
    return start, end


def _narrow(visit: Visit) -> Dims | None:
    if not isinstance(visit.arguments["start"], int):
        return None
    dims, dim = list(visit.operand(visit.first)), visit.dim()
    start = visit.arguments["start"] % shape_of(visit.first)[dim]
    dims[dim] = _range(dims[dim], start, visit.shape[dim])
    return tuple(dims)


def _split(visit: Visit) -> list[Dims]:
    dims, dim = visit.operand(visit.first), visit.dim()
    pieces, start = [], 0
    for value in visit.node.meta["val"]:
        length = value.shape[dim]
        pieces.append((*dims[:dim], _range(dims[dim], start, length), *dims[dim + 1 :]))
        start += length
    return pieces


def _select(visit: Visit) -> Dims:
    dims, dim = visit.operand(visit.first), visit.dim()
    return (*dims[:dim], *dims[dim + 1 :])


def _unbind(visit: Visit) -> list[Dims]:
    dims, dim = visit.operand(visit.first), visit.dim()
    return [(*dims[:dim], *dims[dim + 1 :])] * len(visit.node.meta["val"])


def _stack(visit: Visit) -> Dims:
    tensors = visit.arguments["tensors"]
    dim = visit.dim(rank=len(visit.shape))
    inner = (*visit.shape[:dim], *visit.shape[dim + 1 :])
    dims = _broadcast(visit, inner, [(shape_of(node), visit.operand(node)) for node in tensors])
    return (*dims[:dim], fresh(visit.shape[dim]), *dims[dim:])


def _cat(visit: Visit) -> Dims:
    dim = visit.dim(rank=len(visit.shape))
    tensors = [node for node in visit.arguments["tensors"] if 0 not in shape_of(node)]
    others = [(*shape_of(node)[:dim], 1, *shape_of(node)[dim + 1 :]) for node in tensors]
    dims = list(
        _broadcast(
            visit,
            (*visit.shape[:dim], 1, *visit.shape[dim + 1 :]),
            [(sizes, visit.operand(node)) for sizes, node in zip(others, tensors, strict=True)],
        )
    )
    dims[dim] = _joined([leaves(visit.operand(node)[dim]) for node in tensors], visit.shape[dim])
    return tuple(dims)


def _joined(products: Sequence[Product], size: int) -> Product:
    """Dimensions one after another: leading axes of one name add up over a common rest."""
    if len(products) == 1:
        return products[0]
    rest = products[0][1:]
    if all(product and product[1:] == rest for product in products):
        names = {product[0].name for product in products}
        if len(names) == 1:
            return (*fresh(size // size_of(rest), names.pop()), *rest)
    return fresh(size)


def _slice_scatter(visit: Visit) -> Dims:
    dims, source, dim = visit.operand(visit.first), visit.arguments["src"], visit.dim()
    for index, (product, other) in enumerate(zip(dims, visit.operand(source), strict=True)):
        if index != dim or shape_of(source)[dim] == visit.shape[dim]:
            visit.unify(product, other)
    return dims


def _select_scatter(visit: Visit) -> Dims:
    dims, dim = visit.operand(visit.first), visit.dim()
    rest = (*dims[:dim], *dims[dim + 1 :])
    for product, other in zip(rest, visit.operand(visit.arguments["src"]), strict=True):
        visit.unify(product, other)
    return dims


def _index(visit: Visit) -> Dims | None:
    indices = visit.arguments["indices"]
    used = [place for place, index in enumerate(indices) if index is not None]
    if len(used) != 1 or indices[used[0]].meta["val"].dtype == torch.bool:
        return None
    dims, place = visit.operand(visit.first), used[0]
    return (*dims[:place], *visit.operand(indices[place]), *dims[place + 1 :])


def _index_select(visit: Visit) -> Dims:
    dims, dim = list(visit.operand(visit.first)), visit.dim()
    (product,) = visit.operand(visit.arguments["index"]) or ((),)
    dims[dim] = product
    return tuple(dims)


def _embedding(visit: Visit) -> Dims:
    return (*visit.operand(visit.arguments["indices"]), fresh(visit.shape[-1]))


# ------------------------------------------------------------------ resampling and reduction


def _resized(product: Product, size: int) -> Product:
    """A dimension that a convolution, pooling or padding brought to `size`."""
    if size == size_of(product):
        return product
    axes = leaves(product)
    return derived(axes[0], size) if len(axes) == 1 else fresh(size)


def _convolution(visit: Visit) -> Dims:
    dims = list(visit.operand(visit.first))
    channels = len(dims) - (len(shape_of(visit.arguments["weight"])) - 1)
    resized = [_resized(*pair) for pair in zip(dims, visit.shape, strict=True)]
    resized[channels] = fresh(visit.shape[channels])
    return tuple(resized)


def _resample(visit: Visit) -> Dims:
    dims = visit.operand(visit.first)
    return tuple(_resized(*pair) for pair in zip(dims, visit.shape, strict=True))


def reduced_dims(arguments: dict[str, Any], rank: int) -> set[int]:
    """The dimensions a reduction runs over."""
    dims = arguments.get("dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)} if rank else set()


def _reduce(visit: Visit) -> Dims | list[Dims]:
    dims = visit.operand(visit.first)
    gone = reduced_dims(visit.arguments, len(dims))
    keep = bool(visit.arguments.get("keepdim"))
    result = tuple(
        () if index in gone else product
        for index, product in enumerate(dims)
        if keep or index not in gone
    )
    value = visit.node.meta["val"]
    return result if isinstance(value, torch.Tensor) else [result] * len(value)


# ------------------------------------------------------------------ products


def _linear(visit: Visit) -> Dims:
    return (*visit.operand(visit.first)[:-1], fresh(visit.shape[-1]))


def _matmul(visit: Visit) -> Dims | None:
    one, other = visit.node.args[:2]
    assert isinstance(one, fx.Node) and isinstance(other, fx.Node)
    left, right = visit.operand(one), visit.operand(other)
    if len(left) < 2 or len(right) < 2:
        if left and right:
            visit.unify(left[-1], right[-2] if len(right) > 1 else right[-1])
        return (*left[:-1],) if len(right) == 1 else (*right[:-2], right[-1])
    visit.unify(left[-1], right[-2])
    batch = _broadcast(
        visit,
        visit.shape[:-2],
        [(shape_of(one)[:-2], left[:-2]), (shape_of(other)[:-2], right[:-2])],
    )
    return (*batch, left[-2], right[-1])


def _addmm(visit: Visit) -> Dims:
    left = visit.operand(visit.node.args[1])  # type: ignore[arg-type]
    right = visit.operand(visit.node.args[2])  # type: ignore[arg-type]
    visit.unify(left[-1], right[-2])
    return (*left[:-1], right[-1])


def _einsum(visit: Visit) -> Dims | None:
    equation = visit.arguments["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    inputs, result = equation.split("->")
    known: dict[str, Product] = {}
    for letters, node in zip(inputs.split(","), visit.arguments["tensors"], strict=True):
        for letter, product, size in zip(letters, visit.operand(node), shape_of(node), strict=True):
            if size_of(known.get(letter, ())) == size:
                visit.unify(known.get(letter, ()), product)
            elif size > 1:
                known[letter] = product
    return tuple(known.get(letter, ()) for letter in result)


def _attention(visit: Visit) -> Dims:
    nodes = [visit.arguments[name] for name in ("query", "key", "value")]
    query, key, value = (visit.operand(node) for node in nodes)
    batch = _broadcast(
        visit,
        visit.shape[:-2],
        [(shape_of(node)[:-2], visit.operand(node)[:-2]) for node in nodes],
    )
    visit.unify(query[-1], key[-1])
    visit.unify(key[-2], value[-2])
    mask = visit.arguments.get("attn_mask")
    if isinstance(mask, fx.Node):
        scores = (*visit.shape[:-1], shape_of(nodes[1])[-2])
        _broadcast(
            visit,
            scores,
            [(scores, (*batch, query[-2], key[-2])), (shape_of(mask), visit.operand(mask))],
        )
    return (*batch, query[-2], value[-1])


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _table(*groups: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in groups for name in names.split()}


RULES: dict[str, Rule] = _table(
    ("view reshape _unsafe_view flatten unflatten unsqueeze squeeze", _view),
    ("permute", _permute),
    ("transpose", _transpose),
    ("t", _reverse),
    ("expand", _expand),
    ("repeat tile", _repeat),
    ("repeat_interleave", _repeat_interleave),
    ("unfold", _unfold),
    ("slice", _slice),
    ("narrow", _narrow),
    ("split split_with_sizes chunk", _split),
    ("select", _select),
    ("unbind", _unbind),
    ("stack", _stack),
    ("cat", _cat),
    ("slice_scatter", _slice_scatter),
    ("select_scatter", _select_scatter),
    ("index", _index),
    ("index_select", _index_select),
    ("embedding", _embedding),
    ("conv1d conv2d conv3d convolution", _convolution),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
    ("pad constant_pad_nd avg_pool2d avg_pool3d max_pool2d max_pool3d", _resample),
    ("upsample_nearest2d upsample_nearest3d upsample_bilinear2d", _resample),
    ("mean sum amax amin prod var std argmax argmin any all logsumexp max min", _reduce),
    ("softmax _softmax log_softmax layer_norm rms_norm group_norm", _same),
    ("batch_norm instance_norm cumsum flip roll sort tril triu index_put", _same),
    ("native_layer_norm native_group_norm", _same_first_of_several),
    ("linear", _linear),
    ("matmul bmm mm", _matmul),
    ("addmm", _addmm),
    ("einsum", _einsum),
    ("scaled_dot_product_attention", _attention),
)
