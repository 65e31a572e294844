"""How the host of a program makes a film of a prompt: which of its inputs and outputs are what."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

    def problems(self) -> Iterator[str]:
        """What is wrong with fields by themselves; each text names the field and the remedy.

        The tokenizer is only known to be text: whether it can be read is checked at capture.
        """
        texts = ("tokenizer", "tokens", "mask", "noise", "video", "guidance", "suffix")
        wrong = [name for name in texts if not isinstance(getattr(self, name), str)]
        for name in wrong:
            yield f"text_to_video: {name} is {getattr(self, name)!r}; give a text"
        if not _is_number(self.fps) or self.fps <= 0:
            yield f"text_to_video: fps is {self.fps!r}; give a finite number above 0, such as 24"
        if not isinstance(self.padding, int) or not 0 <= self.padding < 2**31:
            yield (
                f"text_to_video: padding is {self.padding!r}; give the number of the padding "
                "token, 0 or more"
            )
        if not _is_number(self.aesthetic_score) or not 0 <= self.aesthetic_score <= 10:
            yield (
                f"text_to_video: aesthetic_score is {self.aesthetic_score!r}; give a number from "
                "0 to 10"
            )
        if "suffix" not in wrong and set("{}") & set(self.suffix.replace("{aesthetic_score}", "")):
            yield (
                f"text_to_video: the suffix {self.suffix!r} has braces that nothing replaces; only "
                "{aesthetic_score} may be in braces, without a format"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
