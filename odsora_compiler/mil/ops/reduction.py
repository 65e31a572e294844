"""Reductions over axes. 16-bit floats are accumulated in fp32."""

from __future__ import annotations

from collections.abc import Callable

from odsora_compiler.mil.ops.definition import OpTable, Tensor, wide

Ints = list[int]


def _over_axes(reduce: Callable[[Tensor, Ints, bool], Tensor]) -> Callable[..., Tensor]:
    """An operation with MIL's `axes` (default: all of them) and `keep_dims`."""

    def reduction(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        return reduce(x, list(range(x.ndim)) if axes is None else axes, keep_dims)

    return reduction


def _product(x: Tensor, axes: Ints, keep_dims: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep_dims)
    return x


def _mean(x: Tensor, axes: Ints, keep_dims: bool) -> Tensor:
    return (x if x.is_floating_point() else x.double()).mean(axes, keepdim=keep_dims)


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return x.argmax(axis, keepdim=keep_dims)


def _reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return x.argmin(axis, keepdim=keep_dims)


OPS: OpTable = wide(
    reduce_argmax=_reduce_argmax,
    reduce_argmin=_reduce_argmin,
    reduce_l1_norm=_over_axes(lambda x, axes, keep: x.abs().sum(axes, keep)),
    reduce_l2_norm=_over_axes(lambda x, axes, keep: _floating((x * x).sum(axes, keep)).sqrt()),
    reduce_log_sum=_over_axes(lambda x, axes, keep: _floating(x.sum(axes, keep)).log()),
    reduce_log_sum_exp=_over_axes(lambda x, axes, keep: _floating(x).logsumexp(axes, keep)),
    reduce_max=_over_axes(lambda x, axes, keep: x.amax(axes, keep)),
    reduce_mean=_over_axes(_mean),
    reduce_min=_over_axes(lambda x, axes, keep: x.amin(axes, keep)),
    reduce_prod=_over_axes(_product),
    reduce_sum=_over_axes(lambda x, axes, keep: x.sum(axes, keep)),
    reduce_sum_square=_over_axes(lambda x, axes, keep: (x * x).sum(axes, keep)),
)
