"""constexpr_*: weights stored compressed, spelled out when they are first used.

Both forms are here, the packed one of iOS 16 and the block-wise one of iOS 18. What is large is
spelled out some rows at a time, so that little memory is taken besides the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from odsora_compiler.mil.blobs import BlobType, unpack
from odsora_compiler.mil.ops.definition import REQUIRED, OpTable, Tensor, Tensors, narrow

Ints = list[int]

# Elements that are spelled out at a time: what lies in between stays in the processor's cache.
_PIECE = 1 << 16


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
    out = torch.empty(data.shape, dtype=scale.dtype)
    for rows in _pieces(data.shape):
        shifted = data[rows].to(scale.dtype)
        if offset is not None:
            shifted = shifted - _spread(offset.to(scale.dtype), data.shape, rows)
        torch.mul(shifted, _spread(scale, data.shape, rows), out=out[rows])
    return out


def _lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    if shape is not None:
        bits = {2: "UINT1", 4: "UINT2", 16: "UINT4", 64: "UINT6", 256: "UINT8"}[lut.numel()]
        indices = unpack(indices, BlobType[bits], prod(shape)).reshape(shape)
        lut = lut.reshape(*[1] * len(shape), -1, 1)
    *groups, entries, size = lut.shape
    # The palettes one after another; `first` says where in there each begins.
    palettes = lut.reshape(-1, size) if size > 1 else lut.reshape(-1)
    first = entries * torch.arange(prod(groups), dtype=torch.int32).reshape(groups)
    out = torch.empty(*indices.shape, *palettes.shape[1:], dtype=lut.dtype)
    for rows in _pieces(indices.shape):
        where = indices[rows] + _spread(first, indices.shape, rows)
        out[rows] = palettes.index_select(0, where.view(-1)).view(out[rows].shape)
    if size == 1:
        return out
    assert vector_axis is not None, "vectors need an axis to lie along"
    axis = vector_axis % indices.ndim
    return out.movedim(-1, axis + 1).flatten(axis, axis + 1)


def _sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    if shape is not None:
        mask = unpack(mask, BlobType.UINT1, prod(shape)).reshape(shape)
    chosen = mask.bool()
    count = int(chosen.count_nonzero())
    if count != nonzero_data.numel():
        raise ValueError(f"a mask of {count} elements for {nonzero_data.numel()} values")
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    return dense.masked_scatter_(chosen, nonzero_data)


def _lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> Tensors:
    indices = _sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = _lut_to_dense(indices, lut, vector_axis=vector_axis)
    mask = _repeated(indices_mask, dense.shape)
    return mask, _chosen(dense, mask)


def _sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensors:
    dense = _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, _chosen(dense, data_mask)


def _chosen(dense: Tensor, mask: Tensor) -> Tensor:
    """The elements of `dense` where `mask` is not 0, in order."""
    pieces = _pieces(dense.shape)
    return torch.cat([dense[rows].masked_select(mask[rows].bool()) for rows in pieces])


def _pieces(shape: torch.Size) -> Iterator[slice]:
    """Slices of the first axis that are the whole of it, one after another."""
    step = max(1, _PIECE // max(1, prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _spread(blocks: Tensor, shape: torch.Size, rows: slice) -> Tensor:
    """Some rows of `blocks` as `_repeated` would make them for the whole `shape`."""
    if blocks.shape[0] > 1:
        row = torch.arange(rows.start, rows.stop)
        blocks = blocks.index_select(0, row // (shape[0] // blocks.shape[0]))
    return _repeated(blocks, torch.Size((rows.stop - rows.start, *shape[1:])))


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
