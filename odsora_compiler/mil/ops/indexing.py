"""Gathering from and scattering to computed positions."""

from __future__ import annotations

from math import prod

import torch

from odsora_compiler.mil.ops.definition import OpTable, Tensor, narrow, wide

# MIL's scatter mode → torch's name for it; the modes torch lacks are put in terms of these.
_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    axis %= x.ndim
    wrapped = _wrapped(indices, x.shape[axis], validate_indices)
    if batch_dims == 0:
        taken = x.index_select(axis, wrapped.reshape(-1))
        return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    # One gather for each element of the batch dimensions, laid side by side.
    batch = x.shape[:batch_dims]
    rows = x.reshape(-1, *x.shape[batch_dims:])
    per_row = wrapped.reshape(rows.shape[0], *indices.shape[batch_dims:])
    taken = torch.stack(
        [_gather(row, index, axis - batch_dims) for row, index in zip(rows, per_row, strict=True)]
    )
    return taken.reshape(*batch, *taken.shape[1:])


def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis], validate_indices))


def _gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    batch = indices.shape[:batch_dims]
    positions: list[Tensor] = []
    for axis, size in enumerate(batch):
        shape = [1] * (indices.ndim - 1)
        shape[axis] = size
        positions.append(torch.arange(size).reshape(shape))
    for k in range(depth):
        positions.append(_wrapped(indices[..., k], x.shape[batch_dims + k], validate_indices))
    return x[tuple(positions)]


def _scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    axis %= data.ndim
    shape = [1] * data.ndim
    shape[axis] = indices.numel()
    everywhere = indices.reshape(shape).expand(updates.shape)
    return _scatter_along_axis(data, everywhere, updates, axis, mode, validate_indices)


def _scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    index = _wrapped(indices, data.shape[axis], validate_indices)
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode == "sub":
        return data.scatter_reduce(axis, index, -updates, "sum")
    if mode == "div":
        divisor = torch.ones_like(data).scatter_reduce(axis, index, updates, "prod")
        return torch.div(data, divisor, rounding_mode=None if data.is_floating_point() else "trunc")
    return data.scatter_reduce(axis, index, updates, _REDUCE[mode])


def _scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    depth = indices.shape[-1]
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for k in range(depth):
        row = row * data.shape[k] + _wrapped(indices[..., k], data.shape[k], validate_indices)
    # Not -1: there may be no index at all, as where no element fits a condition.
    size = prod(data.shape[depth:])
    rows = data.reshape(prod(data.shape[:depth]), size)
    out = _scatter(rows, row.reshape(-1), updates.reshape(row.numel(), size), 0, mode)
    return out.reshape(data.shape)


def _wrapped(indices: Tensor, size: int, validate: bool) -> Tensor:
    """Indices as torch wants them. Negative ones count from the end, as before iOS 17."""
    index = indices.long()
    if validate and (index.lt(0) | index.ge(size)).any():
        raise IndexError(f"an index is outside of 0 to {size - 1}")
    return torch.where(index < 0, index + size, index)


OPS: OpTable = {
    **narrow(gather=_gather, gather_along_axis=_gather_along_axis, gather_nd=_gather_nd),
    **wide(scatter=_scatter, scatter_along_axis=_scatter_along_axis, scatter_nd=_scatter_nd),
}
