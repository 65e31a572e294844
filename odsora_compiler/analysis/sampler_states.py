"""Where the state of a sampler is: what a host hands from one step of a component to the next.

Structure only: which values are states, and which values depend on which states and calls. What the
states are made of is `analysis.sampler`'s to prove.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.arguments import operator_name
from odsora_compiler.ir.host import call_component, random_tensor
from odsora_compiler.ir.program import Program


class NotEulerError(Exception):
    """A component is not sampled by Euler steps; the text says why not."""


class SamplerStates:
    """The states of `component`'s steps in a host graph.

    `steps`: its calls, step by step. `step_of`: call → index. `argument`: the input of the calls
    that is the state. `state_of`: node → index of the step that it is the state of; the first
    state may be several nodes, copies or casts of each other, the later ones (`later`) are one
    each. `dependent`: nodes that need a call of the component. `varying`: those and what needs a
    state. Raises `NotEulerError` where no single value is handed on from step to step.
    """

    def __init__(self, program: Program, component: str) -> None:
        self.graph = program.host.graph
        self._order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.steps = program.steps(component)
        if len(self.steps) < 2:
            times = "not called" if not self.steps else "called in one step only"
            raise NotEulerError(f"it is {times}; leaving out steps needs at least 2")
        self.step_of = {call: i for i, calls in enumerate(self.steps) for call in calls}
        self.dependent = self._needing(self.step_of)
        self.argument, self.later = self._find()
        # What stands beside the state in all steps, such as the channels of an image, is no state.
        beside = set(self._carried(self.steps[1], self.argument))
        first = [n for n in self._carried(self.steps[0], self.argument) if n not in beside]
        self.state_of = dict.fromkeys(first, 0) | {z: i + 1 for i, z in enumerate(self.later)}
        self.varying = self._needing([*self.step_of, *self.state_of])
        self.behind: dict[fx.Node, set[fx.Node]] = {}
        self.direct: dict[fx.Node, set[fx.Node]] = {}
        self._follow()

    def _find(self) -> tuple[str, list[fx.Node]]:
        """The calls' argument that is the state, and the states of the second and later steps."""
        names: list[str] = []
        states: list[fx.Node] = []
        for index, calls in enumerate(self.steps[1:], 1):
            found: dict[fx.Node, list[str]] = {}
            for name in calls[0].kwargs:
                for node in self._carried(calls, name):
                    if node in self.dependent and not _carries(node):
                        found.setdefault(node, []).append(name)
            alone = [node for node in found if not self._enters_beside(calls, node)]
            if not alone:
                entering = ", ".join(sorted({name for each in found.values() for name in each}))
                raise NotEulerError(
                    f"the calls of step {index} are given results of earlier steps in several "
                    f"ways (inputs {entering or 'computed from them'}); the state must be the "
                    "only one"
                )
            state = max(alone, key=self._order.__getitem__)
            names = [name for name in found[state] if index == 1 or name in names]
            states.append(state)
        if not names:
            raise NotEulerError("the state is not the same input of its calls in all steps")
        return names[0], states

    def _carried(self, calls: Iterable[fx.Node], name: str) -> Iterator[fx.Node]:
        """An argument of `calls` and all that it is a copy, a cast or a concatenation of."""
        pending: list[Any] = [call.kwargs[name] for call in calls]
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                yield node
                if _carries(node):
                    pending += node.all_input_nodes

    def _enters_beside(self, calls: Iterable[fx.Node], state: fx.Node) -> bool:
        """Whether `calls` need the component's earlier calls otherwise than through `state`."""
        pending = [used for call in calls for used in call.all_input_nodes]
        seen = {state}
        while pending:
            node = pending.pop()
            if node in self.step_of:
                return True
            if node not in seen and node in self.dependent:
                seen.add(node)
                pending += node.all_input_nodes
        return False

    def _needing(self, sources: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(sources)
        for node in self.graph.nodes:
            if any(used in found for used in node.all_input_nodes):
                found.add(node)
        return found

    def _follow(self) -> None:
        """Fill `behind` and `direct`.

        `behind`: the states, and calls of the component, that a node depends on, no further back
        than the states. `direct`: the states and random numbers that reach it without going
        through a call of any component.
        """
        for node in self.graph.nodes:
            behind: set[fx.Node] = set()
            direct: set[fx.Node] = set()
            for used in node.all_input_nodes:
                behind |= {used} if used in self.state_of else self.behind[used]
                if used in self.step_of:
                    behind.add(used)
                if used in self.state_of or used.target is random_tensor:
                    direct.add(used)
                elif used.target is not call_component:
                    direct |= self.direct[used]
            self.behind[node], self.direct[node] = behind, direct


def _carries(node: fx.Node) -> bool:
    """Whether a node is made of the elements of its arguments, unchanged."""
    return isinstance(node.target, torch._ops.OpOverload) and operator_name(node) in CARRYING


CARRYING = {
    *("cat", "stack", "repeat", "expand", "clone", "_to_copy", "to", "alias", "detach"),
    *("contiguous", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "permute"),
    *("transpose", "repeat_interleave"),
}
