"""constexpr_*: weights stored compressed, spelled out when they are first used.

Both forms are here, the packed one of iOS 16 and the block-wise one of iOS 18.
"""

from __future__ import annotations

from math import prod

import torch

from odsora_compiler.mil.blobs import BlobType, unpack
from odsora_compiler.mil.ops.definition import REQUIRED, OpTable, Tensor, Tensors, narrow

Ints = list[int]


def _affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    shape = [1] * quantized_data.ndim
    shape[axis] = -1
    zero_point = zero_point.reshape(shape) if zero_point.ndim else zero_point
    wide_scale = scale.reshape(shape).float() if scale.ndim else scale.float()
    return (quantized_data.float() - zero_point.float()) * wide_scale


def _blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    # In the scale's type, as coremltools decompresses: the difference of two small integers is
    # exact in fp16, so that only the product is rounded.
    shifted = data.to(scale.dtype)
    if offset is not None:
        shifted = shifted - _repeated(offset.to(scale.dtype), data.shape)
    return shifted * _repeated(scale, data.shape)


def _lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    if shape is not None:
        bits = {2: "UINT1", 4: "UINT2", 16: "UINT4", 64: "UINT6", 256: "UINT8"}[lut.numel()]
        flat = unpack(indices, BlobType[bits], prod(shape))
        return lut[flat.long()].reshape(shape)
    groups = lut.shape[: indices.ndim]
    palettes = lut.reshape(-1, *lut.shape[-2:])
    which = torch.arange(palettes.shape[0]).reshape(groups)
    vectors = palettes[_repeated(which, indices.shape), indices.long()]
    if vectors.shape[-1] == 1:
        return vectors.squeeze(-1)
    assert vector_axis is not None, "vectors need an axis to lie along"
    axis = vector_axis % indices.ndim
    return vectors.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    if shape is not None:
        mask = unpack(mask, BlobType.UINT1, prod(shape)).reshape(shape)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


def _lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> Tensors:
    indices = _sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = _lut_to_dense(indices, lut, vector_axis=vector_axis)
    mask = _repeated(indices_mask, dense.shape)
    return mask, dense[mask.bool()]


def _sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensors:
    dense = _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


def _repeated(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Each element repeated so often that the tensor takes on `shape`, a multiple of its own."""
    for axis, size in enumerate(shape):
        if blocks.shape[axis] not in (1, size):
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks.expand(shape)


OPS: OpTable = narrow(
    constexpr_affine_dequantize=_affine_dequantize,
    constexpr_blockwise_shift_scale=_blockwise_shift_scale,
    constexpr_cast=lambda source_val, output_dtype=REQUIRED: source_val,
    constexpr_lut_to_dense=_lut_to_dense,
    constexpr_lut_to_sparse=_lut_to_sparse,
    constexpr_sparse_to_dense=_sparse_to_dense,
    constexpr_sparse_blockwise_shift_scale=_sparse_blockwise_shift_scale,
)
