"""Elementwise arithmetic, comparison, logic and casts."""

from __future__ import annotations

import torch

from odsora_compiler.mil.ops.definition import REQUIRED, OpTable, Tensor, narrow, wide


def _divide(x: Tensor, y: Tensor) -> Tensor:
    # Integers stay integers, rounded towards zero as a cast of the true quotient would be.
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    quotient = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        quotient = quotient + _along(zero_point, input, axis)
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    return quotient.clamp(low, high)


def _dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    shifted = input.float()
    if zero_point is not None:
        shifted = shifted - _along(zero_point, input, axis)
    return _along(scale, input, axis) * shifted


def _along(parameter: Tensor, data: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector shaped to broadcast along `axis` of `data`."""
    if parameter.ndim == 0 or axis is None:
        return parameter
    shape = [1] * data.ndim
    shape[axis] = parameter.numel()
    return parameter.reshape(shape)


OPS: OpTable = {
    **narrow(
        add=lambda x, y: x + y,
        sub=lambda x, y: x - y,
        mul=lambda x, y: x * y,
        real_div=_divide,
        maximum=lambda x, y: torch.maximum(x, y),
        minimum=lambda x, y: torch.minimum(x, y),
        equal=lambda x, y: x == y,
        not_equal=lambda x, y: x != y,
        greater=lambda x, y: x > y,
        greater_equal=lambda x, y: x >= y,
        less=lambda x, y: x < y,
        less_equal=lambda x, y: x <= y,
        logical_and=lambda x, y: x & y,
        logical_or=lambda x, y: x | y,
        logical_xor=lambda x, y: x ^ y,
        logical_not=lambda x: ~x,
        select=lambda cond, a, b: torch.where(cond, a, b),
        identity=lambda x: x,
        # The interpreter converts every output to its declared type: that is the whole cast.
        cast=lambda x, dtype=REQUIRED: x,
        abs=lambda x: x.abs(),
        ceil=lambda x: x.ceil(),
        floor=lambda x: x.floor(),
        sign=lambda x: x.sign(),
        sqrt=lambda x: x.sqrt(),
        square=lambda x: x * x,
        clip=lambda x, alpha=REQUIRED, beta=REQUIRED: x.clamp(alpha, beta),
        threshold=lambda x, alpha=REQUIRED: x.clamp(min=alpha),
    ),
    **wide(
        floor_div=lambda x, y: torch.div(x, y, rounding_mode="floor"),
        mod=lambda x, y: torch.remainder(x, y),
        pow=lambda x, y: torch.pow(x, y),
        inverse=lambda x, epsilon=1e-4: 1 / (x + epsilon),
        log=lambda x, epsilon=1e-45: torch.log(x + epsilon),
        rsqrt=lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon),
        round=lambda x: x.round(),
        erf=lambda x: x.erf(),
        exp=lambda x: x.exp(),
        exp2=lambda x: x.exp2(),
        acos=lambda x: x.acos(),
        asin=lambda x: x.asin(),
        atan=lambda x: x.atan(),
        atanh=lambda x: x.atanh(),
        cos=lambda x: x.cos(),
        cosh=lambda x: x.cosh(),
        sin=lambda x: x.sin(),
        sinh=lambda x: x.sinh(),
        tan=lambda x: x.tan(),
        tanh=lambda x: x.tanh(),
        quantize=_quantize,
        dequantize=_dequantize,
    ),
}
