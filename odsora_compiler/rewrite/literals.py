"""Arguments of operators that depend on the size of an axis, computed anew for another size.

This is where an operator is said to be safe to run on fewer positions: it must treat every position
of the axis alike, or have its literals in the table here. All others are refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.arguments import bind, operator_name
from odsora_compiler.analysis.axes import AxisAnalysis, Naming
from odsora_compiler.analysis.axes_factors import Axis, Dims, Product
from odsora_compiler.analysis.axes_rules import (
    is_pointwise,
    reduced_dims,
    shape_of,
    slice_bounds,
)


class RegionError(Exception):
    """A region cannot be run on fewer positions of its axis; the text says why."""


@dataclass(frozen=True)
class Resize:
    """`axis` gets `length` positions."""

    axes: AxisAnalysis
    axis: Axis
    length: int

    def size(self, product: Product) -> int:
        """Size of a dimension after the change."""
        size = 1
        for axis in product:
            size *= self.length if axis is self.axis else axis.size
        return size

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Shape of a value after the change."""
        return tuple(self.size(product) for product in dims)

    def literals(self, node: fx.Node, naming: Naming) -> dict[str, Any]:
        """The arguments of `node` to replace, by name; `naming` as in `AxisAnalysis`.

        Raises `RegionError` when the operator cannot be run on fewer positions, or is not known.
        """
        name = operator_name(node)
        if name == "getitem":
            return {}
        use = _Use(self, node, naming, bind(node))
        if name in _LITERALS:
            return _LITERALS[name](use)
        if name in _MIXING:
            self._refuse_mixing(use, _MIXING[name](use))
        elif name not in _INDIFFERENT and not is_pointwise(node):
            raise RegionError(f"'{node.name}': it is not known what {name} does along the axis")
        return {}

    def _refuse_mixing(self, use: _Use, dims: set[int]) -> None:
        if any(self.axis in use.first[dim] for dim in dims):
            raise RegionError(
                f"'{use.node.name}' ({operator_name(use.node)}) works along '{self.axis.name}'"
            )


def rounds_positions(node: fx.Node) -> bool:
    """Whether positions between whole numbers would not pass through the operator unharmed."""
    name = operator_name(node)
    if name in _ROUNDING or name.startswith("bitwise_"):
        return True
    dtype = node.kwargs.get("dtype") if name == "_to_copy" else None
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        return True
    return node.kwargs.get("rounding_mode") is not None


@dataclass(frozen=True)
class _Use:
    resize: Resize
    node: fx.Node
    naming: Naming
    arguments: Mapping[str, Any]

    @property
    def operand(self) -> fx.Node:
        """The first operand."""
        node = next(iter(self.arguments.values()))
        assert isinstance(node, fx.Node)
        return node

    @property
    def first(self) -> Dims:
        """Dimensions of the first operand."""
        return self.resize.axes.operand(self.node, self.operand, self.naming)

    @property
    def dims(self) -> Dims:
        """Dimensions of the value."""
        return self.resize.axes.dims(self.node, self.naming)

    @property
    def shape(self) -> list[int]:
        """Shape of the value after the change."""
        return list(self.resize.shape(self.dims))

    def scaled(self, product: Product, *positions: int) -> tuple[int, ...] | None:
        """Positions along a dimension after the change; None where they stay.

        They must lie between whole runs of the axis, else it would be cut.
        """
        if self.resize.axis not in product:
            return None
        rest = product[1:]
        inner = self.resize.size(rest) * self.resize.axis.size // self.resize.length
        if product[0] is self.resize.axis or any(position % inner for position in positions):
            raise RegionError(
                f"'{self.node.name}' ({operator_name(self.node)}) cuts "
                f"axis '{self.resize.axis.name}'"
            )
        return tuple(position // inner * self.resize.size(rest) for position in positions)


# ------------------------------------------------------------------ literals by operator


def _sizes(argument: str) -> Callable[[_Use], dict[str, Any]]:
    return lambda use: {argument: use.shape}


def _repeats(use: _Use) -> dict[str, Any]:
    before = list(use.resize.shape(use.first))
    before = [1] * (len(use.shape) - len(before)) + before
    return {"repeats": [new // old for new, old in zip(use.shape, before, strict=True)]}


def _interleaved(use: _Use) -> dict[str, Any]:
    if not isinstance(use.arguments["repeats"], int):
        raise RegionError(f"'{use.node.name}' repeats by a tensor of counts")
    dim = use.arguments["dim"]
    repeats = use.shape[dim] // use.resize.size(use.first[dim])
    return {"repeats": repeats} | (
        {"output_size": use.shape[dim]} if use.arguments.get("output_size") is not None else {}
    )


def _bounds(use: _Use) -> dict[str, Any]:
    dim = use.arguments["dim"]
    product, size = use.first[dim], shape_of(use.operand)[dim]
    if use.resize.axis in use.dims[dim] and use.resize.axis not in product:
        raise RegionError(f"'{use.node.name}' takes the positions it needs out of more of them")
    start, end = slice_bounds(dict(use.arguments), size)
    if use.arguments["step"] == 1 and (start, end) == (0, size):
        return {"start": 0, "end": use.resize.size(product)}
    if use.arguments["step"] != 1:
        if use.resize.axis in product:
            raise RegionError(f"'{use.node.name}' takes every {use.arguments['step']}th position")
        return {}
    scaled = use.scaled(product, start, end)
    return {} if scaled is None else {"start": scaled[0], "end": scaled[1]}


def _piece(use: _Use) -> dict[str, Any]:
    product = use.first[use.arguments["dim"]]
    scaled = use.scaled(product, use.arguments["split_size"])
    return {} if scaled is None else {"split_size": scaled[0]}


def _pieces(use: _Use) -> dict[str, Any]:
    product = use.first[use.arguments["dim"]]
    scaled = use.scaled(product, *use.arguments["split_sizes"])
    return {} if scaled is None else {"split_sizes": list(scaled)}


_LITERALS: dict[str, Callable[[_Use], dict[str, Any]]] = {
    "view": _sizes("size"),
    "_unsafe_view": _sizes("size"),
    "reshape": _sizes("shape"),
    "expand": _sizes("size"),
    "full": _sizes("size"),
    "ones": _sizes("size"),
    "zeros": _sizes("size"),
    "repeat": _repeats,
    "repeat_interleave": _interleaved,
    "slice": _bounds,
    "slice_scatter": _bounds,
    "split": _piece,
    "split_with_sizes": _pieces,
}

# ------------------------------------------------------------------ operators along dimensions


def _reduction(use: _Use) -> set[int]:
    return reduced_dims(dict(use.arguments), len(use.first))


def _one(use: _Use) -> set[int]:
    return {use.arguments["dim"]}


def _several(use: _Use) -> set[int]:
    return set(use.arguments["dims"])


def _last(use: _Use) -> set[int]:
    return {-1}


def _normalized(use: _Use) -> set[int]:
    return {-1 - index for index in range(len(use.arguments["normalized_shape"]))}


def _all_but_batch(use: _Use) -> set[int]:
    return set(range(1, len(use.first)))


_MIXING: dict[str, Callable[[_Use], set[int]]] = {
    **dict.fromkeys(("mean", "sum", "amax", "amin", "prod", "var", "std"), _reduction),
    **dict.fromkeys(("any", "all", "logsumexp"), _reduction),
    **dict.fromkeys(("select", "unbind", "cumsum", "select_scatter"), _one),
    **dict.fromkeys(("flip", "roll"), _several),
    "linear": _last,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("group_norm", "conv1d", "conv2d", "conv3d"), _all_but_batch),
}

# Attention itself belongs here: a softmax and a product over fewer tokens is what is wanted.
_INDIFFERENT = {
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "stack",
    "cat",
    "matmul",
    "bmm",
    "mm",
    "einsum",
    "softmax",
    "_softmax",
    "scaled_dot_product_attention",
}

_ROUNDING = {
    "floor_divide",
    "remainder",
    "fmod",
    "floor",
    "ceil",
    "round",
    "trunc",
    "embedding",
    "index",
    "index_select",
    "gather",
}
