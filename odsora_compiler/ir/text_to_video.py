"""How the host of a program makes a film of a prompt: which of its inputs and outputs are what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextToVideo:
    """Roles of a host's inputs and outputs, for a program that turns a prompt into a film.

    `tokenizer`: the text of a `tokenizer.json` of Hugging Face's `tokenizers`. `tokens`: the input
    of token numbers [1, L], int64, filled up with `padding`. `mask`: the input [1, L], int64, 1
    where there is a token, or `""`. `noise`: the input that is drawn from N(0, 1). `video`: the
    output [1, 3, frames, height, width] in -1..1. `fps`: frames a second of the film. `suffix` is
    appended to every prompt; `{aesthetic_score}` in it is replaced by an option of that name, whose
    default is `aesthetic_score`. `guidance`: the input, one float32, that says how much the text
    weighs (its default is the example), or `""`.
    """

    tokenizer: str
    tokens: str = "tokens"
    mask: str = "mask"
    noise: str = "z"
    video: str = "video"
    guidance: str = "guidance"
    padding: int = 0
    fps: float = 24.0
    suffix: str = ""
    aesthetic_score: float = 6.5
