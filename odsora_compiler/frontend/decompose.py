"""Taking view-like composite operators apart (`unflatten`, `chunk`, `flatten`, …), call by call.

`ExportedProgram.run_decompositions` does the same by tracing the whole program a second time, which
takes longer than the first. Here each combination of operator and shapes is traced once. Composite
operators that make new values (`linear`, attention, …) stay whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from odsora_compiler.ir.inference import FAKE_MODE, call_key


@dataclass(frozen=True)
class _Reference:
    """The n-th tensor argument (`step` -1), or the n-th tensor that step `step` returned."""

    step: int
    index: int


@dataclass(frozen=True)
class _Step:
    target: Any
    args: Any
    kwargs: Any
    parts: int | None  # tensors in the list it returns; None where it returns one tensor


@dataclass(frozen=True)
class Recipe:
    """What a composite call consists of. `result` is a tree of references."""

    steps: tuple[_Step, ...]
    result: Any

    def replay(
        self,
        arguments: list[Any],
        call: Callable[[Any, Any, Any], Any],
        item: Callable[[Any, int], Any],
    ) -> Any:
        """Make the calls through `call(target, args, kwargs)`; returns the result.

        `arguments`: what stands for the tensor arguments. `item(value, index)` takes one tensor out
        of what a call with several gave.
        """
        made: list[list[Any]] = []

        def resolve(tree: Any) -> Any:
            def value(reference: Any) -> Any:
                if reference.step < 0:
                    return arguments[reference.index]
                return made[reference.step][reference.index]

            return pytree.tree_map_only(_Reference, value, tree)

        for step in self.steps:
            value = call(step.target, resolve(step.args), resolve(step.kwargs))
            if step.parts is None:
                made.append([value])
            else:
                made.append([item(value, index) for index in range(step.parts)])
        return resolve(self.result)


def can_take_apart(graph: fx.Graph) -> bool:
    """Whether all operators are plain.

    One that writes in place, holds a graph of its own, or may do either depending on its arguments
    (batch norm) needs the whole program to be traced again.
    """
    return not graph.find_nodes(op="get_attr") and all(
        node.target is operator.getitem or _is_plain(node.target)
        for node in graph.nodes
        if node.op == "call_function"
    )


def is_composite_view(target: Any) -> bool:
    """Whether `target` is made of other operators and may return a view of its argument."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and (_aliases(target) or target in _IDLE_IN_EVALUATION)
        and torch._C._dispatch_has_kernel_for_dispatch_key(
            target.name(), "CompositeImplicitAutograd"
        )
    )


# These return their argument when the model is not in training.
_IDLE_IN_EVALUATION = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
}


def _is_plain(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    unclear = torch.Tag.maybe_aliasing_or_mutating in target.tags
    return not unclear or _aliases(target) or target in _IDLE_IN_EVALUATION


def _aliases(target: torch._ops.OpOverload) -> bool:
    return any(argument.alias_info is not None for argument in target._schema.arguments)


_RECIPES: dict[Any, Recipe] = {}


def recipe(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Recipe:
    """The recipe of a call on fake tensors; traced once per operator, shapes and literals."""
    key = call_key(target, args, kwargs)
    if key not in _RECIPES:
        _RECIPES[key] = _trace(target, args, kwargs)
    return _RECIPES[key]


def _trace(target: Any, args: Any, kwargs: Mapping[str, Any]) -> Recipe:
    given = list(_tensors((args, kwargs)))
    recorder = _Recorder(given)
    with torch.no_grad(), FAKE_MODE, recorder:
        result = target(*args, **kwargs)
    return Recipe(tuple(recorder.steps), recorder.referenced(result))


class _Recorder(TorchDispatchMode):
    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._known = {id(tensor): _Reference(-1, index) for index, tensor in enumerate(given)}
        # Ids are of living objects only.
        self._alive: list[torch.Tensor] = list(given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        referenced_args, referenced_kwargs = self.referenced(args), self.referenced(kwargs)
        result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        if not outputs:  # a question about the argument, such as which device it is on
            return result
        for index, tensor in enumerate(outputs):
            self._known[id(tensor)] = _Reference(len(self.steps), index)
            self._alive.append(tensor)
        parts = None if isinstance(result, torch.Tensor) else len(outputs)
        self.steps.append(_Step(func, referenced_args, referenced_kwargs, parts))
        return result

    def referenced(self, tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda tensor: self._known[id(tensor)], tree)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
