"""STDiT3, the denoiser of Open-Sora 1.2, in plain PyTorch: the reference model of this project.

The network takes a noisy video latent and a text embedding and predicts the velocity of a
rectified flow. Parameter names are those of the released checkpoints, so
`load_state_dict(strict=True)` accepts them; weights and activations are float32. The text encoder,
the video decoder and the sampler are models of their own.

    odsora-compile examples/open_sora/stdit3.py --set depth=8 --passes tdtm,cidl -o stdit3.odsora

Letters in shapes: B batch, C hidden size, T frames, H W height and width (all three in patches,
after padding), S = H·W, N = T·S, L text tokens, D features of an attention head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import odsora_compiler as odsora


@dataclass(frozen=True)
class STDiT3Config:
    """Sizes of the network; the defaults are those of the released STDiT3-XL/2.

    Raises ValueError where `hidden_size` cannot be divided into heads of an even number of
    features, or into the four quarters of the position embedding.
    """

    depth: int = 28  # pairs of a spatial and a temporal block
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    in_channels: int = 4
    out_channels: int = 8  # velocity, then a "sigma" that the sampler throws away
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    model_max_length: int = 300  # L
    input_sq_size: int = 512  # side in pixels at which positions are one apart
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 and of"
                f" 2·num_heads={2 * self.num_heads}"
            )


def build(
    depth: int = 4,
    hidden_size: int = 288,
    num_heads: int = 6,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    in_channels: int = 4,
    out_channels: int = 8,
    mlp_ratio: float = 4.0,
    caption_channels: int = 128,
    model_max_length: int = 32,
    input_sq_size: int = 512,
    qk_norm: bool = True,
    latent_frames: int = 8,
    latent_height: int = 16,
    latent_width: int = 16,
    batch: int = 2,
    masked_text: bool = True,
    seed: int = 0,
) -> odsora.ModelSpec:
    """A randomly initialised STDiT3 with example inputs, for the compiler.

    The defaults make a model that compiles in seconds; the released XL/2 is depth=28
    hidden_size=1152 num_heads=16 caption_channels=4096 model_max_length=300. Options up to
    `qk_norm` are fields of `STDiT3Config`; latent sizes are before patches, one latent pixel being
    8 x 8 pixels of video. `masked_text=False` leaves out the input `mask`: all text is attended.
    `seed` fixes weights and inputs and leaves the global random state alone.
    """
    import odsora_compiler as odsora

    config = STDiT3Config(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=out_channels,
        mlp_ratio=mlp_ratio,
        caption_channels=caption_channels,
        model_max_length=model_max_length,
        input_sq_size=input_sq_size,
        qk_norm=qk_norm,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = STDiT3(config).eval()

    # The inputs are real numbers even where the caller has the parameters made on another device.
    cpu = torch.device("cpu")
    random = torch.Generator(cpu).manual_seed(seed)
    latent = (batch, in_channels, latent_frames, latent_height, latent_width)
    text = (batch, 1, model_max_length, caption_channels)
    inputs = {
        "z": torch.randn(latent, generator=random, device=cpu),
        "timestep": 1000 * torch.rand(batch, generator=random, device=cpu),
        "y": torch.randn(text, generator=random, device=cpu),
        "mask": _text_mask(batch, model_max_length, cpu),
        "fps": torch.tensor([24.0], device=cpu),
        "height": torch.tensor([8.0 * latent_height], device=cpu),
        "width": torch.tensor([8.0 * latent_width], device=cpu),
    }
    axes = {"z": "b c t h w", "timestep": "b", "y": "b _ l d", "mask": "b l"}
    axes |= dict.fromkeys(("fps", "height", "width"), "_")
    if not masked_text:
        del inputs["mask"], axes["mask"]
    return odsora.ModelSpec(module, inputs=inputs, axes=axes)


class STDiT3(nn.Module):
    """Spatial-temporal diffusion transformer: attention within frames, then across them."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_size
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = ScalarEmbedder(C)
        self.fps_embedder = ScalarEmbedder(C)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.y_embedder = CaptionEmbedder(config)
        self.rope = RotaryEmbedding(C // config.num_heads)
        self.spatial_blocks = nn.ModuleList(
            STDiT3Block(config, temporal=False) for _ in range(config.depth)
        )
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(config, temporal=True) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        z: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
    ) -> dict[str, Tensor]:
        """The velocity `v` [B, out_channels, t, h, w] of the latent `z` [B, in_channels, t, h, w].

        timestep [B]         0..1000
        y [B, 1, L, c]       caption embedding
        mask [B, L]          1 for a text token, 0 for padding, at least one 1 in a row; None: all 1
        fps, height, width   [1] each: frames a second, pixels of the video
        """
        t, h, w = z.shape[2:]
        patch = self.config.patch_size
        padding = (0, -w % patch[2], 0, -h % patch[1], 0, -t % patch[0])
        if any(padding):
            z = F.pad(z, padding)
        x = self.x_embedder(z)  # [B, C, T, H, W]
        B, C, T, H, W = x.shape
        positions = self._position_embedding(H, W, height, width)  # [S, C]
        x = x.flatten(3).permute(0, 2, 3, 1) + positions  # [B, T, S, C]
        x = x.reshape(B, T * H * W, C)

        time = self.t_embedder(timestep) + self.fps_embedder(fps)  # [B, C]
        t_mlp = self.t_block(time)  # [B, 6·C]
        y = self.y_embedder(y)  # [B, L, C]
        text_mask = None if mask is None else (mask > 0)[:, None, None, :]
        rotation = self.rope(T)

        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, y, t_mlp, T, text_mask)
            x = temporal(x, y, t_mlp, T, text_mask, rotation)

        v = self._unpatchify(self.final_layer(x, time), T, H, W)
        if any(padding):
            v = v[:, :, :t, :h, :w]
        return {"v": v}

    def _position_embedding(self, H: int, W: int, height: Tensor, width: Tensor) -> Tensor:
        """[S, C]: sine and cosine of the column in the first half of C, of the row in the second.

        Coordinates are spread so that a video of any size spans what a square one of as many
        patches would, scaled by its size in pixels over `input_sq_size`.
        """
        half = self.config.hidden_size // 2
        scale = torch.sqrt(height * width) / self.config.input_sq_size
        base = round(math.sqrt(H * W))
        frequencies = 10000 ** (-torch.arange(0, half, 2, device=height.device) / half)

        def embed(size: int) -> Tensor:
            coordinate = torch.arange(size, device=height.device) / scale * (base / size)
            angle = coordinate[:, None] * frequencies
            return torch.cat([angle.sin(), angle.cos()], dim=-1)

        columns = embed(W)[None, :, :].expand(H, W, half)
        rows = embed(H)[:, None, :].expand(H, W, half)
        return torch.cat([columns, rows], dim=-1).reshape(H * W, 2 * half)

    def _unpatchify(self, x: Tensor, T: int, H: int, W: int) -> Tensor:
        """[B, N, features of a patch] to [B, out_channels, frames, rows, columns].

        The features of a patch are ordered (frame, row, column, channel): the outermost one of them
        is moved next to the axis it belongs to, until only the channel is left.
        """
        B = x.shape[0]
        frames, rows, columns = self.config.patch_size
        x = x.reshape(B, T, H * W, frames, -1).transpose(2, 3)
        x = x.reshape(B * T * frames, H, W, rows, -1).transpose(2, 3)
        x = x.reshape(B, T * frames, H * rows, W * columns, self.config.out_channels)
        return x.permute(0, 4, 1, 2, 3)


class STDiT3Block(nn.Module):
    """Self-attention, cross-attention to the text, and an MLP.

    Self-attention runs within each frame, or, in a temporal block, across the frames at each
    position. The timestep shifts, scales and gates self-attention and MLP (adaLN-single).
    """

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        C = config.hidden_size
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, C) / C**0.5)
        self.norm1 = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(C, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(C, config.num_heads)
        self.norm2 = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(C, int(config.mlp_ratio * C), C)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t_mlp: Tensor,
        T: int,
        text_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, N, C], text y [B, L, C], t_mlp [B, 6·C], text_mask [B, 1, 1, L] to [B, N, C]."""
        B, N, C = x.shape
        modulation = self.scale_shift_table + t_mlp.reshape(B, 6, C)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)

        h = self.norm1(x) * (1 + scale_msa) + shift_msa
        if self.temporal:
            h = h.reshape(B, T, N // T, C).transpose(1, 2).reshape(B * N // T, T, C)
            h = self.attn(h, rotation)
            h = h.reshape(B, N // T, T, C).transpose(1, 2).reshape(B, N, C)
        else:
            h = self.attn(h.reshape(B * T, N // T, C)).reshape(B, N, C)
        x = x + gate_msa * h

        x = x + self.cross_attn(x, y, text_mask)

        h = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        return x + gate_mlp * self.mlp(h)


class SelfAttention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [batch, tokens, C]; `rotation` is what `RotaryEmbedding` gives for `tokens`."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class CrossAttention(nn.Module):
    """Multi-head attention of the latent tokens to the text tokens of their own sample."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """x [B, N, C], y [B, L, C], text_mask [B, 1, 1, L], true where the text is attended."""
        q = split_heads(self.q_linear(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv_linear(y).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)
        return self.proj(merge_heads(attended))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[batch, tokens, C] to [batch, heads, tokens, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, D] to [batch, tokens, C]."""
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / root-mean-square(x) over the last axis, in float32, times a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        precise = x.float()
        mean_square = precise.square().mean(dim=-1, keepdim=True)
        return self.weight * (precise * torch.rsqrt(mean_square + 1e-6)).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Angles by which queries and keys are turned according to their frame (arXiv 2104.09864)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position times frequency, each [length, D/2]."""
        angles = torch.arange(length, device=self.freqs.device)[:, None] * self.freqs
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of adjacent features of x [batch, heads, tokens, D] by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class PatchEmbedder(nn.Module):
    """One token for each patch of the latent: [B, in_channels, t, h, w] to [B, C, T, H, W]."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z)


class ScalarEmbedder(nn.Module):
    """Embedding of a number a sample, [B] to [B, C]: sinusoids of 128 frequencies, then an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, value: Tensor) -> Tensor:
        steps = torch.arange(128, device=value.device)
        angles = value[:, None] * torch.exp(-math.log(10000) / 128 * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class CaptionEmbedder(nn.Module):
    """Text encoder features [B, 1, L, caption_channels] to [B, L, C].

    `y_embedding` is the caption of no text: the sampler gives it as `y` for guidance.
    """

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        channels = config.caption_channels
        self.y_proj = Mlp(channels, config.hidden_size, config.hidden_size)
        empty_caption = torch.randn(config.model_max_length, channels) / channels**0.5
        self.register_buffer("y_embedding", empty_caption)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y.squeeze(1))


class Mlp(nn.Module):
    """Linear, GELU in its tanh form, linear."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens [B, N, C] to the features of their patches [B, N, patch volume · out_channels]."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        C = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(2, C) / C**0.5)
        self.norm = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(C, math.prod(config.patch_size) * config.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None, :]).chunk(2, dim=1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


def _text_mask(batch: int, length: int, device: torch.device) -> Tensor:
    """[batch, length] of 1 and 0: prompts of different lengths, none of them empty or complete."""
    lengths = torch.arange(1, batch + 1, device=device) * length // (batch + 1)
    positions = torch.arange(length, device=device)
    return (positions < lengths.clamp(min=1)[:, None]).long()
