"""The video VAE of Open-Sora 1.2: latents to video, in two parts that also work on their own.

The temporal part, written here, turns every 5 latent frames into the latents of 17 video frames;
the spatial part, `AutoencoderKL` of diffusers, turns each of these into a picture. Parameter names
are those of the released checkpoints. Encoding is there for the temporal part only.

    odsora-compile examples/open_sora/vae.py --passes cidl -o vae.odsora
    odsora-compile examples/open_sora/vae.py --set part=temporal --passes cidl -o temporal.odsora

diffusers is imported only where the spatial part is built.

Letters in shapes: B batch, C channels, T frames, H W height and width, z the 4 latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    import odsora_compiler as odsora

SPATIAL_SCALE = 0.18215  # latents of the spatial part are scaled by this outside of it
LATENT_CHANNELS = 4
LATENT_SCALE = (3.85, 2.32, 2.33, 3.06)  # of each channel, and the next line too
LATENT_SHIFT = (-0.10, 0.34, 0.27, 0.98)


@dataclass(frozen=True)
class TemporalVAEConfig:
    """Sizes of the temporal part; the defaults are those of the release.

    Raises ValueError where a stage has no downsampling to follow it, or channels do not divide into
    the groups of the group norms.
    """

    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)  # one a stage
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # between stages
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} values, one fewer than"
                f" the {len(self.channel_multipliers)} of channel_multipliers is needed"
            )
        if self.filters % self.num_groups:
            raise ValueError(
                f"filters={self.filters} must be a multiple of num_groups={self.num_groups}"
            )

    @property
    def time_factor(self) -> int:
        """Video frames that share a latent frame."""
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True)
class SpatialVAEConfig:
    """Sizes of the spatial part; the defaults are those of the release (the SDXL shape)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # each but the first halves H and W
    layers_per_block: int = 2
    num_groups: int = 32

    @property
    def factor(self) -> int:
        """Pixels that a latent is high and wide."""
        return int(2 ** (len(self.block_out_channels) - 1))


def build(
    filters: int = 32,
    num_res_blocks: int = 1,
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
    temporal_downsample: tuple[bool, ...] = (False, True, True),
    block_out_channels: tuple[int, ...] = (32, 64),
    layers_per_block: int = 1,
    num_groups: int = 8,
    group_frames: int = 17,
    frames: int = 17,
    latent_height: int = 8,
    latent_width: int = 8,
    batch: int = 1,
    part: Literal["video", "temporal", "spatial"] = "video",
    seed: int = 0,
) -> odsora.ModelSpec:
    """A randomly initialised decoder with an example latent, for the compiler.

    The defaults make a model that compiles in seconds; the release is filters=128 num_res_blocks=4
    block_out_channels=128,256,512,512 layers_per_block=2 num_groups=32. The first four options are
    of the temporal part, the next two of the spatial one, `num_groups` of both. `frames` counts
    video frames. `part`: `temporal` and `spatial` are the halves of `video`, with the parameters
    that are theirs; the output of the first is the input of the second. `seed` fixes weights and
    inputs and leaves the global random state alone.
    """
    import odsora_compiler as odsora

    temporal = TemporalVAEConfig(
        filters, num_res_blocks, channel_multipliers, temporal_downsample, num_groups
    )
    spatial = SpatialVAEConfig(block_out_channels, layers_per_block, num_groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = VideoVAE(
            temporal if part != "spatial" else None,
            spatial if part != "temporal" else None,
            group_frames,
        ).eval()

    length = frames if part == "spatial" else latent_frames(frames, group_frames, temporal)
    # The input is real numbers even where the caller has the parameters made on another device.
    cpu = torch.device("cpu")
    random = torch.Generator(cpu).manual_seed(seed)
    shape = (batch, LATENT_CHANNELS, length, latent_height, latent_width)
    inputs = {"z": torch.randn(shape, generator=random, device=cpu), "frames": frames}
    return odsora.ModelSpec(module, inputs=inputs, axes={"z": "b c t h w"})


def latent_frames(frames: int, group_frames: int, config: TemporalVAEConfig) -> int:
    """Latent frames of a video of `frames` frames, which is coded in groups of `group_frames`."""
    whole, rest = divmod(frames, group_frames)
    return whole * -(-group_frames // config.time_factor) + -(-rest // config.time_factor)


class VideoVAE(nn.Module):
    """The decoder of latents to video: temporal part, then spatial part; None leaves one out."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        temporal: TemporalVAEConfig | None,
        spatial: SpatialVAEConfig | None,
        group_frames: int = 17,
    ) -> None:
        super().__init__()
        self.group_frames = group_frames
        self.temporal_vae = None if temporal is None else TemporalVAE(temporal)
        self.spatial_vae = None if spatial is None else SpatialVAE(spatial)
        if temporal is not None:
            self.register_buffer("scale", torch.tensor(LATENT_SCALE).reshape(1, -1, 1, 1, 1))
            self.register_buffer("shift", torch.tensor(LATENT_SHIFT).reshape(1, -1, 1, 1, 1))

    def parts(self) -> tuple[VideoVAE, VideoVAE]:
        """The temporal and the spatial part as modules of their own, over the same parameters."""
        temporal = VideoVAE(None, None, self.group_frames)
        spatial = VideoVAE(None, None, self.group_frames)
        temporal.temporal_vae, spatial.spatial_vae = self.temporal_vae, self.spatial_vae
        temporal.register_buffer("scale", self.scale)
        temporal.register_buffer("shift", self.shift)
        return temporal, spatial

    def forward(self, z: Tensor, frames: int) -> dict[str, Tensor]:
        """The `video` [B, 3, frames, 8·H, 8·W], about -1..1, of the latent z [B, z, T, H, W].

        Without the spatial part: `latents` [B, z, frames, H, W], one for each frame, which are what
        z is without the temporal part. The factor 8 is the release's. Raises ValueError where a
        latent of T frames is not that of a video of `frames` frames.
        """
        if self.temporal_vae is not None:
            z = self._decode_groups(self.temporal_vae, z * self.scale + self.shift, frames)
        if self.spatial_vae is None:
            return {"latents": z}
        return {"video": self.spatial_vae.decode(z)}

    def _decode_groups(self, temporal: TemporalVAE, z: Tensor, frames: int) -> Tensor:
        expected = latent_frames(frames, self.group_frames, temporal.config)
        if z.shape[2] != expected:
            raise ValueError(f"{frames} frames have {expected} latent frames, not {z.shape[2]}")
        whole, rest = divmod(frames, self.group_frames)
        decoded = []
        if whole:
            # Whole groups are samples of one batch, so that the graph has each weight once.
            T = latent_frames(self.group_frames, self.group_frames, temporal.config)
            groups = time_to_batch(z[:, :, : whole * T], whole)
            decoded.append(batch_to_time(temporal.decode(groups, self.group_frames), whole))
            z = z[:, :, whole * T :]
        if rest:
            decoded.append(temporal.decode(z, rest))
        return torch.cat(decoded, dim=2)


def time_to_batch(x: Tensor, groups: int) -> Tensor:
    """[B, C, groups·T, H, W] to [B·groups, C, T, H, W]."""
    B, C, frames, H, W = x.shape
    x = x.reshape(B, C, groups, frames // groups, H * W).transpose(1, 2)
    return x.reshape(B * groups, C, frames // groups, H, W)


def batch_to_time(x: Tensor, groups: int) -> Tensor:
    """[B·groups, C, T, H, W] to [B, C, groups·T, H, W]."""
    B, C, T, H, W = x.shape
    x = x.reshape(B // groups, groups, C, T, H * W).transpose(1, 2)
    return x.reshape(B // groups, C, groups * T, H, W)


class TemporalVAE(nn.Module):
    """Latents of single frames to and from latents of `time_factor` frames each, causally."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.config = config
        z = LATENT_CHANNELS
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = CausalConv3d(z, z, 1)
        self.decoder = TemporalDecoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, z, frames, H, W] to mean and log-variance of the latent [B, 2·z, T, H, W]."""
        padding = -x.shape[2] % self.config.time_factor
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, padding, 0))))

    def decode(self, z: Tensor, frames: int) -> Tensor:
        """z [B, z, T, H, W] to [B, z, frames, H, W], where T = ceil(frames / time_factor)."""
        x = self.decoder(self.post_quant_conv(z))
        return x[:, :, -frames % self.config.time_factor :]


class TemporalEncoder(nn.Module):
    """Stages of residual blocks, time halved between some: T frames to T' latent frames."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        z = LATENT_CHANNELS
        channels = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3d(z, config.filters, 3, bias=False)
        before = [config.filters, *channels[:-1]]
        self.block_res_blocks = nn.ModuleList(
            res_blocks(config, C_in, C) for C_in, C in zip(before, channels, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(C, C, 3, time_stride=2) if halved else nn.Identity()
            for C, halved in zip(channels[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = res_blocks(config, channels[-1], channels[-1])
        self.norm1 = nn.GroupNorm(config.num_groups, channels[-1])
        self.conv2 = CausalConv3d(channels[-1], 2 * z, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for blocks, halve in zip(
            self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True
        ):
            x = halve(blocks(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
    """The encoder's stages backwards, time doubled between some: [B, z, T', H, W] to T frames.

    The first of the frames it makes out of the first latent frame are to be dropped where the
    encoder had padded them.
    """

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        z = LATENT_CHANNELS
        channels = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv1 = CausalConv3d(z, channels[-1], 3)
        self.res_blocks = res_blocks(config, channels[-1], channels[-1])
        before = [*channels[1:], channels[-1]]
        self.block_res_blocks = nn.ModuleList(
            res_blocks(config, C_in, C) for C_in, C in zip(before, channels, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(C, 2 * C, 3) if doubled else nn.Identity()
            for C, doubled in zip(channels[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, channels[0])
        self.conv_out = CausalConv3d(channels[0], z, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for i in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[i](x)
            if i > 0 and isinstance(self.conv_blocks[i - 1], CausalConv3d):
                x = unfold_time(self.conv_blocks[i - 1](x))
        return self.conv_out(F.silu(self.norm1(x)))


def unfold_time(x: Tensor) -> Tensor:
    """[B, C·2, T, H, W] to [B, C, T·2, H, W]: neighbouring channels become neighbouring frames."""
    B, C, T, H, W = x.shape
    # Rows and columns share an axis on the way: Core ML has no tensors of rank 6.
    return x.reshape(B, C // 2, 2, T, H * W).transpose(2, 3).reshape(B, C // 2, 2 * T, H, W)


def res_blocks(config: TemporalVAEConfig, in_channels: int, channels: int) -> nn.Sequential:
    """`num_res_blocks` residual blocks, of which the first changes the channels."""
    widths = [in_channels] + [channels] * config.num_res_blocks
    return nn.Sequential(*(ResBlock(C_in, C, config.num_groups) for C_in, C in pairwise(widths)))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input: [B, in_channels, …] to [B, channels, …]."""

    def __init__(self, in_channels: int, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, channels)
        self.conv2 = CausalConv3d(channels, channels, 3, bias=False)
        self.conv3 = (
            nn.Identity()
            if in_channels == channels
            else CausalConv3d(in_channels, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(h)))


class CausalConv3d(nn.Module):
    """A 3-D convolution that sees no later frame: zeros before the first one, none after the last.

    Height and width keep their size; T becomes ceil(T / time_stride) for an even T or stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        time_stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.frames_before = max(kernel_size - time_stride, 0)
        around = kernel_size // 2
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size,
            stride=(time_stride, 1, 1),
            padding=(0, around, around),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.frames_before:
            x = F.pad(x, (0, 0, 0, 0, self.frames_before, 0))
        return self.conv(x)


class SpatialVAE(nn.Module):
    """`AutoencoderKL` of diffusers, frame by frame."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        self.module = _autoencoder(config)
        self.factor = config.factor

    def decode(self, latents: Tensor) -> Tensor:
        """[B, z, frames, H, W] to pictures [B, 3, frames, 8·H, 8·W] (8 in the release)."""
        B, z, T, H, W = latents.shape
        x = latents.transpose(1, 2).reshape(B * T, z, H, W) / SPATIAL_SCALE
        pictures = self.module.decode(x, return_dict=False)[0]
        return pictures.unflatten(0, (B, T)).transpose(1, 2)


def _autoencoder(config: SpatialVAEConfig) -> AutoencoderKL:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            f"the spatial part of the VAE is AutoencoderKL of diffusers, which cannot be imported "
            f"({error}): pip install diffusers, or build with part=temporal"
        ) from error
    stages = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=config.num_groups,
    )
