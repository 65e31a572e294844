"""Open-Sora 1.2, whole: T5, STDiT3 under its rectified-flow sampler, and the video decoder.

    odsora-compile examples/open_sora/pipeline.py --passes tdtm,lpl,cidl -o small.odsora
    odsora-compile examples/open_sora/pipeline.py --set size=release \
        --set tokenizer=tokenizer.json --weights checkpoints/ \
        --passes 'tdtm,lpl,cidl{budget=512MB}' -o open-sora.odsora

The weights are a folder with `text_encoder`, `denoiser` and `vae`, each a `.safetensors` file or a
folder of shards, in the released layouts. Without them the networks are random, and the film shows
nothing; ../shapes has small ones that are trained.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import t5
import torch
from stdit3 import STDiT3, STDiT3Config
from text_to_video import byte_tokenizer, check_film, text_to_video
from vae import SpatialVAEConfig, TemporalVAEConfig, VideoVAE

if TYPE_CHECKING:
    import odsora_compiler as odsora


@dataclass(frozen=True)
class Preset:
    """Sizes of the networks, and of a film that suits them."""

    text_encoder: dict[str, int]
    denoiser: STDiT3Config
    temporal: TemporalVAEConfig
    spatial: SpatialVAEConfig
    frames: int
    height: int
    width: int


RELEASE = Preset(
    text_encoder={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
    denoiser=STDiT3Config(),
    temporal=TemporalVAEConfig(),
    spatial=SpatialVAEConfig(),
    frames=68,
    height=192,
    width=192,
)
SMALL = Preset(
    text_encoder={
        "vocab_size": 512,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    },
    denoiser=STDiT3Config(
        depth=2, hidden_size=96, num_heads=4, caption_channels=64, model_max_length=48
    ),
    temporal=TemporalVAEConfig(filters=16, num_res_blocks=1, num_groups=8),
    spatial=SpatialVAEConfig(block_out_channels=(16, 32), layers_per_block=1, num_groups=8),
    frames=20,
    height=16,
    width=24,
)


def build(
    size: Literal["small", "release"] = "small",
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 24.0,
    steps: int = 30,
    guidance: float = 7.0,
    time_shift: bool = True,
    decode_frames: int = 1,
    suffix: str = " aesthetic score: {aesthetic_score}.",
    aesthetic_score: float = 6.5,
    tokenizer: Path | None = None,
    t5_folder: Path | None = None,
    t5_layers: int | None = None,
    t5_width: int | None = None,
    t5_heads: int | None = None,
    depth: int | None = None,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    length: int | None = None,
    filters: int | None = None,
    num_res_blocks: int | None = None,
    block_out_channels: tuple[int, ...] | None = None,
    layers_per_block: int | None = None,
    seed: int = 0,
) -> odsora.PipelineSpec:
    """Open-Sora 1.2 from prompt to film, randomly initialised, for the compiler.

    `size=small` compiles in seconds, `size=release` is the published model; options that are not
    given are those of the size. `frames`, `height`, `width` (pixels) and `fps`: of the film.
    `steps` (30 in the release), `guidance`, `time_shift`, `decode_frames`, `suffix` and
    `aesthetic_score`: see `text_to_video`. `tokenizer`: a tokenizer.json of Hugging Face; without
    it bytes are tokens. `t5_folder`: a text encoder in the layout of transformers. The rest are
    sizes: of the text encoder (`t5_…`), the denoiser (`depth` to `length`, the number of text
    tokens) and the decoder's temporal and spatial parts. `seed` fixes weights and inputs and leaves
    the global random state alone. Raises ValueError on a film that the networks cannot make, and on
    a tokenizer that has more tokens than the text encoder.
    """
    preset = RELEASE if size == "release" else SMALL
    temporal = dataclasses.replace(
        preset.temporal, **_given(filters=filters, num_res_blocks=num_res_blocks)
    )
    spatial = dataclasses.replace(
        preset.spatial,
        **_given(block_out_channels=block_out_channels, layers_per_block=layers_per_block),
    )
    film = {
        "frames": frames if frames is not None else preset.frames,
        "height": height if height is not None else preset.height,
        "width": width if width is not None else preset.width,
        "steps": steps,
        "decode_frames": decode_frames,
    }
    # Before the networks are made, which takes minutes and much memory in the released size.
    check_film(**film, factor=spatial.factor)
    encoder_sizes = _replaced(
        preset.text_encoder, num_layers=t5_layers, d_model=t5_width, num_heads=t5_heads
    )
    text_encoder: Any = t5.build(**encoder_sizes, folder=t5_folder, length=1, seed=seed).module
    denoiser_config = dataclasses.replace(
        preset.denoiser,
        **_given(
            depth=depth,
            hidden_size=hidden_size,
            num_heads=num_heads,
            model_max_length=length,
            caption_channels=text_encoder.config.d_model,
        ),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = STDiT3(denoiser_config).eval()
        vae = VideoVAE(temporal, spatial).eval()
    return text_to_video(
        text_encoder,
        denoiser,
        vae,
        tokenizer=_tokenizer(tokenizer, text_encoder.config.vocab_size),
        **film,
        guidance=guidance,
        fps=fps,
        time_shift=time_shift,
        suffix=suffix,
        aesthetic_score=aesthetic_score,
        seed=seed,
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _replaced(sizes: dict[str, int], **options: int | None) -> dict[str, int]:
    return {**sizes, **_given(**options)}


def _tokenizer(path: Path | None, vocabulary: int) -> str:
    """The text of the file, or that of a tokenizer of bytes; raises ValueError, see `build`."""
    from tokenizers import Tokenizer

    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a tokenizer is a tokenizer.json")
    text = byte_tokenizer() if path is None else path.read_text(encoding="utf-8")
    tokens = Tokenizer.from_str(text).get_vocab_size()
    if tokens > vocabulary:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, the text encoder {vocabulary}: give the one it "
            "was trained with"
        )
    return text
