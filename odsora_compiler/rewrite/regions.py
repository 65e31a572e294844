"""Copying a region of a graph with one axis merged: half as many positions along it.

Every literal that depends on the axis (shapes of reshapes and broadcasts, bounds of slices) is
computed anew from the region's axes, and the shape of every copy is held against what they predict.
Which region, and what becomes of the original, is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.arguments import bind, operator_name, rebind
from odsora_compiler.analysis.axes import AxisAnalysis, Naming, Place, places_of
from odsora_compiler.analysis.axes_factors import Axis, Dims, Product, size_of
from odsora_compiler.analysis.axes_rules import (
    is_pointwise,
    reduced_dims,
    shape_of,
    slice_bounds,
)
from odsora_compiler.errors import PassError
from odsora_compiler.ir.edit import Editor

aten = torch.ops.aten

GROUP = 2  # neighbouring positions that become one


class RegionRefused(Exception):
    """A region cannot be copied with its axis merged; the text says why."""


class AxisMerge:
    """Copies regions of the function that `editor` edits, axis `axis` merged in neighbouring pairs.

    Of an odd number of positions the last is left out of the merging and gets the last merged value.
    `centers`: what a region reads that tells positions apart (a rotary table, a mask) is computed
    anew at the middle of each pair, 2i + ½; otherwise its first entries are taken.

    Nodes made for a region that is then refused are dead; `Editor.erase_dead` removes them.
    """

    def __init__(self, editor: Editor, axes: AxisAnalysis, axis: Axis, centers: bool) -> None:
        self.editor = editor
        self.axes = axes
        self.axis = axis
        self.centers = centers
        self.length = axis.size // GROUP
        self._positions: dict[tuple[fx.Node, tuple[Place, ...]], fx.Node] = {}

    def copy(
        self, nodes: Iterable[fx.Node], exits: Iterable[fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Copy the region `nodes`, given in graph order; the originals stay.

        Values that enter and depend on the data are averaged, those of `exits` are repeated. Returns
        exit → the node that can stand for it. Raises `RegionRefused`.
        """
        copies: dict[fx.Node, fx.Node] = {}
        merged: dict[fx.Node, fx.Node] = {}

        def operand(user: fx.Node, node: fx.Node) -> fx.Node:
            places = self._places(self.axes_of(node, user))
            if node in copies or not places:
                return copies.get(node, node)
            assert self.axis.name is not None
            if not self._is_entry(user) and not self.axes.reached_by(self.axis.name, node):
                return self._at_positions(user, node, {})
            if node not in merged:
                self.editor.before(user)
                merged[node] = self._averaged(node, places)
            return merged[node]

        for node in nodes:
            self._check_axes(node)
            self.editor.before(node)
            copy = self._copy(node, {}, lambda used, user=node: operand(user, used))
            if copy is not node:
                copies[node] = copy
        return {node: self._repeated(copies[node], node) for node in exits}
