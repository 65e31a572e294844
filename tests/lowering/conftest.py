"""What the lowering tests share: capturing small modules and running what they were lowered to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from odsora_compiler.frontend.export import trace_module
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import LayeredWeights, TensorWeights, WeightStore
from odsora_compiler.lowering.chunks import (
    ChunkSource,
    LoweringSettings,
    PackageReport,
    lower_chunks,
)
from odsora_compiler.lowering.rules import DEFAULT_RULES
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package

Captured = tuple[Function, WeightStore]


class Call(nn.Module):
    """A function of named tensors as a module, with parameters if need be."""

    def __init__(self, function: Callable[..., Any], **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in weights.items():
            if tensor.dtype.is_floating_point:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.weights = list(weights)

    def forward(self, **inputs: torch.Tensor) -> Any:
        own = {name: getattr(self, name) for name in self.weights}
        return {"out": self.function(**inputs, **own)}


@pytest.fixture
def captured() -> Callable[..., Captured]:
    """`captured(function, inputs, **weights)`: the function's graph and its weights."""

    def capture(
        function: Callable[..., Any] | nn.Module,
        inputs: Mapping[str, torch.Tensor],
        **weights: torch.Tensor,
    ) -> Captured:
        module = function if isinstance(function, nn.Module) else Call(function, **weights)
        graph, constants = trace_module(module, inputs, None)
        return graph, LayeredWeights(TensorWeights(module.state_dict()), TensorWeights(constants))

    return capture


@pytest.fixture
def lowered(tmp_path: Path) -> Callable[..., PackageReport]:
    """`lowered(function, weights, precision, …)`: the report of the package made of it."""
    numbers = itertools.count()

    def lower(
        function: Function,
        weights: WeightStore,
        precision: Any = "fp32",
        half_io: Collection[str] = (),
        rules: Sequence[Any] = DEFAULT_RULES,
    ) -> PackageReport:
        source = ChunkSource(f"p{next(numbers)}", {"base": function}, frozenset(half_io))
        settings = LoweringSettings(precision, rules)
        (report,) = lower_chunks([source], weights, tmp_path, settings)
        return report

    return lower


@pytest.fixture
def run() -> Callable[..., dict[str, torch.Tensor]]:
    """`run(report, inputs, function="base")`: the outputs of a package, by name."""

    def run_package(
        report: PackageReport, inputs: Mapping[str, torch.Tensor], function: str = "base"
    ) -> dict[str, torch.Tensor]:
        given = {
            item.name: inputs[item.name].to(item.dtype).reshape(item.shape)
            for item in report.functions[function].interface.inputs
        }
        return Interpreter(Package.open(report.path), function).run(given)

    return run_package
