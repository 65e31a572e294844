"""Small video transformers in several layouts, with token merging written out by hand beside them.

`forward(..., merged=True)` is the reference: it averages frame pairs of [b, t, s, c] before each
attention and repeats them after it, knowing nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH = 4, 16


def average(x: Tensor) -> Tensor:
    """[b, t, ...] → [b, t // 2, ...]; an odd last frame is left out."""
    even = x[:, : x.shape[1] // 2 * 2]
    return (even[:, 0::2] + even[:, 1::2]) / 2


def repeat(x: Tensor, frames: int) -> Tensor:
    """[b, t // 2, ...] → [b, t, ...]; an odd last frame gets the last merged value."""
    x = x.repeat_interleave(2, dim=1)
    return x if x.shape[1] == frames else torch.cat([x, x[:, -1:]], dim=1)


def heads(x: Tensor) -> Tensor:
    """[..., tokens, c] → [..., heads, tokens, d]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def joined(x: Tensor) -> Tensor:
    """[..., heads, tokens, d] → [..., tokens, c]."""
    return x.transpose(-2, -3).flatten(-2)


class Attention(nn.Module):
    """Attention with one projection for queries, one for keys and values, one for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, 2 * WIDTH)
        self.c = nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        x: Tensor,
        other: Tensor | None = None,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
    ) -> Tensor:
        q = heads(self.a(x))
        k, v = (heads(part) for part in self.b(x if other is None else other).chunk(2, dim=-1))
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        return self.c(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the halves of the features of x [..., tokens, d] by angles [tokens, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


FREQUENCIES = torch.tensor([1.0, 0.3])


def angles_of(positions: Tensor) -> Tensor:
    return positions[:, None] * FREQUENCIES


class Video(nn.Module):
    """x [b, t, h, w, c] and text [b, l, c] → [b, t, h, w, c], one `attend` after another."""

    centers = False

    def __init__(self, *parts: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(part() for part in parts)

    def forward(self, x: Tensor, text: Tensor, merged: bool = False) -> Tensor:
        frames = x.shape[1]
        for part in self.parts:
            y = F.layer_norm(x, (WIDTH,))
            if merged:
                part.positions = torch.arange(frames // 2).float()
                if self.centers:
                    part.positions = 2 * part.positions + 0.5
                x = x + repeat(part(average(y), text), frames)
                part.positions = None
            else:
                x = x + part(y, text)
        return x


class Part(nn.Module):
    """Base of the layouts: [b, t, h, w, c] → [b, t, h, w, c]."""

    positions: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def angles(self, frames: int) -> Tensor:
        return angles_of(torch.arange(frames) if self.positions is None else self.positions)


class Spatial(Part):
    """(b t) (h w) c"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        return self.attention(x.reshape(b * t, h * w, c)).reshape(x.shape)


class SpatialRankFive(Part):
    """b t (h w) c: attention over tensors of rank 5, time a batch dimension of its own."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attention(x.flatten(2, 3)).reshape(x.shape)


class Temporal(Part):
    """(b h w) t c, rotary"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        tokens = x.permute(0, 2, 3, 1, 4).reshape(b * h * w, t, c)
        tokens = self.attention(tokens, angles=self.angles(t))
        return tokens.reshape(b, h, w, t, c).permute(0, 3, 1, 2, 4)


class CausalTemporal(Part):
    """(h w b) t c: frames attend to earlier ones only; the mask compares positions."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        position = torch.arange(t) if self.positions is None else self.positions
        mask = position[:, None] >= position[None, :]
        tokens = x.permute(2, 3, 0, 1, 4).reshape(h * w * b, t, c)
        tokens = self.attention(tokens, mask=mask)
        return tokens.reshape(h, w, b, t, c).permute(2, 3, 0, 1, 4)


class Joint(Part):
    """b (t h w) c, rotary in time: the angle of a token is that of its frame"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        angles = self.angles(t)[:, None, :].expand(t, h * w, 2).reshape(t * h * w, 2)
        return self.attention(x.reshape(b, t * h * w, c), angles=angles).reshape(x.shape)


class Cross(Part):
    """b (t h w) c to b l c"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attention(x.flatten(1, 3), text).reshape(x.shape)


class CrossPerFrame(Part):
    """(b t) (h w) c to the text, repeated for every frame before its projection"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        text = text[:, None].expand(b, t, *text.shape[1:]).reshape(b * t, -1, c)
        return self.attention(x.reshape(b * t, h * w, c), text).reshape(x.shape)


class CrossPerSample(Part):
    """Two samples attend to texts of different lengths; one output projection for both"""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = heads(self.attention.a(x.flatten(1, 3)))
        k, v = (heads(part) for part in self.attention.b(text).chunk(2, dim=-1))
        rows = [
            F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
            for i, n in enumerate((3, 5))
        ]
        return self.attention.c(joined(torch.cat(rows))).reshape(x.shape)
