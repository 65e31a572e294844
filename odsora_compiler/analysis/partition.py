"""Cutting the functions of a component into chunks that hold at most so many bytes of weights.

Pure: outlines in, cut positions out. Where the functions can be cut is the nodes of a networkx
graph, a chunk that fits the budget is an edge, and the plan a shortest path under `COST`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import networkx as nx
from torch import fx

from odsora_compiler.analysis.cost import node_flops
from odsora_compiler.analysis.outline import Outline

COST = (
    "Between two uses of weights a cut goes where the fewest bytes cross. Of the plans these cuts "
    "allow: (1) fewest bytes that a chunk hands on to later ones or stores of a weight that another"
    " chunk has too; (2) fewest chunks; (3) most chunks of equal structure; (4) smallest sum of "
    "squares of the chunks' weights; (5) earliest cuts."
)
PACED_COST = COST.replace(
    "; (2)",
    ", and that could be read while reading a chunk waits for computing it or computing for "
    "reading; (2)",
)
NARROW_COST = (
    "(1) Least memory for a chunk and its activations, where they need most; (2) fewest chunks."
)


@dataclass(frozen=True)
class Pace:
    """How fast a device reads weights and computes, to cut so that neither waits for the other.

    `streamed`: part of the weights that is read for every call, the rest staying in memory.
    `bytes_per_flop`: function → bytes that are read in the time one FLOP of it takes, times its
    part of the calls.
    """

    streamed: float
    bytes_per_flop: Mapping[str, float]


@dataclass(frozen=True)
class Span:
    """What lies between two points: a possible chunk.

    `weight_bytes`: its distinct weights. `handed_bytes`: values made in it and read after it, in
    all functions.
    """

    start: int
    stop: int
    weight_bytes: int
    handed_bytes: int


class CutPoints:
    """Where all functions of a component can be cut at once, in order.

    `points[k]` has one position for each function; the first point lies before everything, the last
    after everything. At a point the functions' weights are split in the same way: a weight of
    several functions lies before it, after it or on both sides in all of them.
    """

    def __init__(self, outlines: Sequence[Outline], sizes: Mapping[str, int]) -> None:
        self.outlines = outlines
        self.sizes = {**sizes}
        for outline in outlines:
            self.sizes |= outline.folded
        self.points = _aligned_points(outlines)
        self._needs = [
            [
                set().union(*outline.needs[start:stop])
                for outline, start, stop in zip(outlines, *ends, strict=True)
            ]
            for ends in pairwise(self.points)
        ]
        self._light = set().union(*(outline.light for outline in outlines))
        self._fresh = _first_uses([set().union(*needs) for needs in self._needs])
        self._unaligned = self._find_unaligned()
        self._alive = [
            [_made_and_bytes(outline, p) for outline, p in zip(outlines, point, strict=True)]
            for point in self.points
        ]
        self._flops = [_flops_before(outline) for outline in outlines]

    @property
    def last(self) -> int:
        """Index of the last point."""
        return len(self.points) - 1

    @property
    def aligned(self) -> bool:
        """Whether a chunk can begin and end at any two points."""
        return not self._unaligned

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, and of constants that lowering folds."""
        return sum(self.sizes.values())

    def heaviest(self, span: Span) -> fx.Node:
        """The node of `span` that needs most bytes of weights."""
        steps = [
            (sum(self.sizes[name] for name in outline.needs[step]), outline.liveness.steps[step][0])
            for which, outline in enumerate(self.outlines)
            for step in range(self.points[span.start][which], self.points[span.stop][which])
        ]
        return max(steps, key=lambda item: item[0])[1]

    def spans(self, start: int, budget: int | None = None) -> Iterator[tuple[Span, int]]:
        """Possible chunks from point `start` on within `budget`, each with cost (1) in bytes."""
        weight_bytes = stored = 0
        for stop in range(start + 1, self.last + 1):
            for name, before in self._fresh[stop - 1]:
                if before < start:
                    weight_bytes += self.sizes[name]
                    stored += 0 if name in self._light else self.sizes[name]
            if budget is not None and weight_bytes > budget:
                return
            if self._unaligned and not self._same_weights(start, stop):
                continue
            handed = self._handed(start, stop)
            yield Span(start, stop, weight_bytes, handed), handed + stored

    def waiting(self, span: Span, pace: Pace) -> int:
        """Bytes that could be read while `span` is read or computed, whichever takes longer.

        Added up over chunks, this is as long as a run takes in which each chunk is read while one
        like it computes: the least sum is the one with the least waiting.
        """
        computing = 0.0
        for outline, flops, start, stop in zip(
            self.outlines,
            self._flops,
            self.points[span.start],
            self.points[span.stop],
            strict=True,
        ):
            rate = pace.bytes_per_flop.get(outline.function.name, 0.0)
            computing += (flops[stop] - flops[start]) * rate
        return int(max(pace.streamed * span.weight_bytes, computing))

    def _handed(self, start: int, stop: int) -> int:
        """Bytes of values made between the points and alive at the second."""
        total = 0
        for begin, (made, remaining) in zip(self.points[start], self._alive[stop], strict=True):
            total += remaining[bisect_left(made, begin)]
        return total

    def _find_unaligned(self) -> list[list[list[int]]]:
        """The segments of each weight that functions use in different ones, per function."""
        places: dict[str, list[list[int]]] = {}
        for index, needs in enumerate(self._needs):
            for which, names in enumerate(needs):
                for name in names - self._light:
                    places.setdefault(name, [[] for _ in needs])[which].append(index)
        used = [[each for each in lists if each] for lists in places.values()]
        return [lists for lists in used if any(each != lists[0] for each in lists)]

    def _same_weights(self, start: int, stop: int) -> bool:
        return all(
            len({any(start <= place < stop for place in places) for places in used}) == 1
            for used in self._unaligned
        )


def partition(points: CutPoints, budget: int, pace: Pace | None = None) -> list[Span] | None:
    """The best chunks of at most `budget` bytes of weights; None: there are none.

    Best under `COST`, with a `pace` under `PACED_COST`.
    """
    *_, (whole, _) = points.spans(0)
    if whole.weight_bytes <= budget:
        return [whole]
    graph = nx.DiGraph()
    reached = {0}
    for start in range(points.last):
        if start not in reached:
            continue
        for span, cost in points.spans(start, budget):
            reached.add(span.stop)
            cost += points.waiting(span, pace) if pace else 0
            graph.add_edge(start, span.stop, span=span, bytes=cost)
    if points.last not in reached:
        return None
    # A path has fewer edges than there are points, so both criteria fit in one whole number.
    graph = _cheapest(graph, lambda edge: edge["bytes"] * len(points.points) + 1)
    graph = _most_alike(graph, points)
    graph = _cheapest(graph, lambda edge: edge["span"].weight_bytes ** 2)
    graph = _cheapest(graph, lambda edge: edge["span"].stop)
    path = nx.shortest_path(graph, 0, points.last)
    return [graph.edges[ends]["span"] for ends in pairwise(path)]


def least_budget(points: CutPoints) -> Span:
    """The chunk that decides the smallest possible budget: its `weight_bytes` are that budget."""
    worst: dict[int, Span] = {0: Span(0, 0, 0, 0)}
    for start in range(points.last):
        if start not in worst:
            continue
        known = worst.get(points.last)
        for span, _ in points.spans(start, known.weight_bytes if known else None):
            larger = max(worst[start], span, key=lambda item: item.weight_bytes)
            if span.stop not in worst or larger.weight_bytes < worst[span.stop].weight_bytes:
                worst[span.stop] = larger
    return worst[points.last]


def finest(points: CutPoints) -> list[Span]:
    """As many chunks as there can be."""
    count = {0: 0}
    before: dict[int, Span] = {}
    for start in range(points.last):
        for span, _ in points.spans(start) if start in count else ():
            if count[start] >= count.get(span.stop, 0):
                count[span.stop] = count[start] + 1
                before[span.stop] = span
            if points.aligned:
                break
    chunks: list[Span] = []
    while not chunks or chunks[-1].start:
        chunks.append(before[chunks[-1].start if chunks else points.last])
    return chunks[::-1]


# ------------------------------------------------------------------ cut points


def _aligned_points(outlines: Sequence[Outline]) -> list[tuple[int, ...]]:
    """Positions per function, between groups of steps that must be on one side of every cut."""
    light = set().union(*(outline.light for outline in outlines))
    # Per function, the steps that need weights worth cutting for.
    heavy = [
        [step for step, names in enumerate(outline.needs) if names - light] for outline in outlines
    ]
    order = nx.DiGraph()
    uses: dict[str, list[list[tuple[int, int]]]] = defaultdict(lambda: [[] for _ in outlines])
    for which, outline in enumerate(outlines):
        for ordinal, step in enumerate(heavy[which]):
            node = (ordinal, which)
            order.add_node(node)
            if ordinal:
                order.add_edge((ordinal - 1, which), node)
            for name in sorted(outline.needs[step] - light):
                uses[name][which].append(node)
    for lists in uses.values():
        _tie([places for places in lists if places], order)

    groups = nx.condensation(order)
    members = groups.nodes(data="members")
    done = [0] * len(outlines)  # heavy steps before the cut
    points = [tuple(0 for _ in outlines)]
    for group in nx.lexicographical_topological_sort(groups, key=lambda g: min(members[g])):
        for ordinal, which in members[group]:
            done[which] = max(done[which], ordinal + 1)
        cut = [_narrowest(*each) for each in zip(outlines, heavy, done, strict=True)]
        found = tuple(position for position in cut if position is not None)
        if len(found) == len(outlines):
            points.append(found)
    end = tuple(len(outline.needs) for outline in outlines)
    return [*points[:-1], end] if len(points) > 1 else [points[0], end]


def _tie(lists: list[list[tuple[int, int]]], order: nx.DiGraph) -> None:
    """Keep the uses of one weight in several functions on the same side of every cut."""
    for first, second in pairwise(lists):
        if len(first) == len(second):
            pairs = list(zip(first, second, strict=True))
        else:
            pairs = [(first[0], second[0]), (first[-1], second[-1])]
        for one, other in pairs:
            order.add_edges_from([(one, other), (other, one)])


def _narrowest(outline: Outline, heavy: list[int], done: int) -> int | None:
    """The first position after `done` heavy steps where the fewest bytes cross, if there is one.

    Inputs of the function cost nothing to cross; where bytes are equal, fewer of them still to come
    decide, so that a cut lies behind the sum `input + layer(input)` as it does in later blocks.
    """
    first = heavy[done - 1] + 1 if done else 0
    last = heavy[done] if done < len(heavy) else len(outline.needs)
    positions = [p for p in range(first, last + 1) if outline.liveness.can_cut(p)]
    crossing = {p: outline.liveness.crossing_bytes(p) for p in positions}
    fewest = min(crossing.values(), default=0)
    least = [p for p in positions if crossing[p] == fewest]
    return min(least, key=outline.liveness.inputs_after, default=None)


def _first_uses(needs: Sequence[set[str]]) -> list[list[tuple[str, int]]]:
    """Per segment, its weights and the segment before in which each was last needed (or -1)."""
    last: dict[str, int] = {}
    fresh = []
    for index, names in enumerate(needs):
        fresh.append([(name, last.get(name, -1)) for name in sorted(names)])
        last.update(dict.fromkeys(names, index))
    return fresh


def _flops_before(outline: Outline) -> list[int]:
    """FLOPs of the steps before each position."""
    steps = (sum(map(node_flops, nodes)) for nodes in outline.liveness.steps)
    return list(accumulate(steps, initial=0))


def _made_and_bytes(outline: Outline, position: int) -> tuple[list[int], list[int]]:
    """Steps that made the values alive at `position`, and the bytes of each value and all later."""
    values = outline.liveness.live[position]
    sizes = accumulate((value.bytes for value in reversed(values)), initial=0)
    return [value.made for value in values], list(sizes)[::-1]


# ------------------------------------------------------------------ shortest paths


def _cheapest(graph: nx.DiGraph, cost: Callable[[dict[str, Any]], int]) -> nx.DiGraph:
    """The part of `graph` that lies on cheapest paths from its first to its last node."""
    first, last = min(graph), max(graph)

    def weight(_: int, __: int, edge: dict[str, Any]) -> int:
        return cost(edge)

    ahead = nx.single_source_dijkstra_path_length(graph, first, weight=weight)
    behind = nx.single_source_dijkstra_path_length(graph.reverse(copy=False), last, weight=weight)
    kept = nx.DiGraph()
    kept.add_edges_from(
        (start, stop, edge)
        for start, stop, edge in graph.edges(data=True)
        if start in ahead
        and stop in behind
        and ahead[start] + cost(edge) + behind[stop] == ahead[last]
    )
    return kept


def _most_alike(graph: nx.DiGraph, points: CutPoints) -> nx.DiGraph:
    """The part of `graph` on paths with most chunks of one structure, then of a second, and so on.

    All paths have equally many chunks, so a path with most chunks of a structure is one with fewest
    of others: a shortest path again. Of structures that tie, the one with the smallest sum of
    squares counts, then the one that occurs first.
    """
    _mark_structures(graph, points)
    settled: set[Any] = set()
    while True:
        occurrences: dict[Any, list[Span]] = defaultdict(list)
        for _, _, edge in graph.edges(data=True):
            occurrences[edge["structure"]].append(edge["span"])
        most = {key: _disjoint(spans) for key, spans in occurrences.items() if key not in settled}
        best: tuple[int, ...] = (2,)
        chosen = None
        for key in sorted(most, key=lambda key: (-most[key], key)):
            if most[key] < best[0]:
                break
            kept = _cheapest(graph, partial(_differs, key))
            path = nx.shortest_path(kept, min(kept), max(kept))
            count = sum(kept.edges[ends]["structure"] == key for ends in pairwise(path))
            first = min(span.start for span in occurrences[key])
            rank = (count, -_sum_of_squares(kept), -first)
            if rank > best:
                best, chosen, chosen_graph = rank, key, kept
        if chosen is None:
            return graph
        graph = chosen_graph
        settled.add(chosen)


def _differs(structure: Any, edge: dict[str, Any]) -> int:
    return int(edge["structure"] != structure)


def _mark_structures(graph: nx.DiGraph, points: CutPoints) -> None:
    for start in graph:
        stops = sorted(graph.successors(start))
        keys = zip(
            *(
                outline.structures(
                    points.points[start][which], (points.points[s][which] for s in stops)
                )
                for which, outline in enumerate(points.outlines)
            ),
            strict=True,
        )
        for stop, key in zip(stops, keys, strict=True):
            graph.edges[start, stop]["structure"] = key


def _disjoint(spans: list[Span]) -> int:
    """How many of `spans` can be chosen without overlap, at most."""
    count = end = 0
    for span in sorted(spans, key=lambda span: span.stop):
        if span.start >= end:
            count, end = count + 1, span.stop
    return count


def _sum_of_squares(graph: nx.DiGraph) -> int:
    cost = nx.single_source_dijkstra_path_length(
        graph, min(graph), weight=lambda _, __, edge: edge["span"].weight_bytes ** 2
    )
    total: int = cost[max(graph)]
    return total
