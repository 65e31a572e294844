"""Attention sites: the parts of a graph from the projections before an attention to the one after.

Sites are found from operators and axes alone, never from names of modules or weights. What to do
with a site is a pass's business.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from odsora_compiler.analysis.arguments import bind, operator_name
from odsora_compiler.analysis.axes import AxisAnalysis
from odsora_compiler.analysis.axes_factors import Axis, Product
from odsora_compiler.ir.function import Function


class Site(enum.Enum):
    """What kind of attention, seen from the time axis.

    SPATIAL: tokens of one frame, time is in the batch. TEMPORAL: tokens of one place, one a frame.
    JOINT: tokens of all frames and more than one place. CROSS: the keys are tokens of another
    stream, such as a text.
    """

    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    JOINT = "joint"
    CROSS = "cross"


@dataclass(frozen=True)
class AttentionSite:
    """A region around one attention, or several that share an output projection.

    `nodes`: every operator of the region through which time passes, in graph order, from the
    projections of query, key and value (`entries`) to the output projection. `exits`: those of them
    that the rest of the graph reads. `time`: the time axis of the queries.
    """

    kind: Site
    time: Axis
    attentions: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


@dataclass(frozen=True)
class UnusableSite:
    """Attentions whose time axis or region could not be found, and why."""

    attentions: tuple[fx.Node, ...]
    reason: str


def attention_sites(
    function: Function, axes: AxisAnalysis, time: str = "t"
) -> list[AttentionSite | UnusableSite]:
    """All attention sites of `function`, in graph order, `time` naming the time axis.

    Attention written out as two matrix products around a softmax is told of, as unusable.
    """
    search = _Search(function, axes, time)
    whole = [search.site(*group) for group in search.groups()]
    return sorted([*whole, *_written_out(function)], key=lambda site: site.attentions[0])


class _Search:
    def __init__(self, function: Function, axes: AxisAnalysis, time: str) -> None:
        self.function = function
        self.axes = axes
        self.time = time
        self.attentions = [
            node
            for node in function.operators()
            if operator_name(node) == "scaled_dot_product_attention"
        ]
        # Attention → the operators from its projections to its operands; a str says what is wrong.
        self.before = {node: self._before(node) for node in self.attentions}
        # Operator after attentions → one of these attentions.
        self.after: dict[fx.Node, fx.Node] = {}
        self.leader = {node: node for node in self.attentions}
        self._grow()

    def groups(self) -> Iterator[tuple[tuple[fx.Node, ...], set[fx.Node]]]:
        """Attentions that share projections behind them, with the operators up to these."""
        members: dict[fx.Node, list[fx.Node]] = {}
        for node in self.attentions:
            members.setdefault(self._leader(node), []).append(node)
        after: dict[fx.Node, set[fx.Node]] = {leader: set() for leader in members}
        for node, attention in self.after.items():
            after[self._leader(attention)].add(node)
        for leader, group in members.items():
            yield tuple(group), after[leader]

    def site(self, group: tuple[fx.Node, ...], after: set[fx.Node]) -> AttentionSite | UnusableSite:
        before: set[fx.Node] = set()
        for attention in group:
            found = self.before[attention]
            if isinstance(found, str):
                return UnusableSite(group, found)
            before |= found
        times = {self._query_time(node) for node in group}
        kinds = {self._kind(node) for node in group}
        if len(times) > 1 or len(kinds) > 1:
            return UnusableSite(group, "attentions of different kinds share one output projection")
        (time,), (kind,) = times, kinds
        assert isinstance(time, Axis)
        nodes = tuple(sorted(before | after))
        entries = tuple(
            node for node in nodes if node in before and operator_name(node) == "linear"
        )
        exits = tuple(
            node
            for node in nodes
            if node in after and any(user not in after for user in node.users)
        )
        return AttentionSite(kind, time, group, nodes, entries, exits)

    def _query_time(self, attention: fx.Node) -> Axis | str:
        query = bind(attention)["query"]
        dims = self.axes.operand(attention, query)
        found = [axis for product in dims for axis in product if axis.name == self.time]
        text = self.axes.text(query)
        if not found:
            return f"no axis '{self.time}' of more than one frame in its queries ({text})"
        if len(found) > 1:
            return f"its queries hold several axes '{self.time}' ({text})"
        if found[0] in dims[-1]:
            return f"axis '{self.time}' lies in the channels of its queries ({text})"
        return found[0]

    def _kind(self, attention: fx.Node) -> Site:
        arguments = bind(attention)
        queries: Product = self.axes.operand(attention, arguments["query"])[-2]
        keys: Product = self.axes.operand(attention, arguments["key"])[-2]
        # Keys of the same stream may have been strided: then only the names are the same.
        shared = set(queries) & set(keys) or _names(queries) & _names(keys)
        if not shared and queries != keys:
            return Site.CROSS
        if self._query_time(attention) not in queries:
            return Site.SPATIAL
        alone = all(axis.name == self.time for axis in queries)
        return Site.TEMPORAL if alone else Site.JOINT

    def _before(self, attention: fx.Node) -> set[fx.Node] | str:
        time = self._query_time(attention)
        if isinstance(time, str):
            return time
        arguments = bind(attention)
        found: set[fx.Node] = set()
        waiting = [(attention, arguments[name]) for name in ("query", "key", "value")]
        while waiting:
            user, node = waiting.pop()
            if node in found or self.axes.is_table(node) or not self._carries(user, node, time):
                continue
            if node.op == "placeholder":
                if self.axes.reached_by(self.time, node):
                    return f"no projection between input '{node.target}' and the attention"
                continue
            found.add(node)
            if operator_name(node) != "linear":
                waiting += [(node, used) for used in node.all_input_nodes]
        return found

    def _grow(self) -> None:
        """Follow every attention's value to the first projections, or to where streams join."""
        for node in self.function.operators():
            if node in self.leader:
                self.after[node] = node
                continue
            sources = [used for used in node.all_input_nodes if self._continues(used)]
            if not sources:
                continue
            others = [used for used in node.all_input_nodes if used not in sources]
            time = self._query_time(self.after[sources[0]])
            if isinstance(time, str) or any(self._joins(node, used, time) for used in others):
                continue
            self.after[node] = self.after[sources[0]]
            for used in sources[1:]:
                self.leader[self._leader(self.after[used])] = self._leader(self.after[node])

    def _continues(self, node: fx.Node) -> bool:
        return node in self.after and operator_name(node) != "linear"

    def _joins(self, user: fx.Node, node: fx.Node, time: Axis) -> bool:
        return self._carries(user, node, time) and self.axes.reached_by(self.time, node)

    def _carries(self, user: fx.Node, node: fx.Node, time: Axis) -> bool:
        value = node.meta["val"]
        count = len(value) if isinstance(value, (list, tuple)) else 1
        naming = self.axes.naming(user, node)
        return any(
            time in product
            for output in range(count)
            for product in self.axes.dims(node, naming, output)
        )

    def _leader(self, node: fx.Node) -> fx.Node:
        while self.leader[node] is not node:
            node = self.leader[node]
        return node


def _written_out(function: Function) -> Iterator[UnusableSite]:
    """Softmaxes of one matrix product that go into another."""
    behind: set[fx.Node] = set()  # computed from a product, by operators that are none themselves
    weights: dict[fx.Node, fx.Node] = {}  # computed from such a softmax → the softmax
    for node in function.operators():
        name, used_nodes = operator_name(node), node.all_input_nodes
        if name in _PRODUCTS:
            behind.add(node)
            for softmax in {weights[used] for used in used_nodes if used in weights}:
                reason = "it is written out as matrix products and a softmax"
                yield UnusableSite(
                    (softmax,), f"{reason}; write scaled_dot_product_attention to have it merged"
                )
        elif name in ("linear", "scaled_dot_product_attention"):
            continue
        elif name in ("softmax", "_softmax"):
            if any(used in behind for used in used_nodes):
                weights[node] = node
        else:
            if any(used in behind for used in used_nodes):
                behind.add(node)
            weights.update((node, weights[used]) for used in used_nodes if used in weights)


_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


def _names(product: Product) -> set[str]:
    return {axis.name for axis in product if axis.name is not None}
