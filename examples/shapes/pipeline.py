"""A small text-to-video model that was trained: coloured shapes that move.

    odsora-compile examples/shapes/pipeline.py --passes tdtm,lpl,cidl -o shapes.odsora
    odsora-run shapes.odsora --prompt 'a red circle moving left' --seed 7 -o film.mp4

The sampler is that of Open-Sora 1.2 (../open_sora/text_to_video.py), the networks are its classes
in small (networks.py) with the weights that train.py left in weights/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import networks

sys.path.append(str(Path(__file__).parents[1] / "open_sora"))
from text_to_video import text_to_video

if TYPE_CHECKING:
    import odsora_compiler as odsora


def build(
    steps: int = networks.STEPS,
    guidance: float = networks.GUIDANCE,
    frames: int = networks.FRAMES,
    decode_frames: int | None = None,
    weights: Path = networks.WEIGHTS,
) -> odsora.PipelineSpec:
    """Films of 32 x 32 pixels: a prompt such as "a red circle moving left".

    The model knows red, green, blue and yellow circles, squares and triangles that move left,
    right, up or down. `steps` of the sampler. `guidance`: how much the prompt weighs. It was
    trained on films of 34 frames; others work more or less. `decode_frames`: frames that the
    spatial decoder is given at a time (none: all of them). `weights`: a folder that train.py
    filled. Raises FileNotFoundError where it is empty, ValueError on a film that cannot be made.
    """
    model = networks.load(weights)
    return text_to_video(
        model.text_encoder,
        model.denoiser,
        model.vae,
        tokenizer=model.tokenizer.to_str(),
        frames=frames,
        height=networks.PIXELS,
        width=networks.PIXELS,
        steps=steps,
        guidance=guidance,
        fps=networks.FPS,
        time_shift=False,
        decode_frames=frames if decode_frames is None else decode_frames,
        padding=networks.PAD,
    )
