"""From a prompt and a seed to the inputs of a host that makes films (`ir.text_to_video`)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from odsora_compiler.errors import PackageError, UsageError, nearest
from odsora_compiler.ir.function import TensorSpec
from odsora_compiler.ir.text_to_video import TextToVideo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Random operations of a host take the other 32 bits of a generator's seed.
LARGEST_SEED = 2**32 - 1
AESTHETIC_SCORES = (0.0, 10.0)
# Guidances of use are below 20; far beyond, numbers leave the range of half precision.
LARGEST_GUIDANCE = 1000.0

_SCORE = "{aesthetic_score}"
# Categories of characters without a shape: control, format (such as zero-width), separators.
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}
_SHOWN = 40  # characters of a prompt that a message repeats


@dataclass(frozen=True)
class EncodedPrompt:
    """`tokens` and `mask`, both [1, L] int64, and what the user should hear about them."""

    tokens: torch.Tensor
    mask: torch.Tensor
    warnings: tuple[str, ...] = ()


def encode_prompt(
    text: TextToVideo, prompt: str, length: int, aesthetic_score: float | None = None
) -> EncodedPrompt:
    """The tokens of `prompt` and the suffix, filled up with padding to `length` = L.

    A prompt that is too long is cut so that the suffix and the tokens which the tokenizer adds at
    the ends stay; a warning says where. Raises `UsageError` on a prompt without text, and on an
    `aesthetic_score` that the suffix has no place for or that is not in 0..10; `PackageError` on a
    tokenizer that cannot be read.
    """
    words = _words(prompt)
    encoding = _tokenizer(text.tokenizer).encode(words + _suffix(text, aesthetic_score))
    # Each of these is made anew whenever it is asked for.
    ids, spans, added = encoding.ids, encoding.offsets, encoding.special_tokens_mask
    own = [i for i, (_, end) in enumerate(spans) if end <= len(words) and not added[i]]
    unknown = _unknown_token(text.tokenizer)
    warnings = _unread([words[slice(*spans[i])] for i in own if ids[i] == unknown])
    excess = len(ids) - length
    dropped: Sequence[int] = ()
    if 0 < excess < len(own):
        kept = _whole_characters([spans[i] for i in own], len(own) - excess)
        dropped = own[kept:]
        warnings.append(
            f"the prompt was cut after {kept} of {len(own)} tokens: "
            f"'{_end_of(words[: spans[own[kept - 1]][1]])}'"
        )
    elif excess > 0:
        # Not even one token of the prompt fits beside the suffix.
        dropped = [i for i in range(len(ids)) if not added[i]][-excess:]
        warnings.append(f"only {length} tokens fit: the suffix and the end of the prompt were cut")
    ids = [ids[i] for i in sorted(set(range(len(ids))) - set(dropped))][:length]
    tokens = torch.full((1, length), text.padding, dtype=torch.int64)
    tokens[0, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    mask = (torch.arange(length) < len(ids)).to(torch.int64)[None]
    return EncodedPrompt(tokens, mask, tuple(warnings))


def check_seed(seed: int) -> None:
    """Raise `UsageError` on a seed that is not in 0..2³²-1."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"the seed {seed} cannot be used", f"Seeds are 0 to {LARGEST_SEED}.")


def noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """float32 from N(0, 1), drawn on the CPU: the same on every machine with the same PyTorch.

    Raises `UsageError` like `check_seed`.
    """
    check_seed(seed)
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def host_inputs(
    text: TextToVideo,
    specs: Sequence[TensorSpec],
    examples: Mapping[str, torch.Tensor],
    prompt: str,
    seed: int,
    guidance: float | None = None,
    aesthetic_score: float | None = None,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Every input of a host with the signature `specs`, and warnings about the prompt.

    Inputs that `text` gives no role keep their `examples`, and so does the guidance where it is
    None. Raises `UsageError` like `encode_prompt` and `noise`, and on a `guidance` that is not
    in -1000..1000 or that the host does not take.
    """
    by_name = {spec.name: spec for spec in specs}
    for role in (text.tokens, text.mask, text.noise, text.guidance):
        if role and role not in by_name:
            raise PackageError(
                f"the host program has no input '{role}', which its text-to-video part names",
                nearest(role, by_name),
            )
    encoded = encode_prompt(text, prompt, by_name[text.tokens].shape[-1], aesthetic_score)
    found = {**examples, text.tokens: encoded.tokens}
    if text.mask:
        found[text.mask] = encoded.mask
    found[text.noise] = noise(by_name[text.noise].shape, seed)
    if guidance is not None:
        if not text.guidance:
            raise UsageError("this bundle has no guidance", "Leave out --guidance.")
        # Also false for nan.
        if not -LARGEST_GUIDANCE <= guidance <= LARGEST_GUIDANCE:
            raise UsageError(
                f"a guidance of {guidance:g}",
                f"Give a number from {-LARGEST_GUIDANCE:g} to {LARGEST_GUIDANCE:g}, such as 3.",
            )
        found[text.guidance] = torch.full(by_name[text.guidance].shape, guidance)
    return {name: found[name].to(spec.dtype) for name, spec in by_name.items()}, encoded.warnings


def _words(prompt: str) -> str:
    words = prompt.strip()
    if all(unicodedata.category(character) in _UNSEEN for character in words):
        raise UsageError(
            "the prompt is empty", "Say what to show: --prompt 'a red circle moving left'."
        )
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid UTF-8", "Check the terminal's locale.") from error
    return words


def _suffix(text: TextToVideo, aesthetic_score: float | None) -> str:
    if _SCORE not in text.suffix:
        if aesthetic_score is not None:
            raise UsageError(
                "this bundle has no aesthetic score: its model knows of none",
                "Leave out --aesthetic-score.",
            )
        return text.suffix
    score = text.aesthetic_score if aesthetic_score is None else aesthetic_score
    low, high = AESTHETIC_SCORES
    # Also false for nan.
    if not low <= score <= high:
        raise UsageError(f"an aesthetic score of {score:g}", f"Scores go from {low:g} to {high:g}.")
    # One decimal, as in the captions that Open-Sora 1.2 was trained with.
    return text.suffix.replace(_SCORE, f"{score:.1f}")


def _tokenizer(data: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(data)
    except Exception as error:  # The library raises Exception itself.
        raise PackageError(
            f"the bundle's tokenizer cannot be read: {error}",
            "Copy the bundle again or recompile it.",
        ) from error
    # A file may bring both along; here cutting keeps the suffix, and the host says the length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _end_of(words: str) -> str:
    return words if len(words) <= _SHOWN else f"…{words[-_SHOWN:]}"


def _whole_characters(spans: Sequence[tuple[int, int]], count: int) -> int:
    """`count` or fewer of the tokens: not between those of one character, such as its bytes."""
    for kept in range(count, 0, -1):
        if spans[kept][0] >= spans[kept - 1][1]:
            return kept
    return count


def _unknown_token(data: str) -> int | None:
    """The number that a tokenizer's file says stands for what it does not know."""
    model = json.loads(data)["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return model["vocab"].get(model["unk_token"]) if model.get("unk_token") is not None else None


def _unread(parts: Sequence[str]) -> list[str]:
    """A warning when the tokenizer has no token for `parts` of the prompt."""
    if not parts:
        return []
    shown = "".join(dict.fromkeys(part.strip() for part in parts))[:_SHOWN]
    return [f"the model's vocabulary lacks '{shown}': it reads an unknown word there"]
