"""Running components and whole programs eagerly in PyTorch, by chunks where there is a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from odsora_compiler.ir.chunks import evaluate_chunked, split
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.host_program import HostProgram, Operation
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


def evaluate_program(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    on_call: OnCall | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Run the host graph on named `inputs`, and component functions where it calls them.

    `on_call(component, function, inputs, outputs)` sees every call. `seed` changes what random
    operations of the host draw.
    """

    def call(item: Operation, given: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        name, function = item["component"], item["function"]
        outputs = evaluate_component(program.component(name), function, given)
        if on_call is not None:
            on_call(name, function, given, outputs)
        return outputs

    return HostProgram.of(program.host).run(inputs, program.constants, call, seed)
