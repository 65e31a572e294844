"""Building a module without its weights, for when they come from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from odsora_compiler.ir.weights import WeightSpec


@contextmanager
def weightless() -> Iterator[None]:
    """Within it, parameters that modules register hold no data (they are on the meta device).

    Their initialisation costs nothing. Buffers keep their values: tables computed in constructors
    are part of the model, not of its weights.
    """
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    # `module.weight = Parameter(…)` goes through `__setattr__`, which calls register_parameter too.
    with mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield


def fill_with_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta parameters by fake CPU tensors of `mode`, so that the module can be traced."""
    replaced: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            if id(parameter) not in replaced:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            owner._parameters[name] = replaced[id(parameter)]


def saved_specs(module: nn.Module) -> dict[str, WeightSpec]:
    """Name → spec of everything a checkpoint of the module holds."""
    return {
        name: WeightSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def tied_names(module: nn.Module) -> dict[str, str]:
    """Name → the other name of the same tensor, for parameters that are registered twice."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            tied.setdefault(first[id(tensor)], name)
        first.setdefault(id(tensor), name)
    return tied
