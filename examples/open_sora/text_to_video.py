"""From a prompt to a film with the networks of Open-Sora 1.2: the sampler and the pipeline.

`sample` is ordinary PyTorch that calls the networks by name; it runs eagerly and is what the
compiler traces. `text_to_video` makes a pipeline of networks of any size; pipeline.py has those of
the release and small ones.

Letters in shapes: B batch, L text tokens, d caption channels, T latent frames, h w latent height
and width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vae import LATENT_CHANNELS, VideoVAE, latent_frames

if TYPE_CHECKING:
    from stdit3 import STDiT3

    import odsora_compiler as odsora

PROMPT = "a red circle moving left"  # of the example inputs


@dataclass(frozen=True)
class Film:
    """What is fixed when the pipeline is built. `frames`, `height` and `width` are of the video.

    `group_frames` video frames are coded together, as `group_latents` latent frames; the spatial
    decoder is given `decode_frames` frames at a time. `time_shift`: more of the steps where there
    is much noise, the more so the larger the film.
    """

    frames: int
    height: int
    width: int
    fps: float
    steps: int
    time_shift: bool
    group_frames: int
    group_latents: int
    decode_frames: int


def sample(
    c: Any, tokens: Tensor, mask: Tensor, z: Tensor, guidance: Tensor, *, film: Film
) -> dict[str, Tensor]:
    """The `video` [1, 3, frames, height, width], about -1..1, of a prompt and noise.

    tokens, mask [1, L]    of the prompt; 1 for a token, 0 for padding
    z [1, 4, T, h, w]      from N(0, 1)
    guidance               a number: how much the text weighs

    `c` has the networks as functions of named inputs.
    """
    text = c.text_encoder(input_ids=tokens, attention_mask=mask)  # [1, L, d]
    given = {
        "y": c.captions(text=text),  # [2, 1, L, d]: the prompt's, then that of no text
        "mask": torch.cat([mask, mask]),
        "fps": torch.tensor([film.fps]),
        "height": torch.tensor([float(film.height)]),
        "width": torch.tensor([float(film.width)]),
    }

    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        return c.denoiser(z=z, timestep=timestep, **given)[:, :LATENT_CHANNELS]

    z = rectified_flow(velocity, z, timesteps(film), guidance)
    return {"video": decode(c, z, film)}


def rectified_flow(
    velocity: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    timesteps: Sequence[float],
    guidance: Tensor,
) -> Tensor:
    """Follow the flow from noise z [B, …] to latents in Euler steps, with guidance.

    `velocity` takes [2·B, …] and timesteps [2·B] and gives [2·B, …]; its first half is for the
    prompt, the second for no text (arXiv 2207.12598). `timesteps` fall from 1000; 0 follows them.
    """
    for now, then in pairwise([*timesteps, 0.0]):
        v = velocity(torch.cat([z, z]), torch.full((2 * z.shape[0],), now))
        with_text, without = v.chunk(2)
        z = z + (without + guidance * (with_text - without)) * ((now - then) / 1000)
    return z


def timesteps(film: Film) -> list[float]:
    """The timestep of each step, from 1000 downwards.

    Evenly spaced in s = t/1000, then, with `time_shift`, moved to r·s / (1 + (r-1)·s), where r is 1
    for a picture of 512 x 512, and the root of how many times as many pixels and latent frames
    there are. Latent frames count in whole groups, and as one below that.
    """
    # In float32, as the public implementation computes them.
    t = torch.tensor([1000 * (1 - step / film.steps) for step in range(film.steps)])
    if film.time_shift:
        groups = film.frames // film.group_frames
        times_larger = torch.tensor(film.height * film.width / 512**2)
        r = times_larger.sqrt() * torch.tensor(float(max(1, groups * film.group_latents))).sqrt()
        s = t / 1000
        t = 1000 * (r * s / (1 + (r - 1) * s))
    times: list[float] = t.tolist()
    return times


def decode(c: Any, z: Tensor, film: Film) -> Tensor:
    """Latents z [1, 4, T, h, w] to video [1, 3, frames, height, width], group by group."""
    whole = film.frames // film.group_frames * film.group_latents
    groups = [c.temporal_decoder(z=part) for part in _parts(z[:, :, :whole], film.group_latents)]
    if film.frames % film.group_frames:
        groups.append(c.temporal_decoder_rest(z=z[:, :, whole:]))
    frames = _parts(torch.cat(groups, dim=2), film.decode_frames)
    return torch.cat([c.spatial_decoder(z=part) for part in frames], dim=2)


def _parts(x: Tensor, frames: int) -> tuple[Tensor, ...]:
    return x.split(frames, dim=2) if x.shape[2] else ()


def text_to_video(
    text_encoder: nn.Module,
    denoiser: STDiT3,
    vae: VideoVAE,
    *,
    tokenizer: str,
    frames: int,
    height: int,
    width: int,
    steps: int = 30,
    guidance: float = 7.0,
    fps: float = 24.0,
    time_shift: bool = True,
    decode_frames: int = 1,
    suffix: str = "",
    aesthetic_score: float = 6.5,
    padding: int = 0,
    seed: int = 0,
) -> odsora.PipelineSpec:
    """The pipeline of these networks, for the compiler.

    `text_encoder` maps `input_ids` and `attention_mask` [1, L] to `last_hidden_state` [1, L, d],
    L being the denoiser's `model_max_length`. `tokenizer` is the text of a `tokenizer.json`;
    `padding` is its token for empty places. `frames`, `height`, `width`, `fps`: of the film.
    `decode_frames`: frames that the spatial decoder is given at a time. `suffix` and
    `aesthetic_score`: see `odsora.TextToVideo`. `guidance` can be changed when the pipeline runs,
    everything else is fixed. `seed`: of the example inputs.

    Inputs of the host: `tokens`, `mask`, `z`, `guidance`; output: `video`. Components, with the
    checkpoint each takes: `text_encoder`; `captions` and `denoiser`, both of `denoiser`;
    `temporal_decoder` (of a whole group of frames), `temporal_decoder_rest` (of those that are
    left, if any) and `spatial_decoder`, all of `vae`. Raises ValueError on a film that the networks
    cannot make.
    """
    import odsora_compiler as odsora
    from odsora_compiler.runtime.prompt import encode_prompt

    if vae.temporal_vae is None or vae.spatial_vae is None:
        raise ValueError("the decoder needs its temporal and its spatial part")
    temporal, spatial = vae.parts()
    coding = vae.temporal_vae.config
    film = Film(
        frames,
        height,
        width,
        fps,
        steps,
        time_shift,
        vae.group_frames,
        latent_frames(vae.group_frames, vae.group_frames, coding),
        decode_frames,
    )
    factor = vae.spatial_vae.factor
    check_film(
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        decode_frames=decode_frames,
        factor=factor,
    )

    roles = odsora.TextToVideo(
        tokenizer, padding=padding, fps=fps, suffix=suffix, aesthetic_score=aesthetic_score
    )
    encoded = encode_prompt(roles, PROMPT, denoiser.config.model_max_length)
    tokens, mask = encoded.tokens, encoded.mask
    # Inputs are real numbers even where the caller has the parameters made on another device.
    random = torch.Generator("cpu").manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cpu")

    L, d = denoiser.config.model_max_length, denoiser.config.caption_channels
    T = latent_frames(frames, vae.group_frames, coding)
    h, w = height // factor, width // factor
    components = {
        "text_encoder": odsora.ModelSpec(
            text_encoder,
            inputs={"input_ids": tokens, "attention_mask": mask},
            axes={"input_ids": "b l", "attention_mask": "b l"},
            unused=("decoder.*", "lm_head.*"),
        ),
        "captions": odsora.ModelSpec(
            Captions(denoiser),
            inputs={"text": noise(1, L, d)},
            axes={"text": "b l d"},
            checkpoint="denoiser",
            unused=("*",),
        ),
        "denoiser": odsora.ModelSpec(
            denoiser,
            inputs={
                "z": noise(2, LATENT_CHANNELS, T, h, w),
                "timestep": torch.full((2,), 500.0, device="cpu"),
                "y": noise(2, 1, L, d),
                "mask": torch.cat([mask, mask]),
                "fps": torch.tensor([fps], device="cpu"),
                "height": torch.tensor([float(height)], device="cpu"),
                "width": torch.tensor([float(width)], device="cpu"),
            },
            axes={"z": "b c t h w", "timestep": "b", "y": "b _ l d", "mask": "b l"}
            | dict.fromkeys(("fps", "height", "width"), "_"),
        ),
    }

    def decoder(module: VideoVAE, frames: int, T: int, unused: tuple[str, ...]) -> odsora.ModelSpec:
        return odsora.ModelSpec(
            module,
            inputs={"z": noise(1, LATENT_CHANNELS, T, h, w), "frames": frames},
            # Frames are decoded one by one: what time is to the denoiser is nothing here.
            axes={"z": "b c _ h w"},
            checkpoint="vae",
            unused=unused,
        )

    whole, rest = divmod(frames, film.group_frames)
    others = ("spatial_vae.*",)
    if whole:
        components["temporal_decoder"] = decoder(
            temporal, film.group_frames, film.group_latents, others
        )
    if rest:
        components["temporal_decoder_rest"] = decoder(
            temporal, rest, T - whole * film.group_latents, others
        )
    components["spatial_decoder"] = decoder(
        spatial, decode_frames, decode_frames, ("temporal_vae.*", "scale", "shift")
    )
    return odsora.PipelineSpec(
        components,
        host=functools.partial(sample, film=film),
        inputs={
            "tokens": tokens,
            "mask": mask,
            "z": noise(1, LATENT_CHANNELS, T, h, w),
            "guidance": torch.tensor([guidance], device="cpu"),
        },
        axes={"tokens": "b l", "mask": "b l", "z": "b c t h w", "guidance": "_"},
        text_to_video=roles,
    )


class Captions(nn.Module):
    """The two captions the denoiser is given: that of a prompt, and its own one of no text."""

    def __init__(self, denoiser: STDiT3) -> None:
        super().__init__()
        # Under the name that it has in the denoiser's checkpoint.
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", denoiser.y_embedder.y_embedding)

    def forward(self, text: Tensor) -> Tensor:
        """text [1, L, d] to [2, 1, L, d]."""
        nothing: Tensor = self.y_embedder.y_embedding
        return torch.stack([text, nothing[None]])


def byte_tokenizer() -> str:
    """A `tokenizer.json` in which each byte of the text is a token, and one more ends it.

    As in T5, 0 is for padding and 1 ends the text; bytes follow. Whoever encodes pads and cuts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    # The two names are not declared special: a prompt that spells one out is text like any other.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    text: str = tokenizer.to_str()
    return text


def check_film(
    *, frames: int, height: int, width: int, steps: int, decode_frames: int, factor: int
) -> None:
    """Raise ValueError that says what is possible where a film cannot be made.

    `factor`: pixels that a latent is high and wide.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a sampler takes at least 1 step")
    if frames < 1:
        raise ValueError(f"frames={frames}: a film has at least 1 frame")
    for name, size in (("height", height), ("width", width)):
        if size < factor or size % factor:
            below = max(factor, size // factor * factor)
            raise ValueError(
                f"{name}={size}: it must be a multiple of {factor} pixels, such as {below} or "
                f"{below + factor}"
            )
    if decode_frames < 1 or frames % decode_frames:
        possible = [n for n in range(1, frames + 1) if frames % n == 0]
        raise ValueError(
            f"decode_frames={decode_frames}: it must divide the {frames} frames: "
            + ", ".join(map(str, possible))
        )
