"""The algebra behind axis names: axes as union-find variables, dimensions as products of them.

A dimension is a tuple of axes, outermost first; axes of size 1 are left out, so a dimension of size
1 is `()`. An axis may be *bound*: to another axis it turned out to equal, or to several that it
turned out to be the product of. Whatever was built from it follows, earlier results included.

What operators do to dimensions is in `axes_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Product = tuple["Axis", ...]
Dims = tuple[Product, ...]


class Axis:
    """One variable. `part`: its place within a named axis that was split, `()` for a whole one."""

    __slots__ = ("bound", "name", "part", "size")

    def __init__(self, size: int, name: str | None = None, part: tuple[int, ...] = ()) -> None:
        self.size = size
        self.name = name
        self.part = part
        self.bound: Product | None = None


def fresh(size: int, name: str | None = None) -> Product:
    """A dimension of one new axis; `()` for size 1."""
    return () if size == 1 else (Axis(size, name),)


def fresh_dims(shape: Iterable[int]) -> Dims:
    """New anonymous axes for every dimension."""
    return tuple(fresh(size) for size in shape)


def derived(axis: Axis, size: int) -> Product:
    """What is left of `axis` after slicing, striding or padding: another axis of its name."""
    return fresh(size, axis.name)


def size_of(product: Iterable[Axis]) -> int:
    """Number of positions along a dimension."""
    return math.prod(axis.size for axis in product)


def leaves(product: Iterable[Axis]) -> Product:
    """The unbound axes that `product` now stands for."""
    found: list[Axis] = []
    for axis in product:
        if axis.bound is None:
            found.append(axis)
        else:
            axis.bound = leaves(axis.bound)
            found.extend(axis.bound)
    return tuple(found)


def split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """Bind a leaf to the product of two new axes, the first of size `outer`; returns them.

    Both keep its name: a time axis of 8 cut into 4 and 2 is still time in both parts.
    """
    inner = axis.size // outer
    first = Axis(outer, axis.name, (*axis.part, 0) if axis.name else ())
    second = Axis(inner, axis.name, (*axis.part, 1) if axis.name else ())
    axis.bound = (first, second)
    return first, second


def unify(one: Product, other: Product) -> str | None:
    """Let two dimensions of equal size be the same. Returns what contradicts that, or None.

    Axes are paired from the outside in; of a pair of unequal size the larger is split. Of two axes
    the named one stays; two of different names stay apart, which is the contradiction reported.
    """
    left, right = list(leaves(one))[::-1], list(leaves(other))[::-1]
    trouble = None
    while left and right:
        a, b = left.pop(), right.pop()
        if a is b:
            continue
        if a.size != b.size:
            if a.size % b.size and b.size % a.size:
                return f"sizes {a.size} and {b.size} do not divide each other"
            if a.size > b.size:
                a, rest = split(a, b.size)
                left.append(rest)
            else:
                b, rest = split(b, a.size)
                right.append(rest)
        if a.name is None:
            a.bound = (b,)
        elif b.name is None or (a.name, a.part) == (b.name, b.part):
            b.bound = (a,)
        else:
            trouble = f"axis {a.name} meets axis {b.name}"
        # A split may have bound axes that are still waiting on either side.
        left, right = list(leaves(left[::-1]))[::-1], list(leaves(right[::-1]))[::-1]
    return trouble


def regroup(product: Product, shape: Sequence[int]) -> Dims | None:
    """Distribute a row-major product over dimensions of `shape`; None where they do not align.

    Whole axes are taken as long as they divide what is to be filled, else one is split.
    """
    waiting = list(leaves(product))[::-1]
    dims: list[Product] = []
    for size in shape:
        taken: list[Axis] = []
        left = size
        while left > 1:
            axis = waiting.pop()
            if left % axis.size:
                if axis.size % left:
                    return None
                axis, rest = split(axis, left)
                # The same axis may stand elsewhere in the product.
                waiting = list(leaves([rest, *waiting[::-1]]))[::-1]
            taken.append(axis)
            left //= axis.size
        dims.append(tuple(taken))
    return tuple(leaves(product) for product in dims)


def instantiate(dims: Dims) -> tuple[Dims, dict[Axis, Axis]]:
    """The dimensions with every axis replaced by a new one, and which new one stands for which."""
    copies: dict[Axis, Axis] = {}
    for product in dims:
        for axis in leaves(product):
            copies.setdefault(axis, Axis(axis.size, axis.name, axis.part))
    return tuple(tuple(copies[axis] for axis in leaves(product)) for product in dims), copies
