"""The text encoder of Open-Sora 1.2: `T5EncoderModel` of transformers, as a model for the compiler.

The released one has the t5-v1_1-xxl shape; the tokenizer belongs to the pipeline, not here.

    odsora-compile examples/open_sora/t5.py --passes cidl -o t5.odsora
    odsora-compile examples/open_sora/t5.py --set folder=t5-v1_1-xxl --weights t5-v1_1-xxl \
        --passes cidl -o t5.odsora
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import T5Config, T5EncoderModel

    import odsora_compiler as odsora


def build(
    vocab_size: int = 512,
    d_model: int = 128,
    d_kv: int = 16,
    d_ff: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    folder: Path | None = None,
    length: int = 32,
    batch: int = 1,
    seed: int = 0,
) -> odsora.ModelSpec:
    """A T5 encoder with example tokens: randomly initialised, or that of a local `folder`.

    The defaults make a model that compiles in seconds; t5-v1_1-xxl is vocab_size=32128 d_model=4096
    d_kv=64 d_ff=10240 num_layers=24 num_heads=64 length=300. `folder` is in the layout of
    transformers, config.json and safetensors; its config replaces the sizes above. Where the
    compiler is given the weights (`--weights FOLDER`, for a model larger than memory) only the
    config is read here. The inputs `input_ids` and `attention_mask` are [batch, length], the output
    is `last_hidden_state` [batch, length, d_model]. `seed` fixes weights and inputs and leaves the
    global random state alone. Raises ImportError without transformers, FileNotFoundError for a
    folder without a config.json, ValueError where its weights are not those of its config.
    """
    import odsora_compiler as odsora

    transformers = _transformers()
    if folder is None:
        config = transformers.T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            feed_forward_proj="gated-gelu",
        )
    else:
        config = _config_of(folder, transformers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if folder is None or _weights_come_later():
            encoder = transformers.T5EncoderModel(config)
        else:
            encoder = _load(folder, config, transformers)

    # The inputs are real numbers even where the caller has the parameters made on another device.
    cpu = torch.device("cpu")
    random = torch.Generator(cpu).manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=random, device=cpu)
    mask = _padded(batch, length, cpu)
    return odsora.ModelSpec(
        encoder.eval(),
        inputs={"input_ids": tokens * mask, "attention_mask": mask},
        axes={"input_ids": "b l", "attention_mask": "b l"},
    )


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the text encoder is T5EncoderModel of transformers, which cannot be imported "
            f"({error}): pip install transformers"
        ) from error
    return transformers


def _config_of(folder: Path, transformers: ModuleType) -> T5Config:
    # Without this check, a name that is no folder would be looked up on the network.
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no folder with a config.json")
    return transformers.T5Config.from_pretrained(folder, local_files_only=True)


def _weights_come_later() -> bool:
    """Whether parameters are being made without data, for the compiler to fill in."""
    return nn.Linear(1, 1).weight.is_meta


def _load(folder: Path, config: T5Config, transformers: ModuleType) -> T5EncoderModel:
    """The encoder with the weights of `folder` as float32; those of a decoder are left out."""
    encoder, loading = transformers.T5EncoderModel.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers and only warns.
    if loading["missing_keys"]:
        raise ValueError(f"{folder}: weights missing: {', '.join(sorted(loading['missing_keys']))}")
    return encoder


def _padded(batch: int, length: int, device: torch.device) -> Tensor:
    """[batch, length] of 1 and 0: texts of different lengths, none of them empty or complete."""
    lengths = torch.arange(1, batch + 1, device=device) * length // (batch + 1)
    positions = torch.arange(length, device=device)
    return (positions < lengths.clamp(min=1)[:, None]).long()
