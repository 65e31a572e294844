"""Operations that move elements: shapes, slices, joins, rearrangements, sorting and filling."""

from __future__ import annotations

from math import ceil, prod

import torch
import torch.nn.functional as F

from odsora_compiler.mil.ops.definition import REQUIRED, OpTable, Tensor, Tensors, narrow

Ints = list[int]
Bools = list[bool]


def _reshape(x: Tensor, shape: Ints) -> Tensor:
    # A 0 stands for the size of x's axis, counted from the right; left of x's first axis for 1.
    sizes = [1] * (len(shape) - x.ndim) + list(x.shape)[-len(shape) or x.ndim :]
    return x.reshape([size or own for size, own in zip(shape, sizes, strict=True)])


def _reshape_like(
    x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors
) -> Tensor:
    shape: Ints = []
    for reference, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[int(begin) : None if to_the_end else int(end)]
    return x.reshape(shape)


def _expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


def _slices(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> tuple[list[slice | int], Ints]:
    """An index with positive steps, and the axes to reverse after it."""
    index: list[slice | int] = []
    reversed_axes: Ints = []
    for axis, size in enumerate(x.shape):
        step = stride[axis] if stride else 1
        start = None if begin_mask and begin_mask[axis] else begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            index.append(start or 0)
            continue
        stop = None if end_mask and end_mask[axis] else end[axis]
        taken = range(size)[start:stop:step]
        if step < 0:
            # torch has no negative steps.
            reversed_axes.append(axis - sum(isinstance(i, int) for i in index))
            taken = taken[::-1]
        index.append(slice(taken.start, taken.stop, taken.step) if taken else slice(0, 0))
    return index, reversed_axes


def _slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    index, flipped = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    out = x[tuple(index)]
    return out.flip(flipped) if flipped else out


def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    index, flipped = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    out = x.clone()
    target = out[tuple(index)]
    target.copy_((update.flip(flipped) if flipped else update).reshape(target.shape))
    return out


def _slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    for axis, (start, length) in enumerate(zip(begin, size, strict=True)):
        start %= x.shape[axis]
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


def _concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    if values[0].ndim == 0:
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> Tensors:
    if split_sizes is not None:
        return x.split(split_sizes, axis)
    assert num_splits is not None, "split needs num_splits or split_sizes"
    return x.chunk(num_splits, axis)


def _stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


def _transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


def _tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


def _reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else axes)


def _reverse_sequence(x: Tensor, lengths: Ints, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    out = x.clone()
    for row, length in enumerate(lengths):
        part = x.select(batch_axis, row).unsqueeze(batch_axis).narrow(seq_axis, 0, length)
        target = out.select(batch_axis, row).unsqueeze(batch_axis).narrow(seq_axis, 0, length)
        target.copy_(part.flip(seq_axis))
    return out


def _pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    first = x.ndim - len(pad) // 2
    pairs = {first + i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    if mode == "constant":
        flat = [size for axis in sorted(pairs, reverse=True) for size in pairs[axis]]
        return F.pad(x, flat, value=constant_val)
    for axis, (before, after) in pairs.items():
        # torch reflects and replicates only some axes of some ranks: gather instead.
        where = torch.arange(-before, x.shape[axis] + after)
        last = x.shape[axis] - 1
        if mode == "reflect":
            where = where.abs()
            where = torch.where(where > last, 2 * last - where, where)
        x = x.index_select(axis, where.clamp(0, last)) if before or after else x
    return x


def _sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis %= x.ndim
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


def _depth_to_space(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, block_size, block_size, c // block_size**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block_size, w * block_size)


def _space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block_size, w // block_size)


def _space_to_batch(x: Tensor, block_shape: Ints, paddings: list[Ints]) -> Tensor:
    x = F.pad(x, [*paddings[1], *paddings[0]])
    n, c, h, w = x.shape
    down, across = block_shape
    blocks = x.reshape(n, c, h // down, down, w // across, across)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(-1, c, h // down, w // across)


def _batch_to_space(x: Tensor, block_shape: Ints, crops: list[Ints]) -> Tensor:
    n, c, h, w = x.shape
    down, across = block_shape
    blocks = x.reshape(down, across, n // (down * across), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(-1, c, h * down, w * across)
    return F.pad(whole, [-size for size in (*crops[1], *crops[0])])


def _crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    return F.pad(x, [-size for size in (*crop_width, *crop_height)])


def _flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    distance = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    keep = torch.ones_like(distance, dtype=torch.bool)
    keep = keep if lower < 0 else keep & (distance <= lower)
    keep = keep if upper < 0 else keep & (-distance <= upper)
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


def _cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    # 16-bit floats: sum in fp32, round every partial sum once.
    total = x.cumsum(axis, dtype=torch.float32 if x.is_floating_point() else x.dtype)
    if exclusive:
        zero = torch.zeros_like(total.narrow(axis, 0, 1))
        total = torch.cat([zero, total.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return total.flip(axis) if reverse else total


def _argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True)


def _topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | Tensors:
    # A stable sort, so that ties keep their order as they do in MIL's reference.
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    first = values.narrow(axis, 0, count)
    return (first, indices.narrow(axis, 0, count)) if return_indices else first


def _one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    on = torch.ones((), dtype=torch.int32) if on_value is None else on_value
    off = torch.zeros((), dtype=on.dtype) if off_value is None else off_value
    axis = axis % (indices.ndim + 1)
    shape = [1] * (indices.ndim + 1)
    shape[axis] = one_hot_vector_size
    hot = indices.unsqueeze(axis) == torch.arange(one_hot_vector_size).reshape(shape)
    return torch.where(hot, on, off)


def _range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    first, last, by = start.item(), end.item(), step.item()
    count = max(0, ceil((last - first) / by))
    return first + by * torch.arange(count, dtype=torch.float64)


def _fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.expand(shape).contiguous()


def _fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return _fill(list(ref_tensor.shape), value)


OPS: OpTable = narrow(
    reshape=_reshape,
    reshape_like=_reshape_like,
    expand_dims=_expand_dims,
    squeeze=_squeeze,
    transpose=_transpose,
    slice_by_index=_slice_by_index,
    slice_by_size=_slice_by_size,
    slice_update=_slice_update,
    concat=_concat,
    split=_split,
    stack=_stack,
    tile=_tile,
    reverse=_reverse,
    reverse_sequence=_reverse_sequence,
    pad=_pad,
    crop=_crop,
    flatten2d=_flatten2d,
    sliding_windows=_sliding_windows,
    pixel_shuffle=lambda x, upscale_factor=REQUIRED: F.pixel_shuffle(x, upscale_factor),
    pixel_unshuffle=lambda x, downscale_factor=REQUIRED: F.pixel_unshuffle(x, downscale_factor),
    depth_to_space=_depth_to_space,
    space_to_depth=_space_to_depth,
    space_to_batch=_space_to_batch,
    batch_to_space=_batch_to_space,
    band_part=_band_part,
    cumsum=_cumsum,
    argsort=_argsort,
    topk=_topk,
    one_hot=_one_hot,
    range_1d=_range_1d,
    fill=_fill,
    fill_like=_fill_like,
    shape=lambda x: torch.tensor(x.shape),
    non_zero=lambda x: x.nonzero(),
)
