"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from odsora_compiler.mil.ops.definition import REQUIRED, OpTable, Tensor, narrow, wide


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    """A vector over the channels, the second axis, shaped to broadcast over `x`."""
    return parameter.reshape(-1, *[1] * (x.ndim - 2))


OPS: OpTable = {
    **narrow(
        gelu=_gelu,
        relu=lambda x: x.relu(),
        relu6=lambda x: x.clamp(0, 6),
        sigmoid=lambda x: x.sigmoid(),
        silu=lambda x: F.silu(x),
        softmax=lambda x, axis=-1: torch.softmax(x, axis),
    ),
    **wide(
        clamped_relu=lambda x, alpha=REQUIRED, beta=REQUIRED: torch.where(
            x >= 0, x, alpha * x
        ).clamp(max=beta),
        elu=lambda x, alpha=REQUIRED: torch.where(x > 0, x, alpha * torch.expm1(x)),
        leaky_relu=lambda x, alpha=REQUIRED: torch.where(x >= 0, x, alpha * x),
        linear_activation=lambda x, alpha=REQUIRED, beta=REQUIRED: alpha * x + beta,
        prelu=lambda x, alpha: torch.where(x > 0, x, x * _along_channels(alpha, x)),
        scaled_tanh=lambda x, alpha=REQUIRED, beta=REQUIRED: alpha * torch.tanh(beta * x),
        sigmoid_hard=lambda x, alpha=REQUIRED, beta=REQUIRED: (alpha * x + beta).clamp(0, 1),
        softplus=lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        softplus_parametric=lambda x, alpha, beta: (
            _along_channels(alpha, x)
            * torch.logaddexp(x * _along_channels(beta, x), torch.zeros_like(x))
        ),
        softsign=lambda x: x / (1 + x.abs()),
        thresholded_relu=lambda x, alpha=REQUIRED: torch.where(x >= alpha, x, 0.0),
    ),
}
