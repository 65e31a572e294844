"""Operators and their arguments as JSON data, for saved programs and for bundles."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from odsora_compiler.errors import PackageError
from odsora_compiler.ir.function import dtype_name
from odsora_compiler.ir.host import call_component, early_exit, first_true, random_tensor

_NAMESPACES = ("aten", "prims")
_OWN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "call_component": call_component,
    "random_tensor": random_tensor,
    "early_exit": early_exit,
    "first_true": first_true,
}
_Value = TypeVar("_Value")


def target_name(target: Any) -> str:
    """`"aten.add.Tensor"`; raises `PackageError` for what is not PyTorch's or a host's own."""
    for name, own in _OWN.items():
        if target is own:
            return name
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    raise PackageError(f"operator {target} cannot be saved: it is not a PyTorch operator overload")


def resolve_target(name: str) -> Callable[..., Any]:
    """The inverse of `target_name`. Raises ValueError or AttributeError on unknown names."""
    if name in _OWN:
        return _OWN[name]
    namespace, operation, overload = name.split(".")
    if namespace not in _NAMESPACES or operation == "from_file":
        raise ValueError(f"operator {name} is not one of PyTorch's arithmetic")
    found = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name} is not an operator")
    return found


def encode_argument(value: Any) -> Any:
    """An argument as JSON data; nodes by name. Raises `PackageError` on an unknown type."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [encode_argument(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PackageError(f"an argument of type {type(value).__name__} cannot be saved: {value!r}")


def decode_argument(value: Any, nodes: Mapping[str, _Value]) -> Any:
    """The inverse of `encode_argument`, with what `nodes` has for a node's name."""
    if isinstance(value, list):
        return [decode_argument(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, text),) = value.items()
    if kind == "node":
        return nodes[text]
    if kind == "float":
        return float(text)
    if kind == "device":
        return torch.device(text)
    if kind in ("dtype", "memory_format", "layout"):
        found = getattr(torch, text)
        if isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
            return found
    raise ValueError(f"unknown argument {value}")
