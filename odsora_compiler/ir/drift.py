"""How far two results are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Drift:
    """Distance of `values` from a reference, over all outputs, the worst one counting.

    `maximum`: largest absolute difference over the reference's largest absolute value. `relative`:
    norm of the difference over the norm of the reference. `cosine`: of the two as vectors.
    `bit_equal`: every bit equal. `nan`: names of outputs with a NaN or infinity that the reference
    does not have there.
    """

    maximum: float
    relative: float
    cosine: float
    bit_equal: bool
    nan: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.bit_equal:
            return "bit-equal"
        if self.nan:
            return f"NaN or infinity in {', '.join(self.nan)}"
        return f"relative {self.relative:.2e}, maximum {self.maximum:.2e}, cosine {self.cosine:.6f}"


def measure_drift(values: Tensors, reference: Tensors) -> Drift:
    """Compare outputs of the same names and shapes. An empty mapping is bit-equal to another."""
    worst = Drift(0.0, 0.0, 1.0, True)
    for name, expected in reference.items():
        drift = _tensor_drift(name, values[name], expected)
        worst = Drift(
            max(worst.maximum, drift.maximum),
            max(worst.relative, drift.relative),
            min(worst.cosine, drift.cosine),
            worst.bit_equal and drift.bit_equal,
            worst.nan + drift.nan,
        )
    return worst


def _tensor_drift(name: str, value: torch.Tensor, expected: torch.Tensor) -> Drift:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise ValueError(f"output '{name}': {value.shape} {value.dtype} against {expected.shape}")
    # Compared as bytes, so that -0.0 differs from 0.0 and equal NaNs are equal.
    if torch.equal(_bits(value), _bits(expected)):
        return Drift(0.0, 0.0, 1.0, True)
    a, b = value.double().flatten(), expected.double().flatten()
    finite = torch.isfinite(b)
    if not bool(torch.isfinite(a[finite]).all()) or not torch.equal(
        a[~finite].nan_to_num(0.0), b[~finite].nan_to_num(0.0)
    ):
        return Drift(math.inf, math.inf, 0.0, False, (name,))
    a, b = a[finite], b[finite]
    difference = (a - b).abs()
    peak, norm = float(b.abs().max()) if b.numel() else 0.0, float(b.norm())
    both = float(a.norm()) * norm
    return Drift(
        _ratio(float(difference.max()) if b.numel() else 0.0, peak),
        _ratio(float(difference.norm()), norm),
        float(a @ b) / both if both > 0 else float(torch.equal(a, b)),
        False,
    )


def _ratio(difference: float, size: float) -> float:
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.contiguous().view(torch.uint8)
        if tensor.dim()
        else tensor.reshape(1).view(torch.uint8)
    )
