"""Axis analysis: where the axes named on a function's inputs are in every value it computes.

Every dimension of every value is a product of axes, `(b t) (h w) c`. Names come from the inputs and
follow the data through reshapes, permutations, products and broadcasts; a value that no named input
reaches (a position table, a mask, a weight: a *table*) is named by what it is combined with, anew
for each use, because one table may serve height here and width there.

The rules of the operators are in `axes_rules`, the algebra of products in `axes_factors`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from odsora_compiler.analysis.arguments import bind
from odsora_compiler.analysis.axes_factors import (
    Axis,
    Dims,
    Product,
    fresh,
    fresh_dims,
    instantiate,
    leaves,
    size_of,
    unify,
)
from odsora_compiler.analysis.axes_rules import Visit, propagate
from odsora_compiler.ir.axis_names import AxisNames, parse_axes
from odsora_compiler.ir.function import Function

Naming = Mapping[Axis, Product]
"""What the axes of a table stand for where it is used."""


@dataclass(frozen=True)
class Place:
    """Where an axis lies: in dimension `dim`, which is a row-major outer · size · inner."""

    dim: int
    outer: int
    size: int
    inner: int


class AxisAnalysis:
    """The axes of all values of one function; made by `axis_names`.

    Dimensions are tuples of `Axis` (fields `name`, None for an anonymous one, and `size`),
    outermost first, axes of size 1 left out. Two dimensions are known to be the same where they
    hold the same `Axis` objects.

    `conflicts`: places where axes of different names met, and input axes whose size is unknown.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.conflicts: list[str] = []
        self._dims: dict[fx.Node, Any] = {}
        self._named: set[fx.Node] = set()
        self._uses: dict[tuple[fx.Node, fx.Node], tuple[Any, dict[Axis, Axis]]] = {}
        self._reached: dict[str, set[fx.Node]] = {}
        self._sizes: dict[str, set[int]] = {}
        self.inputs = self._name_inputs()
        for node in function.graph.nodes:
            if node.op == "get_attr":
                self._dims[node] = fresh_dims(node.meta["val"].shape)
            elif node.op == "call_function":
                self._visit(node)

    def dims(self, node: fx.Node, naming: Naming | None = None, output: int = 0) -> Dims:
        """Dimensions of `node`; for an operator with several values, of that number `output`.

        `naming`: for a table, what its axes stand for at a use, from `naming`.
        """
        dims = self._dims[node]
        return _resolve(dims[output] if isinstance(dims, list) else dims, naming or {})

    def operand(self, user: fx.Node, node: fx.Node, naming: Naming | None = None) -> Dims:
        """Dimensions of `node` as its user sees them; `naming` is that of the user."""
        return self.dims(node, self.naming(user, node, naming))

    def naming(self, user: fx.Node, node: fx.Node, outer: Naming | None = None) -> Naming:
        """What the axes of operand `node` stand for in `user`, itself seen through `outer`."""
        outer = outer or {}
        if (user, node) not in self._uses:
            return outer
        _, copies = self._uses[user, node]
        return {axis: _rename((copy,), outer) for axis, copy in copies.items()}

    def find(self, node: fx.Node, name: str) -> Place | None:
        """Where axis `name` lies in `node`; None unless there is exactly one place."""
        places = [
            place
            for axis in {axis for product in self.dims(node) for axis in product}
            if axis.name == name
            for place in places_of(self.dims(node), axis)
        ]
        return places[0] if len(places) == 1 else None

    def text(self, node: fx.Node) -> str:
        """The dimensions for people: `(b t) (h w) c`, an anonymous axis as its size."""
        return dims_text(self.dims(node))

    def is_table(self, node: fx.Node) -> bool:
        """Whether no input that names any of its axes reaches `node`."""
        return node not in self._named

    def reached_by(self, name: str, node: fx.Node) -> bool:
        """Whether `node` depends on an input that has the axis `name`."""
        if name not in self._reached:
            reached = {
                node for node, names in self.inputs.items() if any(name in parts for parts in names)
            }
            for other in self.function.graph.nodes:
                if any(used in reached for used in other.all_input_nodes):
                    reached.add(other)
            self._reached[name] = reached
        return node in self._reached[name]

    def sizes(self, name: str) -> frozenset[int]:
        """Sizes that inputs give axis `name`, 1 included; empty when no input has it."""
        return frozenset(self._sizes.get(name, ()))

    # -------------------------------------------------------------- the walk

    def _name_inputs(self) -> dict[fx.Node, AxisNames]:
        inputs = {}
        for node in self.function.placeholders:
            shape = tuple(node.meta["val"].shape)
            text = node.meta.get("axes")
            names = parse_axes(text, shape, str(node.target)) if text else ((),) * len(shape)
            inputs[node] = names
            if any(names):
                self._named.add(node)
        shared: dict[tuple[str, int], Product] = {}

        def axis(name: str, size: int) -> Product:
            return shared.setdefault((name, size), fresh(size, name))

        for node, names in inputs.items():
            for parts, size in zip(names, node.meta["val"].shape, strict=True):
                if len(parts) == 1:
                    self._sizes.setdefault(parts[0], set()).add(size)
        for node, names in inputs.items():
            dims: list[Product] = []
            for parts, size in zip(names, node.meta["val"].shape, strict=True):
                known = _part_sizes(parts, size, self._sizes) if parts else None
                if parts and known is None:
                    self.conflicts.append(
                        f"input '{node.target}': the sizes of ({' '.join(parts)}), {size} in all, "
                        "are not given by other inputs"
                    )
                dims.append(
                    tuple(one for pair in known for one in axis(*pair)) if known else fresh(size)
                )
                for part, length in known or ():
                    self._sizes.setdefault(part, set()).add(length)
            self._dims[node] = tuple(dims)
        return inputs

    def _visit(self, node: fx.Node) -> None:
        if any(used in self._named for used in node.all_input_nodes):
            self._named.add(node)
        if node.target is operator.getitem:
            source, index = node.args
            self._dims[node] = self._use(node, source)[index]  # type: ignore[arg-type]
            return

        def same(one: Product, other: Product) -> None:
            trouble = unify(one, other)
            if trouble is not None:
                self.conflicts.append(f"{node.name}: {trouble}")

        visit = Visit(node, bind(node), lambda operand: self._use(node, operand), same)
        self._dims[node] = propagate(visit)

    def _use(self, user: fx.Node, node: fx.Node) -> Any:
        dims = self._dims[node]
        if node in self._named:
            return dims
        if (user, node) not in self._uses:
            several = dims if isinstance(dims, list) else [dims]
            flat, copies = instantiate(tuple(product for item in several for product in item))
            rest = iter(flat)
            made = [tuple(next(rest) for _ in item) for item in several]
            self._uses[user, node] = (made if isinstance(dims, list) else made[0], copies)
        return self._uses[user, node][0]


def axis_names(function: Function) -> AxisAnalysis:
    """Analyse `function`, from the axis names in its placeholders' `meta['axes']`.

    Raises `UsageError` when those are malformed or do not fit the shapes.
    """
    return AxisAnalysis(function)


def places_of(dims: Dims, axis: Axis) -> list[Place]:
    """Every place where `axis` lies in these dimensions."""
    places = []
    for dim, product in enumerate(dims):
        for index, found in enumerate(product):
            if found is axis:
                outer, inner = size_of(product[:index]), size_of(product[index + 1 :])
                places.append(Place(dim, outer, axis.size, inner))
    return places


def dims_text(dims: Dims) -> str:
    """`(b t) (h w) c`; an anonymous axis as its size, part of a split axis as `t:4`."""

    def word(axis: Axis) -> str:
        if axis.name is None:
            return str(axis.size)
        return f"{axis.name}:{axis.size}" if axis.part else axis.name

    words = [[word(axis) for axis in product] or ["1"] for product in dims]
    return " ".join(part[0] if len(part) == 1 else f"({' '.join(part)})" for part in words)


def _resolve(dims: Dims, naming: Naming) -> Dims:
    return tuple(_rename(leaves(product), naming) for product in dims)


def _rename(product: Product, naming: Naming) -> Product:
    return tuple(one for axis in leaves(product) for one in leaves(naming.get(axis, (axis,))))


def _part_sizes(
    parts: tuple[str, ...], total: int, sizes: Mapping[str, set[int]]
) -> list[tuple[str, int]] | None:
    """Each part of an input's dimension with its size, as far as other inputs tell, or None."""
    if len(parts) == 1:
        return [(parts[0], total)]
    known = {part: next(iter(sizes[part])) for part in parts if len(sizes.get(part, ())) == 1}
    missing = [part for part in parts if part not in known]
    product = math.prod(known.values())
    if len(missing) == 1 and total % product == 0:
        known[missing[0]] = total // product
    elif missing or product != total:
        return None
    return [(part, known[part]) for part in parts]
