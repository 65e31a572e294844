"""Reading and replacing an operator's arguments by the names its schema gives them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx


def operator_name(node: fx.Node) -> str:
    """`"view"` for a call of `aten.view.default`, `"getitem"` for one of `operator.getitem`."""
    if node.target is operator.getitem:
        return "getitem"
    target: Any = node.target
    return _name(target)


def bind(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by its schema's name, defaults filled in."""
    target: Any = node.target
    values = {}
    for index, (name, default) in enumerate(_parameters(target)):
        if index < len(node.args):
            values[name] = node.args[index]
        else:
            values[name] = node.kwargs.get(name, default)
    return values


def rebind(node: fx.Node, changes: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's `args` and `kwargs` with the arguments named in `changes` replaced."""
    target: Any = node.target
    positions = {name: index for index, (name, _) in enumerate(_parameters(target))}
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changes.items():
        if positions[name] < len(args):
            args[positions[name]] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


@functools.cache
def _name(target: Any) -> str:
    return str(target._schema.name).rpartition("::")[2]


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (item.name, item.default_value if item.has_default_value() else None)
        for item in target._schema.arguments
    )
