"""Every operator of the supported set: what was lowered is executed and compared with PyTorch.

coremltools drops arguments without a word, so that an operator counts as supported only when its
numbers are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odsora_compiler.ir.evaluate import evaluate

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int) -> Tensor:
    return numbers(*shape).abs() + 0.5


X = {"x": numbers(2, 3, 8)}
XY = {"x": numbers(2, 3, 8), "y": numbers(2, 3, 8, seed=1)}
IMAGE = {"x": numbers(2, 4, 6, 6)}
VIDEO = {"x": numbers(1, 4, 3, 6, 6)}
TOKENS = {"q": numbers(2, 4, 5, 8), "k": numbers(2, 4, 7, 8, seed=1), "v": numbers(2, 4, 7, 8)}
GROUPED = {**TOKENS, "k": numbers(2, 2, 7, 8, seed=1), "v": numbers(2, 2, 7, 8)}
WHOLE = {"i": torch.tensor([[1, 5, 2], [0, 3, 7]])}
FLAGS = {"x": numbers(2, 3, 8), "m": numbers(2, 3, 8, seed=2) > 0}

CASES: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "add-alpha": (lambda x, y: torch.add(x, y, alpha=3), XY),
    "sub-alpha": (lambda x, y: torch.sub(x, y, alpha=0.5), XY),
    "rsub-alpha": (lambda x, y: torch.rsub(x, y, alpha=2), XY),
    "rsub-number": (lambda x: 3 - x, X),
    "add-number-alpha": (lambda x: torch.add(x, 2.0, alpha=3), X),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), X),
    "gelu": (lambda x: F.gelu(x), X),
    "silu": (lambda x: F.silu(x), X),
    "activations": (lambda x: torch.relu(x) + torch.sigmoid(x) * torch.tanh(x) + x.abs(), X),
    "leaky-relu": (lambda x: F.leaky_relu(x, 0.3) + F.elu(x) + F.softplus(x), X),
    "exponentials": (lambda x: torch.exp(x) + torch.log(x) + torch.rsqrt(x), {"x": positive(2, 5)}),
    "powers": (lambda x: x**2 + x**0.5 + 2**x + torch.square(x), {"x": positive(2, 5)}),
    "sine": (lambda x: torch.sin(x) + torch.cos(x), {"x": 500 * numbers(4, 6)}),
    "division": (lambda x, y: x / y, {"x": numbers(3, 4), "y": positive(3, 4)}),
    "division-floor": (
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        {"x": 10 * numbers(3, 4), "y": positive(3, 4)},
    ),
    "division-trunc": (
        lambda x, y: torch.div(x, y, rounding_mode="trunc"),
        {"x": 10 * numbers(3, 4), "y": positive(3, 4)},
    ),
    "integers-divided": (lambda i: i / 4, WHOLE),
    "addcmul": (lambda x, y: torch.addcmul(x, y, y, value=0.3), XY),
    "clamp": (lambda x: torch.clamp(x, -0.5, 0.7), X),
    "clamp-upper": (lambda x: torch.clamp(x, max=0.2), X),
    "clamp-lower": (lambda x: torch.clamp(x, min=0.2), X),
    "comparisons": (lambda x, y: torch.where(x > y, x, y) + (x <= 0).float(), XY),
    "where-number": (lambda x: torch.where(x > 0, x, -1.0), X),
    "masked-fill": (lambda x, m: x.masked_fill(m, -2.0), FLAGS),
    "masked-softmax": (
        lambda x, m: x.masked_fill(m, torch.finfo(x.dtype).min).softmax(-1),
        FLAGS,
    ),
    "infinite-mask": (lambda x, m: x.masked_fill(m, float("-inf")).softmax(-1), FLAGS),
    "mask-by-product": (lambda x, m: (x + (1 - m.float()) * -1e9).softmax(-1), FLAGS),
    "logic": (lambda x, m: torch.where(m & ~(x > 0) | (x < -1), x, 0.0), FLAGS),
    "softmax": (lambda x: F.softmax(x, dim=1), X),
    "group-norm-video": (lambda x: F.group_norm(x, 2), {"x": numbers(2, 4, 3, 2, 5)}),
    "reciprocal-of-small": (lambda x: 1 / x, {"x": 1e-3 * positive(3, 4)}),
    "log-softmax": (lambda x: F.log_softmax(x, dim=-1), X),
    "log-softmax-of-zero": (lambda x: F.log_softmax(100 * x, dim=1), X),
    "sum": (lambda x: x.sum((0, 2)) + x.sum(), X),
    "sum-flags": (lambda m, x: m.sum(-1).float() + x.mean(-1), FLAGS),
    "mean": (lambda x: x.mean((1,), keepdim=True) + x.mean(), X),
    "extremes": (lambda x: x.amax(-1) - x.amin(-1), X),
    "variance": (lambda x: x.var(-1, correction=0) + x.std(-1), X),
    "cumsum": (lambda x: torch.cumsum(x, 1), X),
    "argmax": (lambda x: x.argmax(-1), X),
    "argmax-everywhere": (lambda x: x.argmax() - x.argmin(), X),
    "layer-norm": (lambda x: F.layer_norm(x, (8,), eps=1e-6), X),
    "rms-norm": (lambda x: F.rms_norm(x, (8,)), X),
    "matmul": (lambda x, y: x @ y.transpose(1, 2), XY),
    "einsum-outer": (lambda x, y: torch.einsum("abi,abj->abij", x, y), XY),
    "einsum-vectors": (
        lambda i, d: torch.einsum("i,d->id", i, d),
        {"i": numbers(3), "d": numbers(5, seed=1)},
    ),
    "einsum-dots": (
        lambda x, f: torch.einsum("...,f->...f", x, f),
        {"x": numbers(2, 3), "f": numbers(5, seed=1)},
    ),
    "einsum-contraction": (lambda x, y: torch.einsum("bcd,bed->bce", x, y), XY),
    "bmm": (lambda x, y: torch.baddbmm(x @ y.mT, x, y.mT, beta=0.5, alpha=2), XY),
    "stack-dtypes": (lambda x, i: torch.stack([x, i]), {"x": numbers(2, 3), **WHOLE}),
    "cat-dtypes": (lambda x, i: torch.cat([x, i], 1), {"x": numbers(2, 5), **WHOLE}),
    "shapes": (lambda x: x.unsqueeze(1).expand(2, 4, 3, 8).permute(0, 2, 1, 3).flatten(1, 2), X),
    "parts": (lambda x: torch.cat([*x.chunk(2, -1), x[:, 1:, ::2]], 1), X),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), X),
    "split-sizes": (lambda x: torch.cat(x.split([1, 2], 1)[::-1], 1), X),
    "flip-roll": (lambda x: x.flip(1) + torch.roll(x, 1, 2), X),
    "repeat": (lambda x: x.repeat(1, 2, 1) + x.repeat_interleave(2, 1), X),
    "select": (lambda x: x[:, 1] + x.select(1, -1), X),
    "index": (lambda x: x[:, [2, 0]], X),
    "new-ones": (lambda x: x.new_ones(2, 3, 8) + x + torch.zeros_like(x) - torch.ones_like(x), X),
    "full": (lambda x: x * torch.full_like(x, 2.5), X),
    "triangle": (lambda x: x + torch.ones(3, 8).triu(1), X),
    "arange": (lambda x: x + torch.arange(8) * 0.5, X),
    "casts": (lambda x: x.to(torch.int64).to(torch.float32) + x.double().float(), X),
    "embedding": (lambda i: F.embedding(i, torch.arange(32.0).view(8, 4)), WHOLE),
    "gather": (lambda x, i: x.gather(1, i), {"x": numbers(2, 8), **WHOLE}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=0.5), X),
    "group-norm": (lambda x: F.group_norm(x, 2), IMAGE),
    "up-nearest": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), IMAGE),
    "up-bilinear": (lambda x: F.interpolate(x, size=(12, 12), mode="bilinear"), IMAGE),
    "pools": (lambda x: F.avg_pool2d(x, 2) + F.max_pool2d(x, 2), IMAGE),
    "pixel-shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "unpatchify": (
        lambda x: x.view(1, 2, 2, 3, 6, 6).permute(0, 3, 1, 4, 2, 5).reshape(3, 12, 12),
        VIDEO,
    ),
    "patchify": (
        lambda x: x.view(1, 4, 3, 1, 3, 2, 3, 2).permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(3),
        VIDEO,
    ),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), TOKENS),
    "attention-scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        TOKENS,
    ),
    "attention-causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        TOKENS,
    ),
    "attention-mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (k[:, :1, :, 0] > -1)[:, :, None]),
        TOKENS,
    ),
    "attention-bias": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT),
        TOKENS,
    ),
    "attention-groups": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        GROUPED,
    ),
}
# Half precision would round the argument of floor() or int() to another whole number.
STEPPED = {"division-floor", "division-trunc", "casts"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_operator_computes_what_pytorch_computes(
    case: str, precision: str, captured: Any, lowered: Any, run: Any
) -> None:
    body, inputs = CASES[case]
    function, weights = captured(body, inputs)
    expected = evaluate(function, weights, inputs)["out"]
    if precision == "fp16" and case in STEPPED:
        pytest.skip("rounding moves the steps of this function")
    got = run(lowered(function, weights, precision), inputs)["out"]
    scale = max(1.0, expected.abs().max().item())
    tolerance = 1e-5 if precision == "fp32" else 4e-3
    assert got.shape == (expected.shape or (1,))
    assert not got.isnan().any()
    assert (got.float() - expected.float()).abs().max() <= tolerance * scale


LAYERS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), X, {"w": (5, 8), "b": (5,)}),
    "linear-no-bias": (lambda x, w: F.linear(x, w), X, {"w": (5, 8)}),
    "layer-norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), X, {"w": (8,), "b": (8,)}),
    "rms-norm": (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), X, {"w": (8,)}),
    "group-norm": (lambda x, w, b: F.group_norm(x, 2, w, b), IMAGE, {"w": (4,), "b": (4,)}),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        IMAGE,
        {"w": (8, 4, 3, 3), "b": (8,)},
    ),
    "conv3d": (lambda x, w: F.conv3d(x, w, padding=1), VIDEO, {"w": (8, 4, 3, 3, 3)}),
    "conv-transpose": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        IMAGE,
        {"w": (4, 8, 2, 2)},
    ),
    "conv-norm-scale": (
        lambda x, w, s: F.conv2d(x, w) * s,
        IMAGE,
        {"w": (8, 4, 1, 1), "s": (1, 8, 1, 1)},
    ),
    "addmm": (
        lambda x, w, b: torch.addmm(b, x[0], w, beta=0.5, alpha=2),
        X,
        {"w": (8, 5), "b": (5,)},
    ),
    "weight-norm": (
        lambda x, w, g: F.linear(x, g * w / w.norm(dim=1, keepdim=True)),
        X,
        {"w": (5, 8), "g": (5, 1)},
    ),
    "embedding": (lambda i, w: F.embedding(i, w), WHOLE, {"w": (8, 4)}),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", LAYERS)
def test_layer_computes_what_pytorch_computes(
    case: str, precision: str, captured: Any, lowered: Any, run: Any
) -> None:
    body, inputs, shapes = LAYERS[case]
    parameters = {
        name: 0.5 * numbers(*shape, seed=7 + index)
        for index, (name, shape) in enumerate(shapes.items())
    }
    function, weights = captured(body, inputs, **parameters)
    expected = evaluate(function, weights, inputs)["out"]
    got = run(lowered(function, weights, precision), inputs)["out"]
    tolerance = 1e-5 if precision == "fp32" else 4e-3
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())
