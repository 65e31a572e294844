"""How exact a pass says it is, and whether what was measured allows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from odsora_compiler.errors import UsageError, nearest
from odsora_compiler.ir.drift import Drift

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Exact:
    """Outputs stay equal bit for bit."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Close:
    """Outputs stay within `atol + rtol * |reference|` of what they were, elementwise."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"close(rtol={self.rtol:g}, atol={self.atol:g})"


@dataclass(frozen=True)
class Lossy:
    """Outputs change on purpose. `metric` names the measure, `budget` the most it may reach.

    `"relative"`: Euclidean norm of the change over that of the reference. `"maximum"`: largest
    absolute change over the reference's largest absolute value. No budget (None): measured and
    reported only.
    """

    metric: str = "relative"
    budget: float | None = None

    def __str__(self) -> str:
        limit = "" if self.budget is None else f", budget={self.budget:g}"
        return f"lossy({self.metric}{limit})"


Exactness = Exact | Close | Lossy


def violation(drift: Drift, declared: Exactness, values: Tensors, reference: Tensors) -> str:
    """Why `drift` breaks what was declared; empty when it does not."""
    if drift.bit_equal:
        return ""
    if drift.nan:
        return str(drift)
    if isinstance(declared, Exact):
        return f"the outputs are not bit-equal: {drift}"
    if isinstance(declared, Close):
        for name, expected in reference.items():
            if not torch.allclose(
                values[name], expected, rtol=declared.rtol, atol=declared.atol, equal_nan=True
            ):
                return f"output '{name}' is off: {drift}"
        return ""
    if declared.metric not in LOSS_METRICS:
        raise UsageError(
            f"unknown metric '{declared.metric}'", nearest(declared.metric, LOSS_METRICS)
        )
    loss = getattr(drift, declared.metric)
    if declared.budget is not None and loss > declared.budget:
        return f"its {declared.metric} loss is {loss:.3e}, declared at most {declared.budget:g}"
    return ""


LOSS_METRICS = ("relative", "maximum")
