"""A function as the partitioner sees it: steps, the weights each needs, what may be computed anew.

Values that are cheap to make from inputs, literals and a few small weights (masks, position tables)
belong to no step: they are computed anew wherever they are read, and never cross a cut. What is
made from weights and literals alone but not cheap is one step, just before it is first read;
lowering folds it into a constant, whose bytes count as weights of that step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.cost import is_contraction, node_flops, value_elements
from odsora_compiler.analysis.liveness import Liveness, liveness
from odsora_compiler.ir.function import Function

# A value is cheap to compute anew when that takes at most this part of the function's work, and at
# most this part of the component's weights or this many bytes of them.
_WORK_PART = 1000
_WEIGHTS_PART = 1000
_WEIGHT_BYTES = 64 * 1024
# A table of fewer bytes may be stored in every chunk that reads it.
_TABLE_BYTES = 4096
# Lowering stores no constant for these.
_NOT_FOLDED = {
    torch.ops.aten.expand.default,
    torch.ops.aten.full.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.zeros.default,
}


class Outline:
    """`function` in steps.

    `sizes`: weight → bytes, for all weights of the component's functions. `liveness` has the steps;
    `needs[s]` are the weights step s needs, `anew` the nodes that belong to no step, `light` the
    weights that such nodes read. `folded`: large constant that lowering folds → its bytes beyond
    the weights it is made of; a step that makes one needs it like a weight of that name.
    """

    def __init__(
        self, function: Function, sizes: Mapping[str, int], value_bytes: Callable[[Any], int]
    ) -> None:
        self.function = function
        self._sizes = sizes
        most_bytes = min(sum(sizes.values()) // _WEIGHTS_PART, _WEIGHT_BYTES)
        constants = _large_constants(function, value_bytes, max(most_bytes, _TABLE_BYTES))
        self._cones = _cheap_cones(function, sizes, most_bytes, constants)
        self._constants = {
            node: f"{node.name} {_value_text(node.meta['val'])}"
            for node in _kept_constants(function, constants)
        }
        self.folded = {
            name: max(constants[node] - sum(sizes[w] for w in _weights_behind(node)), 0)
            for node, name in self._constants.items()
        }
        self.anew = frozenset(self._cones)
        self.light = frozenset(name for cone in self._cones.values() for name in _weights_of(cone))
        self.liveness: Liveness = liveness(function, value_bytes, _order(function, self.anew))
        self.needs = [self._needed_by(nodes) for nodes in self.liveness.steps]
        if self.needs:
            # Outputs that no step makes come with the last one.
            self.needs[-1] |= self._needed_by([function.output_node])
        self._flat = [node for nodes in self.liveness.steps for node in nodes]
        self._first = [0]
        for nodes in self.liveness.steps:
            self._first.append(self._first[-1] + len(nodes))
        self._index = {node: index for index, node in enumerate(self._flat)}
        self._results = set(function.results.values())
        self._signatures: dict[fx.Node, int] = {}
        self._interned: dict[Any, int] = {}

    def _needed_by(self, nodes: Iterable[fx.Node]) -> set[str]:
        found: set[str] = set()
        for node in nodes:
            found |= _weights_of([node])
            if node in self._constants:
                found.add(self._constants[node])
            for used in node.all_input_nodes:
                found |= _weights_of(self._cones.get(used, ()))
        return found

    def structures(self, start: int, stops: Iterable[int]) -> list[int]:
        """For each stop, a number equal for parts of the function that compute the same.

        A part runs from position `start` to the stop. The same: the same operators on the same
        arguments, connected in the same way, with weights of the same shapes, handing on the same
        of their values. `stops` ascend.
        """
        begin = self._first[start]
        outside: dict[fx.Node, int] = {}
        digest = 0
        position = begin
        found = []
        for stop in stops:
            for index in range(position, self._first[stop]):
                node = self._flat[index]
                codes = [self._code(used, begin, outside) for used in node.all_input_nodes]
                digest = hash((digest, self._signature(node), *codes))
            position = self._first[stop]
            handed = [self._index[value.node] - begin for value in self.liveness.live[stop]]
            found.append(hash((digest, *(index for index in handed if index >= 0))))
        return found

    def _code(self, used: fx.Node, begin: int, outside: dict[fx.Node, int]) -> int:
        """How a node of the part that begins at `begin` refers to `used`."""
        if used in self._index and self._index[used] >= begin:
            return self._index[used] - begin
        if used.op == "placeholder" or used in self.anew:
            return -self._signature(used) - 1
        order = outside.setdefault(used, len(outside))
        return hash((order, self._signature_of_value(used)))

    def _signature(self, node: fx.Node) -> int:
        if node not in self._signatures:
            arguments = fx.node.map_arg((node.args, node.kwargs), _placeholder_text)
            described: tuple[Any, ...] = (
                str(node.target),
                repr(arguments),
                _value_text(node.meta["val"]),
                node in self._results,
            )
            if node in self.anew:
                described += tuple(
                    self._signature_of_value(used)
                    if used.op == "get_attr"
                    else self._signature(used)
                    for used in node.all_input_nodes
                )
            self._signatures[node] = self._intern(described)
        return self._signatures[node]

    def _signature_of_value(self, node: fx.Node) -> int:
        stored = self._sizes[str(node.target)] if node.op == "get_attr" else None
        return self._intern((stored, _value_text(node.meta["val"])))

    def _intern(self, described: Any) -> int:
        return self._interned.setdefault(described, len(self._interned))


def _placeholder_text(node: fx.Node) -> Any:
    return Ellipsis


def _value_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}"
    return repr([_value_text(item) for item in value])


def _weights_of(nodes: Iterable[fx.Node]) -> set[str]:
    """Weights that these nodes read themselves."""
    return {
        str(used.target) for node in nodes for used in node.all_input_nodes if used.op == "get_attr"
    }


def _weights_behind(node: fx.Node) -> set[str]:
    """Weights that the value of a node is made of."""
    found: set[str] = set()
    pending, seen = [node], {node}
    while pending:
        here = pending.pop()
        found |= _weights_of([here])
        new = [used for used in here.all_input_nodes if used not in seen]
        seen.update(new)
        pending += new
    return found


def _large_constants(
    function: Function, value_bytes: Callable[[Any], int], most_bytes: int
) -> dict[fx.Node, int]:
    """Operators that no input reaches and whose value is larger than `most_bytes` → its bytes.

    Broadcasts and fills are left out: lowering does not fold them.
    """
    reading = _reading_inputs(function)
    sizes = {
        node: value_bytes(node.meta["val"])
        for node in function.operators()
        if node not in reading and node.target not in _NOT_FOLDED
    }
    return {node: size for node, size in sizes.items() if size > most_bytes}


def _kept_constants(function: Function, constants: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Those of the constants that something which is not folded reads."""
    reading = _reading_inputs(function)
    return [
        node
        for node in constants
        if any(
            user.op == "output" or user in reading or user.target in _NOT_FOLDED
            for user in node.users
        )
    ]


def _cheap_cones(
    function: Function,
    sizes: Mapping[str, int],
    most_bytes: int,
    constants: Collection[fx.Node],
) -> dict[fx.Node, frozenset[fx.Node]]:
    """Nodes that are cheap to compute anew → all operators that takes, themselves included."""
    work = {node: _work(node) for node in function.operators()}
    most_work = sum(work.values()) // _WORK_PART
    cones: dict[fx.Node, frozenset[fx.Node]] = {}
    reading = _reading_inputs(function)
    for node in function.operators():
        used_nodes = node.all_input_nodes
        if any(used.op == "call_function" and used not in cones for used in used_nodes):
            continue
        cone = frozenset([node]).union(*(cones.get(used, ()) for used in used_nodes))
        if (
            _is_random(node)
            or node in constants
            or (node in reading and is_contraction(node))
            or sum(work[member] for member in cone) > most_work
            or sum(sizes[name] for name in _weights_of(cone)) > most_bytes
        ):
            continue
        cones[node] = cone
    return cones


def _order(function: Function, anew: frozenset[fx.Node]) -> list[fx.Node]:
    """The operators that are steps, those that read no input moved to where they are first read."""
    order: list[fx.Node] = []
    waiting: dict[fx.Node, None] = {}
    reading = _reading_inputs(function)
    for node in function.operators():
        if node in anew:
            continue
        if node not in reading:
            waiting[node] = None
            continue
        needed = set(node.all_input_nodes)
        for earlier in reversed(waiting):
            if earlier in needed:
                needed.update(earlier.all_input_nodes)
        order += [earlier for earlier in waiting if earlier in needed]
        waiting = {earlier: None for earlier in waiting if earlier not in needed}
        order.append(node)
    return [*order, *waiting]


def _reading_inputs(function: Function) -> set[fx.Node]:
    """Operators whose value depends on an input, or on random numbers, which have an order too."""
    reading: set[fx.Node] = set()
    for node in function.operators():
        used_nodes = node.all_input_nodes
        if _is_random(node) or any(u.op == "placeholder" or u in reading for u in used_nodes):
            reading.add(node)
    return reading


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _work(node: fx.Node) -> int:
    return max(node_flops(node), value_elements(node.meta["val"]))
