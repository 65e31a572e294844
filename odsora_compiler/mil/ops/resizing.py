"""Resizing of the last axes by linear and nearest-neighbour interpolation."""

from __future__ import annotations

from math import floor

import torch

from odsora_compiler.mil.ops.definition import OpTable, Tensor, wide

Ints = list[int]


def _grid(size: int, target: int, mode: str) -> Tensor:
    """Positions in the input, 0 to size-1, at which `target` outputs sample it (fp64)."""
    i = torch.arange(target, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and target == 1:
        points = torch.full((1,), (size - 1) / 2, dtype=torch.float64)
    elif mode in ("ALIGN_CORNERS", "STRICT_ALIGN_CORNERS"):
        points = i * ((size - 1) / max(1, target - 1))
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * (size / target) - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (i + 0.5) * (max(1, size - 1) / target)
    elif mode == "DEFAULT":
        points = i * (size / target)
    else:
        raise ValueError(f"sampling mode {mode} is unknown")
    return points.clamp(0, size - 1)


def _linear(x: Tensor, targets: Ints, mode: str) -> Tensor:
    for axis, target in enumerate(targets, x.ndim - len(targets)):
        points = _grid(x.shape[axis], target, mode)
        low = points.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        weight = (points - low).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def _nearest(x: Tensor, targets: Ints, mode: str = "DEFAULT") -> Tensor:
    for axis, target in enumerate(targets, x.ndim - len(targets)):
        size = x.shape[axis]
        i = torch.arange(target)
        if mode == "DEFAULT":
            nearest = i * size // target
        elif mode == "UNALIGN_CORNERS":
            nearest = (2 * i + 1) * size // (2 * target)
        else:
            nearest = (_grid(size, target, mode) + 0.5).floor().long()
        x = x.index_select(axis, nearest)
    return x


def _scaled(x: Tensor, height: float, width: float) -> Ints:
    return [floor(x.shape[-2] * height), floor(x.shape[-1] * width)]


def _upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    halves = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if halves else "DEFAULT"
    return _linear(x, _scaled(x, scale_factor_height, scale_factor_width), mode)


def _upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    return _nearest(x, _scaled(x, scale_factor_height, scale_factor_width))


def _resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    return _linear(x, [target_size_height, target_size_width], sampling_mode)


def _resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(x, [target_size_height, target_size_width])


def _resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    own = list(x.shape[x.ndim - resized_dims :])
    wanted = shape[len(shape) - resized_dims :]
    targets = [size or kept for size, kept in zip(wanted, own, strict=True)]
    resample = _nearest if interpolation_mode == "NEAREST_NEIGHBOR" else _linear
    return resample(x, targets, sampling_mode)


OPS: OpTable = wide(
    upsample_bilinear=_upsample_bilinear,
    upsample_nearest_neighbor=_upsample_nearest_neighbor,
    resize_bilinear=_resize_bilinear,
    resize_nearest_neighbor=_resize_nearest_neighbor,
    resize=_resize,
)
