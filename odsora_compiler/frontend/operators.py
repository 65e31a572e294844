"""Which operators the graphs of programs have: what is dropped, renamed and refused."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import CaptureError
from odsora_compiler.ir.inference import infer

aten = torch.ops.aten

CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
}
# What depends on how values lie in memory; values of a graph have no strides.
BY_MEMORY = {aten.as_strided.default, aten.as_strided_copy.default, aten.view.dtype}


def plain_form(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node | tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call as graphs have it, or its argument where it changes nothing of a value.

    Copies, aliases and casts to the same dtype change nothing; arguments about devices and memory
    are dropped. `args` hold nodes with `meta['val']`.
    """
    kwargs = {key: arg for key, arg in kwargs.items() if key not in _PLACEMENT}
    if target in _IDENTITIES:
        same: fx.Node = args[0]
        return same
    if target in CASTS:
        dtype = infer(target, args, kwargs).dtype
        if args[0].meta["val"].dtype == dtype:
            source: fx.Node = args[0]
            return source
        return aten._to_copy.default, args[:1], {"dtype": dtype}
    return _SAME.get(target, target), args, kwargs


def refuse_foreign(target: Any, place: str) -> None:
    """Raise `CaptureError` naming `place` for what is no tensor arithmetic of PyTorch's."""
    if target is operator.getitem:
        return
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        raise CaptureError(
            f"{place}: {target} is not an operator of PyTorch's ATen set",
            "Write this part of the model with tensor operators only.",
        )
    if target in BY_MEMORY:
        raise CaptureError(
            f"{place}: {target} depends on how values lie in memory",
            "Use reshape, permute, unfold or slices instead.",
        )


def bound_arguments(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The call's arguments, defaults included, by their names in the operator's schema."""
    arguments = target._schema.arguments
    bound = {item.name: item.default_value for item in arguments if item.has_default_value()}
    bound |= {item.name: value for item, value in zip(arguments, args, strict=False)}
    return bound | dict(kwargs)


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call draws random numbers: not dropout of probability 0 or in evaluation."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    bound = bound_arguments(target, args, kwargs)
    return bound.get("train", True) and all(
        bound.get(name, 1) for name in ("dropout_p", "p", "dropout")
    )


def drop_dead(graph: fx.Graph) -> None:
    """Erase operators and weights that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


_IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
_SAME = {aten._unsafe_view.default: aten.view.default, aten.reshape.default: aten.view.default}
_PLACEMENT = {"device", "pin_memory", "layout", "memory_format", "non_blocking"}
