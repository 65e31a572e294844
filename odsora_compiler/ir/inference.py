"""Shapes and dtypes of nodes without computing them: fake tensors in `meta['val']`.

Strides are not part of the representation: graphs are functional, `view` means reshape, and every
fake tensor is contiguous. That lets equal shapes share one fake tensor and makes shape inference a
look-up for the second and every further block of the same kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)


@functools.lru_cache(maxsize=65536)
def fake_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The contiguous CPU fake tensor of this shape and dtype; one object for equal arguments."""
    with FAKE_MODE:
        return torch.empty(shape, dtype=dtype)


def canonical(value: Any) -> Any:
    """`value` (a tree of tensors) with every tensor replaced by the shared fake tensor like it."""
    return pytree.tree_map_only(
        torch.Tensor, lambda t: fake_tensor(tuple(int(s) for s in t.shape), t.dtype), value
    )


_MEMO: dict[Any, Any] = {}


def infer(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `target(*args, **kwargs)` would return, nodes standing for their `meta['val']`.

    Returns a fake tensor or a tree of them. Raises whatever the operator raises on shapes or dtypes
    that do not fit.
    """
    bound_args, bound_kwargs = fx.node.map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
    key = call_key(target, bound_args, bound_kwargs)
    if key not in _MEMO:
        with FAKE_MODE:
            _MEMO[key] = canonical(target(*bound_args, **bound_kwargs))
    return _MEMO[key]


def call_key(target: Any, args: Any, kwargs: Any) -> Any:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, FakeTensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    return (target, str(structure), described)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in `value` (a fake or real tensor, or a tree of them)."""
    return sum(
        leaf.numel() * leaf.element_size()
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    )
