"""Which values are alive where in a function, and how many bytes would cross a cut there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import tensor_bytes


@dataclass(frozen=True)
class Value:
    """What a node computes: its size, the step that makes it and the last step that reads it."""

    node: fx.Node
    bytes: int
    made: int
    last_read: int


@dataclass(frozen=True)
class Liveness:
    """A function as numbered steps, and the values alive between them.

    A step is an operator together with the `getitem`s that take its parts. Position p lies before
    step p; the last one, `len(steps)`, after all. `live[p]`: values made before position p and read
    after it, in the order they are made. Inputs, weights and the function's outputs do not count as
    alive: whoever runs the function holds them anyway. `input_reads`: the last step that reads each
    input, -1 where none does.
    """

    function: Function
    steps: tuple[tuple[fx.Node, ...], ...]
    live: tuple[tuple[Value, ...], ...]
    input_reads: tuple[int, ...]

    def inputs_after(self, position: int) -> int:
        """How many of the function's inputs are read at or after `position`."""
        return sum(last >= position for last in self.input_reads)

    def live_after(self, node: fx.Node) -> tuple[Value, ...]:
        """Values alive once the step of `node` is done."""
        (step,) = [index for index, nodes in enumerate(self.steps) if node in nodes]
        return self.live[step + 1]

    def crossing_bytes(self, position: int) -> int:
        """Bytes of the values alive at `position`."""
        return sum(value.bytes for value in self.live[position])

    def can_cut(self, position: int) -> bool:
        """Whether all that is alive at `position` are tensors (not the parts of one, unsplit)."""
        return all(isinstance(v.node.meta["val"], torch.Tensor) for v in self.live[position])


def liveness(
    function: Function,
    value_bytes: Callable[[Any], int] = tensor_bytes,
    order: Iterable[fx.Node] | None = None,
) -> Liveness:
    """Liveness of `function`'s values.

    `value_bytes` measures a node's `meta['val']`. `order`: the operators in the order in which they
    run (None: all, as the graph has them); one left out is no step and never alive.
    """
    steps: list[list[fx.Node]] = []
    step_of: dict[fx.Node, int] = {}
    for node in function.operators() if order is None else order:
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, fx.Node) and producer in step_of:
            step_of[node] = step_of[producer]
            steps[step_of[node]].append(node)
        else:
            step_of[node] = len(steps)
            steps.append([node])

    ending: list[list[fx.Node]] = [[] for _ in steps]
    last_read: dict[fx.Node, int] = {}
    for node, made in step_of.items():
        readers = [step_of[user] for user in node.users if user in step_of]
        last_read[node] = max(readers, default=made)
        ending[last_read[node]].append(node)

    alive: dict[fx.Node, Value] = {}
    live: list[tuple[Value, ...]] = [()]
    for index, nodes in enumerate(steps):
        for node in ending[index]:
            alive.pop(node, None)
        for node in nodes:
            if last_read[node] > index:
                size = value_bytes(node.meta["val"])
                alive[node] = Value(node, size, index, last_read[node])
        live.append(tuple(alive.values()))
    input_reads = tuple(
        max((step_of[user] for user in node.users if user in step_of), default=-1)
        for node in function.placeholders
    )
    return Liveness(function, tuple(map(tuple, steps)), tuple(live), input_reads)
