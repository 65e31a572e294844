"""Whole modules, converted and run, against eager torch; and what the front end lies about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mil_programs import convert_module

from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package


class Transformer(nn.Module):
    """A patch embedding in three dimensions, self-attention, masked cross-attention, an MLP."""

    def __init__(self, channels: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv3d(4, channels, (1, 2, 2), (1, 2, 2))
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_scale = nn.Parameter(torch.rand(channels // heads) + 0.5)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(32, 2 * channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.table = nn.Parameter(torch.randn(6, channels) / 8)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, z: torch.Tensor, y: torch.Tensor, t: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        x = self.patch(z).flatten(2).transpose(1, 2)
        shift, scale, gate, *_ = (self.table[None] + t.unflatten(1, (6, -1))).chunk(6, 1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        q, k, v = (self.split(part) for part in self.qkv(h).chunk(3, -1))
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * self.q_scale
        x = x + gate * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = (self.split(part) for part in self.kv(y).chunk(2, -1))
        hidden = (1 - mask[:, None, None]) * -1e4
        attended = F.scaled_dot_product_attention(self.split(self.q(x)), k, v, hidden)
        x = x + attended.transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """What video and image decoders are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.attend = nn.GroupNorm(4, 16)
        self.qkv = nn.Linear(16, 48)
        self.widen = nn.Conv2d(16, 32, 3, padding=1, padding_mode="replicate")
        self.grow = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.time = nn.Conv3d(8, 8, (3, 1, 1))
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.norm(self.enter(z)))
        flat = self.attend(x).flatten(2).transpose(1, 2)
        q, k, v = (part[:, None] for part in self.qkv(flat).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        x = x + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.pixel_shuffle(self.widen(x), 2)
        x = self.grow(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 2))
        video = F.pad(x.unflatten(0, (1, -1)).transpose(1, 2), (0, 0, 0, 0, 2, 0))
        x = self.time(video).transpose(1, 2).flatten(0, 1)
        return torch.tanh(self.leave(F.interpolate(x, size=(9, 11), mode="bilinear")))


class TextEncoder(nn.Module):
    """A layer in the manner of T5: token table, relative position bias, gated GELU."""

    def __init__(self, channels: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(100, channels)
        self.bias = nn.Embedding(16, heads)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.gate, self.up = (nn.Linear(channels, 64, bias=False) for _ in range(2))
        self.down = nn.Linear(64, channels, bias=False)
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        position = torch.arange(ids.shape[1])
        distance = (position[None] - position[:, None]).clamp(-8, 7) + 8
        bias = self.bias(distance).permute(2, 0, 1)[None]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        scores = q @ k.mT + bias
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)
        x = x + (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        h = self.norm(x)
        return x + self.down(F.gelu(self.gate(h)) * self.up(h))


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
MODULES = {
    "transformer": (
        Transformer,
        {
            "z": made(0, 2, 4, 3, 8, 6),
            "y": made(1, 2, 5, 32),
            "t": made(2, 2, 6 * 64) / 4,
            "mask": MASK,
        },
    ),
    "decoder": (Decoder, {"z": made(0, 5, 4, 6, 8)}),
    "text encoder": (
        TextEncoder,
        {
            "ids": torch.randint(100, (2, 5), generator=torch.Generator().manual_seed(0)).int(),
            "mask": MASK.int(),
        },
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, inputs = MODULES[name]
    module = kind().eval()
    with torch.no_grad():
        want = module(**inputs)
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.mlpackage"
        convert_module(module, inputs, path, precision)
        for compute in ("storage", "fp32"):
            (got,) = Interpreter(Package.open(path), compute=compute).run(inputs).values()
            cosine = F.cosine_similarity(got.double().flatten(), want.double().flatten(), 0)
            print(name, precision, compute, f"1-cosine {1 - cosine:.1e}")
            if precision == "fp32":
                torch.testing.assert_close(
                    got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max())
                )
            else:
                assert cosine >= 0.9999


class TanhGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


class TripledAdd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, x.square(), alpha=3)


@pytest.mark.parametrize(
    ("module", "told"),
    [(TanhGelu(), lambda x: F.gelu(x)), (TripledAdd(), lambda x: x + x.square())],
)
def test_what_the_front_end_dropped_is_missing_in_the_result(
    module: nn.Module, told: object, tmp_path: Path
) -> None:
    """The package is wrong, and the interpreter must say what it says, not what was meant."""
    x = torch.linspace(-3, 3, 200)
    convert_module(module, {"x": x}, tmp_path / "a.mlpackage")
    (got,) = Interpreter(Package.open(tmp_path / "a.mlpackage")).run({"x": x}).values()
    torch.testing.assert_close(got, told(x), rtol=1e-6, atol=1e-6)  # type: ignore[operator]
    assert (got - module(x)).abs().max() > 1e-4
