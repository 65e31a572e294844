"""The three networks of the small text-to-video model, their tokenizer and their weights.

They are the classes of Open-Sora 1.2 (../open_sora, transformers' T5EncoderModel, diffusers'
AutoencoderKL) in small: 32 x 32 pixels, 34 frames in two groups of 17, so latents are [B, 4, 10, 8,
8]. How they were trained is in train.py; the sampler is the one of Open-Sora 1.2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "open_sora"))
from stdit3 import STDiT3, STDiT3Config
from text_to_video import byte_tokenizer
from vae import SpatialVAEConfig, TemporalVAEConfig, VideoVAE, latent_frames

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

WEIGHTS = Path(__file__).parent / "weights"

PIXELS = 32  # height and width
FRAMES = 34
GROUP_FRAMES = 17  # that are coded together
TEXT_TOKENS = 48  # bytes of the prompt and the token that ends it
FPS = 12.0

STEPS = 30  # of the sampler
GUIDANCE = 3.0

PAD, END = 0, 1  # token ids, then come those of the 256 bytes

TEMPORAL = TemporalVAEConfig(
    filters=16, num_res_blocks=1, channel_multipliers=(1, 2, 2, 4), num_groups=8
)
SPATIAL = SpatialVAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, num_groups=8)
DENOISER = STDiT3Config(
    depth=3,
    hidden_size=128,
    num_heads=4,
    caption_channels=128,
    model_max_length=TEXT_TOKENS,
    input_sq_size=PIXELS,
)
LATENT = (4, latent_frames(FRAMES, GROUP_FRAMES, TEMPORAL), PIXELS // 4, PIXELS // 4)  # of a film


@dataclass(frozen=True)
class Networks:
    """What makes a film out of a prompt; each network is in eval mode."""

    text_encoder: T5EncoderModel
    denoiser: STDiT3
    vae: VideoVAE
    tokenizer: Tokenizer


def text_encoder() -> T5EncoderModel:
    """[B, 48] ids and mask to [B, 48, 128]; randomly initialised."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=2 + 256,
        d_model=DENOISER.caption_channels,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return T5EncoderModel(config)


def denoiser() -> STDiT3:
    return STDiT3(DENOISER)


def video_vae() -> VideoVAE:
    """The decoder, and as parts of it what encodes: `temporal_vae.encode`, `spatial_vae.module`."""
    return VideoVAE(TEMPORAL, SPATIAL, GROUP_FRAMES)


def tokenizer() -> Tokenizer:
    """Each byte of the text in UTF-8 is a token, and one more ends it; nothing is padded or cut."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(byte_tokenizer())


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask of the texts, each [len(texts), 48]; what is too long is cut."""
    ids = torch.full((len(texts), TEXT_TOKENS), PAD)
    for row, text in zip(ids, texts, strict=True):
        tokens = tokenizer.encode(text).ids
        if len(tokens) > TEXT_TOKENS:
            tokens = [*tokens[: TEXT_TOKENS - 1], END]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, (ids != PAD).long()


def drift(model: STDiT3, z: Tensor, timestep: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """What the sampler goes by, [B, 4, T, H, W]: the denoiser's output without its upper half.

    timestep [B] 0..1000, y [B, 1, 48, 128], mask [B, 48].
    """
    size = torch.tensor([float(PIXELS)])
    v = model(z, timestep, y, mask, fps=torch.tensor([FPS]), height=size, width=size)["v"]
    return v[:, : z.shape[1]]


def save(networks: Networks, folder: Path) -> int:
    """Write the weights as float16 and the tokenizer to `folder`; their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in _modules(networks).items():
        state = {key: tensor.half().contiguous() for key, tensor in module.state_dict().items()}
        state.pop("encoder.embed_tokens.weight", None)  # T5: the same tensor as shared.weight
        save_file(state, folder / f"{name}.safetensors")
    networks.tokenizer.save(str(folder / "tokenizer.json"))
    return sum((folder / f"{name}.safetensors").stat().st_size for name in _modules(networks))


def load(folder: Path = WEIGHTS) -> Networks:
    """The trained model. Raises FileNotFoundError where `train.py` has not filled `folder`."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no weights here; run examples/shapes/train.py")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        networks = Networks(text_encoder(), denoiser(), video_vae(), tokenizer)
    for name, module in _modules(networks).items():
        state = load_file(folder / f"{name}.safetensors")
        if name == "t5":
            state["encoder.embed_tokens.weight"] = state["shared.weight"]
        module.load_state_dict(state, strict=True)
        module.eval()
    return networks


def _modules(networks: Networks) -> dict[str, torch.nn.Module]:
    """Each network under the name of its file."""
    return {"t5": networks.text_encoder, "stdit3": networks.denoiser, "vae": networks.vae}
