"""The host graph's own operations: what a program does between ATen operators.

A host graph is a `Function` whose nodes call ATen operators, `operator.getitem` and the functions
below; `get_attr` nodes name a tensor of `Program.constants`. It is straight-line: a Python loop of
the sampler is unrolled, and leaving it early is written with `early_exit` and `first_true`. Run
plainly these give the same value as an interpreter that jumps (`ir.host_program`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

from odsora_compiler.errors import OdsoraError
from odsora_compiler.ir.function import Function, Provenance

Draw = Literal["normal", "uniform"]


def call_component(component: str, function: str, /, **inputs: Any) -> NoReturn:
    """Target of the host graph's call nodes: run `function` of `component`, a dict of outputs.

    Only a marker: whoever runs a host graph interprets it.
    """
    raise OdsoraError("call_component marks a node of a host graph and cannot be called")


def random_tensor(kind: Draw, size: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers drawn from N(0, 1) or from 0..1 by a generator of their own.

    Every random operation of a sampler has its own seed, so that leaving one out does not change
    what the others draw. On the CPU, the same on every machine with the same PyTorch.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(list(size), dtype=dtype, generator=generator)


def early_exit(condition: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where `condition` (bool, one element) holds, `value` is what `first_true` gives."""
    return condition, value


def first_true(
    exits: Sequence[tuple[torch.Tensor, torch.Tensor]], default: torch.Tensor
) -> torch.Tensor:
    """The value of the first of `exits` whose condition holds, else `default`.

    Raises ValueError where the values differ in shape or dtype.
    """
    for _, value in exits:
        if (value.shape, value.dtype) != (default.shape, default.dtype):
            raise ValueError(
                f"an exit has a value {value.dtype}{list(value.shape)}, without one it is "
                f"{default.dtype}{list(default.shape)}"
            )
    if isinstance(default, FakeTensor):  # shapes are all that is asked for
        return default
    return next((value for condition, value in exits if bool(condition)), default)


def single_call_host(component: str, base: Function) -> Function:
    """The host of a bare module: one call of its function `base`, outputs passed on."""
    host = Function("host")
    inputs: dict[str, Any] = {}
    for placeholder in base.placeholders:
        node = host.graph.placeholder(str(placeholder.target))
        node.meta.update(placeholder.meta)
        inputs[str(placeholder.target)] = node
    call = host.graph.call_function(call_component, (component, base.name), inputs)
    call.meta["val"] = {name: node.meta["val"] for name, node in base.results.items()}
    outputs = []
    for name, result in base.results.items():
        item = host.graph.call_function(operator.getitem, (call, name))
        item.meta["val"] = result.meta["val"]
        outputs.append(item)
    for node in (call, *outputs):
        node.meta["provenance"] = Provenance()
    host.graph.output(tuple(outputs)).meta["names"] = tuple(base.results)
    return host
