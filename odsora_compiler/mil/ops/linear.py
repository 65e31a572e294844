"""Matrix products, convolutions, pooling and attention: fp32 inside, rounded once outside."""

from __future__ import annotations

from math import ceil, inf

import torch
import torch.nn.functional as F

from odsora_compiler.mil.ops.definition import OpTable, Tensor, Tensors, wide

Ints = list[int]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    # Transposing has no effect on vectors.
    x = x.mT if transpose_x and x.ndim > 1 else x
    y = y.mT if transpose_y and y.ndim > 1 else y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return torch.matmul(x.to(dtype), y.to(dtype))


def _einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value, attn_mask)
    if attn_mask is None:
        return out
    # By MIL's definition a query that may attend to nothing is 0/0; torch makes it zero.
    hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -inf
    nothing = hidden.all(-1, keepdim=True)
    return out.masked_fill(nothing, torch.nan) if nothing.any() else out


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    kernel = [(size - 1) * d + 1 for size, d in zip(weight.shape[2:], dilations, strict=True)]
    before, after = _padding(pad_type, pad, x.shape[2:], kernel, strides)
    if before == after:
        return _CONV[rank](x, weight, bias, strides, before, dilations, groups)
    padded = _pad(x, before, after, 0.0)
    return _CONV[rank](padded, weight, bias, strides, 0, dilations, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    full = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, groups, dilations)
    if pad_type == "same":
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    elif pad_type == "custom" and pad is not None:
        wanted = [size - pad[2 * i] - pad[2 * i + 1] for i, size in enumerate(full.shape[2:])]
    else:
        wanted = list(full.shape[2:])
    if output_shape is not None:
        wanted = output_shape[2:]
    surplus = [have - want for have, want in zip(full.shape[2:], wanted, strict=True)]
    first = pad[::2] if pad_type == "custom" and pad else [max(0, s) // 2 for s in surplus]
    # Cropping is negative padding; an output longer than the full one is padded with zeros.
    out = _pad(full, [-f for f in first], [f - s for f, s in zip(first, surplus, strict=True)], 0.0)
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)


def _max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or [1] * len(kernel_sizes)
    before, after = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    if ceil_mode:
        return _MAX_POOL[len(kernel_sizes)](x, kernel_sizes, strides, before, ceil_mode=True)
    return _MAX_POOL[len(kernel_sizes)](_pad(x, before, after, -inf), kernel_sizes, strides)


def _avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    rank = len(kernel_sizes)
    strides = strides or [1] * rank
    before, after = _padding(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    if ceil_mode:
        return _AVG_POOL[rank](
            x, kernel_sizes, strides, before, True, not exclude_padding_from_average
        )
    out = _AVG_POOL[rank](_pad(x, before, after, 0.0), kernel_sizes, strides)
    if exclude_padding_from_average and any(before + after):
        inside = _pad(torch.ones_like(x[:1, :1]), before, after, 0.0)
        out = out / _AVG_POOL[rank](inside, kernel_sizes, strides)
    return out


def _l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    mean = _avg_pool(x * x, kernel_sizes, pad_type, strides, pad, ceil_mode=ceil_mode)
    return (mean * torch.tensor(kernel_sizes).prod()).sqrt()


def _padding(
    pad_type: str, pad: Ints | None, sizes: torch.Size, kernel: Ints, strides: Ints
) -> tuple[Ints, Ints]:
    """Elements to add before and after each spatial axis; `kernel` counts dilation in."""
    if pad_type == "custom" and pad is not None:
        return pad[::2], pad[1::2]
    if pad_type in ("same", "same_lower"):
        total = [
            max(0, stride * ceil(size / stride) - size + extent - stride)
            for size, extent, stride in zip(sizes, kernel, strides, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if pad_type == "same" else (large, small)
    return [0] * len(kernel), [0] * len(kernel)


def _pad(x: Tensor, before: Ints, after: Ints, value: float) -> Tensor:
    """Pad (or, where negative, crop) the spatial axes, which are the last ones."""
    if not any(before + after):
        return x
    pairs = [size for pair in zip(before[::-1], after[::-1], strict=True) for size in pair]
    return F.pad(x, pairs, value=value)


OPS: OpTable = wide(
    linear=_linear,
    matmul=_matmul,
    einsum=_einsum,
    scaled_dot_product_attention=_attention,
    conv=_conv,
    conv_transpose=_conv_transpose,
    max_pool=_max_pool,
    avg_pool=_avg_pool,
    l2_pool=_l2_pool,
)
