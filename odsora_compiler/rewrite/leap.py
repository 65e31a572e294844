"""Leaving an Euler sampler before its end: the nodes of a leap, and where they go."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import fx

from odsora_compiler.analysis.sampler import EulerSampler
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.host import first_true

aten = torch.ops.aten


@dataclass
class Leap:
    """Makes the nodes of leaps, each before the state that its step ends in.

    A leap at step n is z_n + v_n · (the sizes of step n and all after it).
    """

    editor: Editor
    sampler: EulerSampler
    drifts: dict[int, tuple[fx.Node, float]] = field(default_factory=dict)

    def go_to(self, index: int) -> None:
        """Place what is made next in step `index`."""
        self.editor.before(self.sampler.steps[index].following)

    def value(self, index: int) -> fx.Node:
        """The state when the drift of step `index` is followed to the end."""
        self.go_to(index)
        step = self.sampler.steps[index]
        drift, amount = self.drift(index)
        whole = amount * self.sampler.remaining(index) / step.size
        moved = self.editor.call(aten.mul.Tensor, drift, whole)
        made = self.editor.call(aten.add.Tensor, self._shaped(step.state), moved)
        dtype = self.sampler.result.meta["val"].dtype
        if made.meta["val"].dtype != dtype:
            made = self.editor.call(aten._to_copy.default, made, dtype=dtype)
        return made

    def drift(self, index: int) -> tuple[fx.Node, float]:
        """The drift of step `index` in the shape of the result, and how much of it is added.

        In all steps of one direction: the amounts have the sign of the sizes.
        """
        if index not in self.drifts:
            node, amount = self.sampler.drift_node(index) or (self._sum(index), 1.0)
            # Authors may form the drift in one step and its negative in another.
            if amount * self.sampler.steps[index].size < 0:
                node, amount = self.editor.call(aten.neg.default, node), -amount
            self.drifts[index] = self._shaped(node), amount
        return self.drifts[index]

    def merge(self, exits: list[fx.Node]) -> None:
        """Let the value of the first exit that is taken stand for the result."""
        result = self.sampler.result
        graph = self.editor.graph
        with graph.inserting_after(result):
            merge = graph.call_function(first_true, (exits, result))
        merge.meta["val"] = result.meta["val"]
        merge.meta["provenance"] = result.meta["provenance"].by(self.editor.author)
        self.editor.replace(result, merge)
        _move_what_stays(graph, exits[0], merge)

    def _sum(self, index: int) -> fx.Node:
        """What step `index` adds, formed from its terms."""
        call = self.editor.call
        terms = []
        for (first, *scales), coefficient in self.sampler.steps[index].drift.items():
            term = call(aten.mul.Tensor, self._shaped(first), coefficient)
            for scale in scales:
                term = call(aten.mul.Tensor, term, self._shaped(scale))
            terms.append(term)
        return functools.reduce(lambda total, term: call(aten.add.Tensor, total, term), terms)

    def _shaped(self, node: fx.Node) -> fx.Node:
        shape = self.sampler.result.meta["val"].shape
        if node.meta["val"].numel() == shape.numel() and node.meta["val"].shape != shape:
            return self.editor.call(aten.view.default, node, list(shape))
        return node


def _move_what_stays(graph: fx.Graph, start: fx.Node, merge: fx.Node) -> None:
    """Move before `start`, the first exit, what is made after it and needed after `merge`."""
    inside = [node for node in graph.nodes if start < node < merge]
    stays: set[fx.Node] = set()
    for node in reversed(inside):
        if any(user > merge or user in stays for user in node.users):
            stays.add(node)
    for node in (node for node in inside if node in stays):
        start.prepend(node)
