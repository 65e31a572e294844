"""Copying a region of a graph with one axis merged: half as many positions along it.

Every literal that depends on the axis (shapes of reshapes and broadcasts, bounds of slices) is
computed anew from the region's axes, and the shape of every copy is held against what they predict.
Which region, and what becomes of the original, is the caller's business; the literals themselves
are in `literals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from odsora_compiler.analysis.arguments import bind, operator_name, rebind
from odsora_compiler.analysis.axes import AxisAnalysis, Naming, Place, places_of
from odsora_compiler.analysis.axes_factors import Axis, Dims
from odsora_compiler.analysis.axes_rules import shape_of
from odsora_compiler.errors import PassError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.rewrite.literals import RegionError, Resize, rounds_positions

aten = torch.ops.aten

GROUP = 2  # neighbouring positions that become one


class AxisMerge:
    """Copies regions of the function that `editor` edits, `axis` merged in neighbouring pairs.

    Of an odd number of positions the last is left out of the merging and gets the last merged
    value. `centers`: what a region reads that tells positions apart (a rotary table, a mask) is
    computed anew at the middle of each pair, 2i + ½; otherwise its first entries are taken.

    Nodes made for a region that is then refused are dead; `Editor.erase_dead` removes them.
    """

    def __init__(self, editor: Editor, axes: AxisAnalysis, axis: Axis, centers: bool) -> None:
        self.editor = editor
        self.axes = axes
        self.axis = axis
        self.centers = centers
        self.length = axis.size // GROUP
        self._resize = Resize(axes, axis, self.length)
        self._positions: dict[tuple[fx.Node, Places], fx.Node] = {}

    def copy(
        self,
        nodes: Sequence[fx.Node],
        entries: Iterable[fx.Node],
        exits: Iterable[fx.Node],
    ) -> dict[fx.Node, fx.Node]:
        """Copy the region `nodes`, given in graph order; the originals stay.

        What `entries` read, and what else the region reads that depends on an input with this axis,
        is averaged; the values of `exits` are repeated. Returns exit → the node that can stand for
        it. Raises `RegionError`.
        """
        copies: dict[fx.Node, fx.Node] = {}
        averaged: dict[fx.Node, fx.Node] = {}
        first = set(entries)
        summaries = _beside(nodes)

        def operand(user: fx.Node, used: fx.Node) -> fx.Node:
            if used in copies:
                return copies[used]
            places = self._places(self.axes.operand(user, used))
            if not places:
                if used in summaries:
                    raise RegionError(
                        f"'{used.name}' is computed from all positions of '{self.axis.name}'"
                    )
                return used
            if user not in first and not self.axes.reached_by(str(self.axis.name), used):
                return self._side(user, used)
            if used not in averaged:
                averaged[used] = self._average(self.editor.before(user), used, places)
            return averaged[used]

        for node in nodes:
            operands = {used: operand(node, used) for used in node.all_input_nodes}
            copies[node] = self._copy(self.editor.before(node), node, {}, operands)
        return {node: self._repeat(self.editor.after(node), copies[node], node) for node in exits}

    # -------------------------------------------------------------- merging and unmerging

    def _average(self, editor: Editor, node: fx.Node, places: tuple[Place, ...]) -> fx.Node:
        if not node.meta["val"].is_floating_point():
            raise RegionError(f"'{node.name}' is no floating-point value and cannot be averaged")
        value, shape = node, list(shape_of(node))
        for place in places:
            before, after = _around(place, shape)
            value = self._kept(editor, value, before, after, self.length * GROUP)
            pairs = [before * self.length, GROUP, after]
            value = _view(editor, value, pairs)
            value = editor.call(aten.mean.dim, value, [1])
            shape[place.dim] = place.outer * self.length * place.inner
            value = _view(editor, value, shape)
        return value

    def _repeat(self, editor: Editor, copy: fx.Node, original: fx.Node) -> fx.Node:
        places = self._places(self.axes.dims(original))
        if len(places) != 1:
            raise RegionError(f"'{original.name}' holds the axis {len(places)} times")
        shape = list(shape_of(original))
        before, after = _around(places[0], shape)
        pairs = [before * self.length, GROUP, after]
        value = _view(editor, copy, [before * self.length, 1, after])
        value = editor.call(aten.expand.default, value, pairs)
        even = self.length * GROUP
        if even < self.axis.size:
            value = _view(editor, value, [before, even, after])
            last = editor.call(aten.slice.Tensor, value, 1, even - 1, even)
            value = editor.call(aten.cat.default, [value, last], 1)
        return _view(editor, value, shape)

    def _kept(self, editor: Editor, node: fx.Node, before: int, after: int, count: int) -> fx.Node:
        """The first `count` positions, [before, count, after]; the node itself if that is all."""
        if count == self.axis.size:
            return node
        rows = [before, self.axis.size, after]
        value = _view(editor, node, rows)
        return editor.call(aten.slice.Tensor, value, 1, 0, count)

    # -------------------------------------------------------------- what tells positions apart

    def _side(self, user: fx.Node, node: fx.Node) -> fx.Node:
        value = self._at_positions(node, self.axes.naming(user, node))
        if value.meta["val"].dtype != node.meta["val"].dtype:
            raise RegionError(f"'{node.name}' gives positions as whole numbers")
        return value

    def _at_positions(self, node: fx.Node, naming: Naming) -> fx.Node:
        """`node` at the merged positions; it depends on no input with this axis."""
        places = tuple(self._places(dims) for dims in self._values(node, naming))
        if not any(places):
            return node
        if (node, places) not in self._positions:
            self._positions[node, places] = (
                self._at_centers(node, naming) if self.centers else self._first(node, places[0])
            )
        return self._positions[node, places]

    def _first(self, node: fx.Node, places: tuple[Place, ...]) -> fx.Node:
        editor = self.editor.after(node)
        value, shape = node, list(shape_of(node))
        for place in places:
            before, after = _around(place, shape)
            shape[place.dim] = place.outer * self.length * place.inner
            if place.outer == place.inner == 1:
                value = editor.call(aten.slice.Tensor, value, place.dim, 0, self.length)
            else:
                value = _view(editor, self._kept(editor, value, before, after, self.length), shape)
        return value

    def _at_centers(self, node: fx.Node, naming: Naming) -> fx.Node:
        if node.op != "call_function":
            raise RegionError(
                f"its positions are stored in '{node.target}', so there are none between them; "
                "positions=compact takes the first of them"
            )
        name = operator_name(node)
        if name == "arange":
            return self._centers_of_arange(node, naming)
        if rounds_positions(node):
            raise RegionError(f"'{node.name}' ({name}) rounds the positions it is computed from")
        operands = {
            used: self._at_positions(used, self.axes.naming(node, used, naming))
            for used in node.all_input_nodes
        }
        return self._copy(self.editor.after(node), node, naming, operands)

    def _centers_of_arange(self, node: fx.Node, naming: Naming) -> fx.Node:
        if self.axes.dims(node, naming) != ((self.axis,),):
            raise RegionError(f"'{node.name}' counts more than the positions of the axis")
        arguments = bind(node)
        start, step = arguments.get("start") or 0, arguments.get("step") or 1
        first, stride = start + step * (GROUP - 1) / 2, step * GROUP
        end = first + stride * (self.length - 0.5)
        dtype = node.meta["val"].dtype
        return self.editor.after(node).call(
            aten.arange.start_step,
            first,
            end,
            stride,
            dtype=dtype if dtype.is_floating_point else torch.float32,
        )

    # -------------------------------------------------------------- copying

    def _copy(
        self,
        editor: Editor,
        node: fx.Node,
        naming: Naming,
        operands: Mapping[fx.Node, fx.Node],
    ) -> fx.Node:
        """A copy of `node` on the merged axis, of the shape that its axes predict."""
        values = self._values(node, naming)
        if not any(self._places(dims) for dims in values):
            raise RegionError(
                f"'{node.name}' ({operator_name(node)}) has no axis '{self.axis.name}' any more"
            )
        for dims in values:
            for axis in (axis for product in dims for axis in product):
                if axis.name == self.axis.name and axis is not self.axis:
                    raise RegionError(
                        f"'{node.name}' holds another axis '{axis.name}' of size {axis.size}"
                    )
        changes = self._resize.literals(node, naming)
        args, kwargs = rebind(node, changes) if changes else (node.args, node.kwargs)
        try:
            copy = editor.copy(node, lambda used: operands[used], args=args, kwargs=kwargs)
        except PassError as error:
            raise RegionError(error.message) from error
        made = copy.meta["val"]
        shapes = [tuple(one.shape) for one in (made if isinstance(made, (list, tuple)) else [made])]
        predicted = [self._resize.shape(dims) for dims in values]
        if shapes != predicted:
            raise RegionError(f"'{node.name}' became {shapes}, its axes predict {predicted}")
        return copy

    def _values(self, node: fx.Node, naming: Naming) -> list[Dims]:
        """Dimensions of each value of `node`."""
        value = node.meta["val"]
        count = len(value) if isinstance(value, (list, tuple)) else 1
        return [self.axes.dims(node, naming, output) for output in range(count)]

    def _places(self, dims: Dims) -> tuple[Place, ...]:
        """Where the merged axis lies; at most once in a dimension."""
        places = tuple(places_of(dims, self.axis))
        if len({place.dim for place in places}) < len(places):
            raise RegionError(f"one dimension holds axis '{self.axis.name}' twice")
        return places


Places = tuple[tuple[Place, ...], ...]
"""Where the merged axis lies in each value of an operator."""


def _around(place: Place, shape: list[int]) -> tuple[int, int]:
    """Number of elements before and after the axis in row-major order."""
    before = math.prod(shape[: place.dim]) * place.outer
    return before, place.inner * math.prod(shape[place.dim + 1 :])


def _view(editor: Editor, node: fx.Node, shape: list[int]) -> fx.Node:
    if list(shape_of(node)) == shape:
        return node
    return editor.call(aten.view.default, node, list(shape))


def _beside(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed from the region's values without being in it, up to the region's end."""
    inside, found = set(nodes), set()
    node = nodes[0]
    while node is not nodes[-1]:
        if node not in inside and any(
            used in inside or used in found for used in node.all_input_nodes
        ):
            found.add(node)
        node = node.next
    return found
