"""How well the small model does what a prompt says: films from its weights, and their figures.

The sampler here is plain PyTorch, for many prompts at once, and is what training and tests go by;
pipeline.py has the one that is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable

import clips
import networks
import numpy as np
import reading
import torch
from numpy.typing import NDArray
from torch import Tensor


@torch.no_grad()
def films(
    model: networks.Networks,
    prompts: list[str],
    seed: int,
    steps: int = networks.STEPS,
    guidance: float = networks.GUIDANCE,
) -> NDArray[np.uint8]:
    """A film of each prompt, [len(prompts), 34, 3, 32, 32], each from noise of its own.

    Rectified flow in `steps` Euler steps of the same length, with classifier-free guidance.
    """
    ids, mask = networks.encode(model.tokenizer, prompts)
    text = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    nothing = model.denoiser.y_embedder.y_embedding.expand_as(text)
    y = torch.cat([text, nothing])[:, None]
    z = torch.randn(len(prompts), *networks.LATENT, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((2 * len(prompts),), 1000 * (1 - step / steps))
        drift = networks.drift(model.denoiser, torch.cat([z, z]), t, y, torch.cat([mask, mask]))
        conditional, unconditional = drift.chunk(2)
        z = z + (unconditional + guidance * (conditional - unconditional)) / steps
    return to_pixels(model.vae(z, networks.FRAMES)["video"])


def to_pixels(video: Tensor) -> NDArray[np.uint8]:
    """What the decoder makes, [B, 3, frames, H, W] in -1..1, as films [B, frames, 3, H, W]."""
    levels = (127.5 * (video.transpose(1, 2) + 1)).round().clamp(0, 255)
    return levels.to(torch.uint8).numpy()


def adherence(
    model: networks.Networks, seeds: Iterable[int], guidance: float = networks.GUIDANCE
) -> dict[str, float]:
    """Percentages of films whose `colour`, `shape`, `direction`, and `all` of them, are right.

    One film for each of the 48 plain prompts and each of the seeds.
    """
    right = [
        reading.read(film).agrees(subject)
        for seed in seeds
        for film, subject in zip(
            films(model, list(clips.PROMPTS), seed, guidance=guidance), clips.SUBJECTS, strict=True
        )
    ]
    return {name: 100 * float(np.mean([film[name] for film in right])) for name in right[0]}
