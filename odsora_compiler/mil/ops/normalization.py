"""Normalisations: statistics in fp32, rounded once outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from odsora_compiler.mil.ops.definition import OpTable, Tensor, wide

Ints = list[int]


def _layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    over = sorted(axis % x.ndim for axis in axes) if axes is not None else list(range(x.ndim))
    first = x.ndim - len(over)
    if over == list(range(first, x.ndim)):
        return F.layer_norm(x, x.shape[first:], gamma, beta, epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    out = (x - mean) / torch.sqrt(variance + epsilon)
    out = out if gamma is None else out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


def _instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def _l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / torch.sqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


def _local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


OPS: OpTable = wide(
    layer_norm=_layer_norm,
    batch_norm=_batch_norm,
    instance_norm=_instance_norm,
    l2_norm=_l2_norm,
    local_response_norm=_local_response_norm,
)
