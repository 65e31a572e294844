"""Building a module without its weights, for when they come from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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
        # One that is empty already is registered as it is: it may be shared with another module.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    # `module.weight = Parameter(…)` goes through `__setattr__`, which calls register_parameter too.
    with mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield


def fill_with_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta parameters and buffers by fake CPU tensors of `mode`, so that it can be traced.

    One tensor in two places stays one tensor.
    """
    replaced: dict[int, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            replaced[id(tensor)] = empty
        return replaced[id(tensor)]

    for owner in module.modules():
        held: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = stand_in(tensor)


def empty_names(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold no data (they are on the meta device)."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in named if tensor.device.type == "meta"]


def saved_specs(module: nn.Module) -> dict[str, WeightSpec]:
    """Name → spec of everything a checkpoint of the module holds."""
    return {
        name: WeightSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def tied_names(module: nn.Module) -> dict[str, list[str]]:
    """Name → all names of the same tensor, for parameters that are registered more than once."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}
