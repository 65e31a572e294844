"""Running components and whole programs eagerly in PyTorch, by chunks where there is a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.chunks import evaluate_chunked, split
from odsora_compiler.ir.evaluate import call_operator, check_inputs, evaluate, walk
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.program import Component, Program

# Given component, function, inputs and outputs of a call.
OnCall = Callable[[str, str, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], Any]


def evaluate_component(
    component: Component, function: str, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run a function of `component` on named `inputs`, as its plan cuts it."""
    whole = component.function(function)
    if component.plan is None:
        return evaluate(whole, component.weights, inputs)
    return evaluate_chunked(split(whole, component), component.weights, inputs)


@torch.no_grad()
def evaluate_program(
    program: Program, inputs: Mapping[str, torch.Tensor], on_call: OnCall | None = None
) -> dict[str, torch.Tensor]:
    """Run the host graph on named `inputs`, and component functions where it calls them.

    `on_call(component, function, inputs, outputs)` sees every call.
    """
    check_inputs(program.host, inputs)

    def compute(node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is not call_component:
            return call_operator(node, args, kwargs)
        name, function = args
        outputs = evaluate_component(program.component(name), function, kwargs)
        if on_call is not None:
            on_call(name, function, kwargs, outputs)
        return outputs

    return walk(program.host, None, inputs, compute)
