"""Proof that a host samples by Euler steps along a flow: z ← z + v·dt with known dt.

The proof is on `analysis.linear_forms`, not on patterns: it does not matter how the author wrote it
or what anything is called. What to do with such a sampler is a pass's business.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from odsora_compiler.analysis.arguments import operator_name
from odsora_compiler.analysis.linear_forms import Form, HostConstants, LinearForms, Product
from odsora_compiler.analysis.sampler_states import CARRYING, NotEulerError, SamplerStates
from odsora_compiler.analysis.sampler_times import step_times
from odsora_compiler.ir.encoding import encode_argument
from odsora_compiler.ir.host import call_component, random_tensor
from odsora_compiler.ir.program import Program

# How far the state's coefficient may be from 1. Measured on samplers of 2 to 1000 steps: up to
# 3.0e-7 off where it is a sum of float32 numbers (flow matching by diffusers' DPM-Solver of order
# 1); where it is not meant to be 1, no nearer than 6.0e-5 (the last of 1000 steps of DDIM).
STATE_TOLERANCE = 5e-6


@dataclass(frozen=True)
class EulerStep:
    """One step: `following` = `state` + Σ coefficient · product, over `drift`.

    `size`: the sum of the coefficients, κ·(t_i − t_{i+1}) with one κ for all steps; `time`: t_i.
    `state` and `following` have equally many elements in the same order; `calls`: the component's.
    """

    calls: tuple[fx.Node, ...]
    state: fx.Node
    following: fx.Node
    drift: Mapping[Product, float]
    size: float
    time: float


@dataclass(frozen=True)
class EulerSampler:
    """All steps of a component; each one's `following` is the `state` of the next.

    What the host returns depends on the component's calls through `result` only.
    """

    component: str
    steps: tuple[EulerStep, ...]
    forms: LinearForms

    @property
    def result(self) -> fx.Node:
        """The state after the last step."""
        return self.steps[-1].following

    def remaining(self, index: int) -> float:
        """The sum of the sizes of step `index` and all after it."""
        return sum(step.size for step in self.steps[index:])

    def drift_node(self, index: int) -> tuple[fx.Node, float] | None:
        """A node that is the drift of step `index`, and how much of it the step adds.

        `following` = `state` + amount · node. Of several the first of the same dtype as
        `following`. None where the author nowhere forms the drift as a whole.
        """
        step = self.steps[index]
        like = step.following.meta["val"]
        found: list[tuple[fx.Node, float]] = []
        for node in _between(step.calls, step.following):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and value.shape == like.shape:
                amount = _ratio(step.drift, self.forms.of(node))
                if amount is not None:
                    found.append((node, amount))
        found.sort(key=lambda item: item[0].meta["val"].dtype != like.dtype)
        return found[0] if found else None


def euler_sampler(program: Program, component: str) -> EulerSampler:
    """The steps in which the host calls `component`; raises `NotEulerError` with the reason.

    Proved: each state is the one before it, once, plus multiples of values that are made of this
    step's calls alone; the multiples are known and sum to κ(t_i − t_{i+1}), where t is the
    argument of the calls that changes from step to step; the state enters the calls as it is; no
    call's result is used but through the states.
    """
    return _Proof(program, component).sampler()


class _Proof:
    def __init__(self, program: Program, component: str) -> None:
        self.host = program.host
        self.component = component
        self.states = SamplerStates(program, component)
        self.constants = HostConstants(program)
        self.forms = LinearForms(
            self.host.graph, self.constants, self.states.state_of, self.states.varying
        )

    def sampler(self) -> EulerSampler:
        made = self.states.later
        updates = [self._update(i, self.forms.definition(z)) for i, z in enumerate(made)]
        _, last, result = self._last_step()
        drifts = [*(drift for _, drift in updates), last]
        states = [updates[0][0], *made, result]
        if len({state.meta["val"].numel() for state in states}) > 1:
            raise NotEulerError("the state changes its size from step to step")
        sizes = [self._size(index, drift) for index, drift in enumerate(drifts)]
        times = step_times(self.states.steps, sizes, self.constants)
        self._compare_computed(states, drifts, times)
        columns = (self.states.steps, states, states[1:], drifts, sizes, times)
        steps = [EulerStep(tuple(calls), *rest) for calls, *rest in zip(*columns, strict=False)]
        return EulerSampler(self.component, tuple(steps), self.forms)

    # -------------------------------------------------------------- states

    def _update(self, index: int, form: Form) -> tuple[fx.Node, Form]:
        """State and drift, where `form` is the sum of both at step `index`."""
        state_of = self.states.state_of
        holding = [product for product in form if any(atom in state_of for atom in product)]
        drift = {product: c for product, c in form.items() if product not in holding}
        found = {state_of[atom]: atom for p in holding for atom in p if atom in state_of}
        if any(step > index for step in found):
            made = found[max(found)]
            raise NotEulerError(
                f"the state after step {index} is made by {_operator_text(made)} ('{made.name}'), "
                "which is not the sum of the state before it and a drift"
            )
        if found and index not in found:
            raise NotEulerError(
                f"step {index} starts again from the state of step {max(found)}: a method of "
                "several stages a step (Heun, Runge-Kutta)"
            )
        if len(found) > 1:
            self._refuse_memory(index, min(found))
        if not holding:
            self._refuse_without_state(index, drift)
        for product in drift:
            self._check_drift(index, product)
        for product in holding:
            scales = [atom for atom in product if atom not in state_of]
            if scales:
                raise NotEulerError(
                    f"in step {index} the state is scaled by '{scales[0].name}', which is not "
                    "known before the run"
                )
        ((state,), *others) = holding
        if others or abs(form[(state,)] - 1) > STATE_TOLERANCE:
            raise NotEulerError(
                f"in step {index} the state is scaled by {form[(state,)]:.6g} before the drift is "
                "added, as in DDIM or where x is predicted; an Euler step along a flow leaves it"
            )
        return state, drift

    def _check_drift(self, index: int, product: Product) -> None:
        """Raise unless a term of the drift is made of the calls of step `index` alone."""
        atoms = [atom for atom in product if self.forms.varies(atom)]
        near = {node for atom in product for node in (atom, *self.states.direct[atom])}
        if any(node.target is random_tensor for node in near):
            raise NotEulerError(f"step {index} adds noise to the state")
        if not atoms:
            what = " · ".join(f"'{atom.name}'" for atom in product) or "a number"
            raise NotEulerError(f"step {index} adds {what} to the state, which no call gives")
        (atom,) = atoms
        if self.states.direct[atom] & self.states.state_of.keys():
            raise NotEulerError(
                f"in step {index} '{atom.name}' ({_operator_text(atom)}) is computed from the "
                "state itself, not only from what the calls give for it"
            )
        behind = self.states.behind[atom]
        earlier = [self.states.step_of[node] for node in behind & self.states.step_of.keys()]
        older = [self.states.state_of[node] for node in behind & self.states.state_of.keys()]
        if min(earlier + older) != index:
            self._refuse_memory(index, min(earlier + older))

    def _refuse_memory(self, index: int, earlier: int) -> NoReturn:
        raise NotEulerError(
            f"step {index} uses the state or drift of step {earlier} again, as multistep methods "
            "do (Adams-Bashforth, DPM++, UniPC)"
        )

    def _refuse_without_state(self, index: int, drift: Form) -> NoReturn:
        """Say why the state of step `index` is not in the next one."""
        later, dependent = self.states.later, self.states.dependent
        # A state that is a multiple of a value with which the sampler goes on.
        for entering in later[max(index - 1, 0) : index + 1]:
            if operator_name(entering) in ("mul", "div"):
                (source, *_) = (node for node in entering.all_input_nodes if node in dependent)
                if len(source.users) > 1:
                    raise NotEulerError(
                        f"the state enters the calls scaled: '{entering.name}' is "
                        f"{_operator_text(entering)} of '{source.name}', on which it goes on"
                    )
        for product in drift:
            if any(self.forms.varies(atom) for atom in product):
                self._check_drift(index, product)
        raise NotEulerError(
            f"the state after step {index} is not the sum of the state before it and a drift"
        )

    def _last_step(self) -> tuple[fx.Node, Form, fx.Node]:
        """State and drift of the last step, and the node all outputs depend on it through."""
        index = len(self.states.steps) - 1
        last_calls = set(self.states.steps[-1])
        reasons: list[str] = []
        for node in self.host.graph.nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor) or not (
                last_calls & self.states.behind[node]
            ):
                continue
            form = self.forms.of(node)
            if not any(atom in self.states.state_of for product in form for atom in product):
                continue
            try:
                state, drift = self._update(index, form)
            except NotEulerError as error:
                reasons.append(str(error))
                continue
            around = self._way_around(node)
            if not around:
                return state, drift, node
            reasons.insert(0, around)
        if not reasons:
            self._refuse_without_state(index, {})
        raise NotEulerError(reasons[0])

    def _way_around(self, result: fx.Node) -> str:
        """Which output depends on the calls otherwise than through `result`; empty when none."""
        for name, output in self.host.results.items():
            pending, seen = [output], {result}
            while pending:
                node = pending.pop()
                if node in self.states.step_of:
                    return (
                        f"output '{name}' needs step {self.states.step_of[node]} otherwise than "
                        "through the last state: states or drifts of single steps are used again"
                    )
                if node not in seen:
                    seen.add(node)
                    pending += node.all_input_nodes
        return ""

    # -------------------------------------------------------------- drifts

    def _size(self, index: int, drift: Form) -> float:
        """The sum of the coefficients; raises where it is no number."""
        total: Form = {}
        for product, coefficient in drift.items():
            scales = tuple(atom for atom in product if not self.forms.varies(atom))
            total[scales] = total.get(scales, 0.0) + coefficient
        largest = max((abs(coefficient) for coefficient in drift.values()), default=0.0)
        for scales, coefficient in total.items():
            if scales and abs(coefficient) > STATE_TOLERANCE * largest:
                raise NotEulerError(
                    f"the size of step {index} depends on '{scales[0].name}', which is not known "
                    "before the run"
                )
        return total.get((), 0.0)

    def _compare_computed(
        self, states: Iterable[fx.Node], drifts: Iterable[Form], times: Iterable[float]
    ) -> None:
        """Refuse drifts that some steps compute otherwise, by what is not looked into.

        A step's size could hide there: in operators, and in other components that are given what
        the calls give. It cannot in operators that pick parts of what calls give, so that steps
        with and without guidance are no matter.
        """
        varied = [{a for product in drift for a in product} for drift in drifts]
        looked_at = [
            [a for a in atoms if self.forms.varies(a) and not self._picks(a)] for atoms in varied
        ]
        # A constant of all steps is not the time, even where it equals that of one of them.
        used = [self._constants_behind(atoms) for atoms in looked_at]
        fixed = set.intersection(*({self._digest(node) for node in nodes} for nodes in used))
        of_first: set[str] | None = None
        for index, (state, time, atoms) in enumerate(zip(states, times, looked_at, strict=False)):
            step = _Step(state, time, fixed, {})
            computed = {self._signature(atom, step) for atom in atoms}
            if of_first is not None and computed != of_first:
                raise NotEulerError(
                    f"the drift of step {index} is computed otherwise than that of step 0, by "
                    "operators or other components in which the size of the step could hide"
                )
            of_first = computed

    def _constants_behind(self, atoms: Iterable[fx.Node]) -> set[fx.Node]:
        """The constants that `atoms` are made of, no further back than calls and states."""
        ends = self.states.step_of.keys() | self.states.state_of.keys()
        pending, seen, found = list(atoms), set[fx.Node](), set[fx.Node]()
        while pending:
            node = pending.pop()
            if self.constants.tensor(node) is not None:
                found.add(node)
            elif node not in seen and node not in ends:
                seen.add(node)
                pending += node.all_input_nodes
        return found

    def _digest(self, node: fx.Node) -> str:
        """What tells a constant from others."""
        value = self.constants.tensor(node)
        assert value is not None
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"constant {value.dtype} {list(value.shape)} {hashlib.sha256(raw).hexdigest()}"

    def _picks(self, node: fx.Node) -> bool:
        """Whether a node is part of what a call gives, as it is.

        A call of the component, or of another one that works beside it, such as a network for
        guidance; not of one that is given what the component's calls give.
        """
        pending = [node]
        while pending:
            node = pending.pop()
            if node.target is call_component:
                own = self.states.step_of
                if node not in own and self.states.behind[node] & own.keys():
                    return False
                continue
            if not (node.target is operator.getitem or operator_name(node) in _PICKING):
                return False
            pending += node.all_input_nodes
        return True

    def _signature(self, node: fx.Node, step: _Step) -> str:
        """A digest of how a node is computed from what a step is given: equal in steps alike.

        Given are the results of its calls, its state and its time: the drift may be any function of
        these, and its size is how much of it is added.
        """
        if node in step.known:
            return step.known[node]
        if node in self.states.step_of:
            text = f"call {self.states.steps[self.states.step_of[node]].index(node)}"
        elif node is step.state:
            text = "state"
        elif self.constants.tensor(node) is not None:
            text = self._digest(node)
            if text not in step.fixed and self.constants.number(node) == step.time:
                text = "time"
        elif node.op != "call_function":
            text = f"{node.op} {node.target}"
        else:
            parts = {used.name: self._signature(used, step) for used in node.all_input_nodes}
            given = encode_argument([node.args, *node.kwargs.items()])
            text = f"{node.target} {_with_names(given, parts)}"
        step.known[node] = hashlib.sha256(text.encode()).hexdigest()
        return step.known[node]


@dataclass(frozen=True)
class _Step:
    """What the drift of a step may be made of, and the signatures `known` in it.

    `fixed`: digests of the constants that all steps have.
    """

    state: fx.Node
    time: float
    fixed: set[str]
    known: dict[fx.Node, str]


# Operators whose result is made of elements of their arguments, all or some of them.
_PICKING = {*CARRYING, "slice", "select", "split", "split_with_sizes", "unbind", "index_select"}


def _ratio(wanted: Mapping[Product, float], form: Form) -> float | None:
    """The number by which `form` must be multiplied to be `wanted`."""
    if form.keys() != wanted.keys():
        return None
    largest = max(wanted, key=lambda product: abs(wanted[product]))
    ratio = wanted[largest] / form[largest]
    limit = STATE_TOLERANCE * abs(wanted[largest])
    return ratio if all(abs(wanted[p] - ratio * form[p]) <= limit for p in wanted) else None


def _between(calls: Iterable[fx.Node], result: fx.Node) -> list[fx.Node]:
    """The nodes made of `calls` that `result` is made of, in order; neither of both."""
    after: set[fx.Node] = set()
    pending = [user for call in calls for user in call.users]
    while pending:
        node = pending.pop()
        if node not in after and node < result:
            after.add(node)
            pending += node.users
    used: set[fx.Node] = set()
    pending = list(result.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in after and node not in used:
            used.add(node)
            pending += node.all_input_nodes
    return sorted(used)


def _operator_text(node: fx.Node) -> str:
    return operator_name(node) if node.op == "call_function" else str(node.op)


def _with_names(argument: Any, names: Mapping[str, str]) -> Any:
    """Encoded arguments with each node's name replaced."""
    if isinstance(argument, list):
        return [_with_names(item, names) for item in argument]
    if isinstance(argument, dict) and "node" in argument:
        return names[argument["node"]]
    return argument
