"""From prompts to tokens, with tokenizers of the kinds that text encoders come with."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from odsora_compiler.errors import OdsoraError, PackageError, UsageError
from odsora_compiler.ir.function import TensorSpec
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.runtime.prompt import LARGEST_SEED, encode_prompt, host_inputs, noise

SUFFIX = " aesthetic score: {aesthetic_score}."


def byte_tokenizer() -> Tokenizer:
    """A token a byte and one that ends the text, like ByT5's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """Word pieces by likelihood, an unknown token and one that ends the text, like T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    colours = ("red", "green", "blue", "white")
    texts = [f"a {colour} circle moving left aesthetic score: 6.5." for colour in colours]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """A token a word, one that begins the text and one that ends it, like BERT's and CLIP's."""
    words = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "circle", "moving", "left"]
    words += ["aesthetic", "score", ":", ".", "6", "5"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return tokenizer


KINDS = pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer, word_tokenizer])


def role(tokenizer: Tokenizer, suffix: str = SUFFIX, **roles: str) -> TextToVideo:
    return TextToVideo(tokenizer.to_str(), suffix=suffix, **roles)  # type: ignore[arg-type]


def shown(tokenizer: Tokenizer, tokens: torch.Tensor, mask: torch.Tensor) -> str:
    """The text that tokens stand for, without those that begin and end it."""
    ends = tokenizer.encode("").ids
    return tokenizer.decode([i for i in tokens[0][mask[0].bool()].tolist() if i not in ends])


@KINDS
def test_tokens_are_the_tokenizers_own(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    expected = tokenizer.encode("a red circle aesthetic score: 6.5.").ids
    found = encode_prompt(role(tokenizer), "  a red circle\n", 64)
    assert found.tokens.shape == found.mask.shape == (1, 64)
    assert found.tokens.dtype == found.mask.dtype == torch.int64
    assert found.tokens[0, : len(expected)].tolist() == expected
    assert found.mask[0].tolist() == [1] * len(expected) + [0] * (64 - len(expected))
    assert (found.tokens[0, len(expected) :] == 0).all() and found.warnings == ()
    padded = TextToVideo(tokenizer.to_str(), padding=9)
    assert encode_prompt(padded, "a red circle", 64).tokens[0, -1] == 9


def test_the_file_may_bring_cutting_and_padding_along() -> None:
    tokenizer = byte_tokenizer()
    plain = encode_prompt(role(tokenizer), "a red circle", 48)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=30, pad_id=7)
    assert torch.equal(encode_prompt(role(tokenizer), "a red circle", 48).tokens, plain.tokens)


@KINDS
def test_what_is_too_long_is_cut_before_the_suffix(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    length = len(tokenizer.encode("a red circle aesthetic score: 6.5.").ids)
    found = encode_prompt(role(tokenizer), "a red circle moving left", length)
    assert found.mask.all()
    expected = tokenizer.encode("a red circle aesthetic score: 6.5.").ids
    assert found.tokens[0].tolist() == expected
    ends = len(expected) - len(tokenizer.encode("a red circle").ids)
    kept = length - ends - len(tokenizer.encode("").ids)
    total = len(tokenizer.encode("a red circle moving left").ids) - len(tokenizer.encode("").ids)
    (warning,) = found.warnings
    assert f"cut after {kept} of {total} tokens: 'a red circle'" in warning


@KINDS
def test_a_prompt_of_ten_thousand_characters(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    prompt = ("a red circle moving left " * 400)[:10_000]
    found = encode_prompt(role(tokenizer), prompt, 60)
    text = shown(tokenizer, found.tokens, found.mask).replace(" ", "")
    assert found.mask.all() and text.endswith("aestheticscore:6.5.")
    assert found.tokens[0, -1] == tokenizer.encode("").ids[-1]
    (warning,) = found.warnings
    assert "cut after" in warning and len(warning) < 120


def test_characters_are_not_cut_in_two() -> None:
    tokenizer = byte_tokenizer()
    prompt = "красный круг 赤い円 🔴"
    whole = encode_prompt(role(tokenizer), prompt, 100)
    assert shown(tokenizer, whole.tokens, whole.mask) == f"{prompt} aesthetic score: 6.5."
    assert whole.warnings == ()
    needed = int(whole.mask.sum())
    for length in range(needed - 1, 25, -1):
        cut = encode_prompt(role(tokenizer), prompt, length)
        text = shown(tokenizer, cut.tokens, cut.mask)
        assert "\ufffd" not in text and text.endswith(" aesthetic score: 6.5.")
        assert prompt.startswith(text.removesuffix(" aesthetic score: 6.5."))
        # At most the rest of one character's bytes stays unused.
        assert cut.mask.sum() > length - 4 and cut.tokens[0, int(cut.mask.sum()) - 1] == 1


@KINDS
def test_a_suffix_that_does_not_fit_is_cut_as_well(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("a red circle" + SUFFIX.format(aesthetic_score=6.5)).ids
    found = encode_prompt(role(tokenizer), "a red circle", 5)
    added = len(tokenizer.encode("").ids)
    assert found.tokens[0].tolist() == [*ids[: 5 - 1], ids[-1]] and added in (1, 2)
    assert "only 5 tokens fit" in found.warnings[0]


def test_parts_that_the_model_cannot_read_are_named() -> None:
    for tokenizer in (piece_tokenizer(), word_tokenizer()):
        found = encode_prompt(role(tokenizer), "a red 円 circle", 64)
        assert len(found.warnings) == 1 and "lacks '円'" in found.warnings[0]
        assert found.mask.sum() == len(tokenizer.encode("a red 円 circle").ids) + int(
            len(tokenizer.encode(" aesthetic score: 6.5.").ids) - len(tokenizer.encode("").ids)
        )


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "\u3000"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        encode_prompt(role(byte_tokenizer()), prompt, 48)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match="not valid UTF-8"):
        encode_prompt(role(byte_tokenizer()), b"a red \xff".decode(errors="surrogateescape"), 48)


@pytest.mark.parametrize(
    ("score", "text"), [(None, "6.5"), (7.0, "7.0"), (0.0, "0.0"), (4.25, "4.2")]
)
def test_the_aesthetic_score_is_in_the_suffix(score: float | None, text: str) -> None:
    tokenizer = byte_tokenizer()
    found = encode_prompt(role(tokenizer), "a", 48, score)
    assert shown(tokenizer, found.tokens, found.mask) == f"a aesthetic score: {text}."


@pytest.mark.parametrize("score", [-0.1, 10.1, float("nan"), float("inf")])
def test_scores_there_are_not(score: float) -> None:
    with pytest.raises(UsageError, match="an aesthetic score of"):
        encode_prompt(role(byte_tokenizer()), "a", 48, score)


def test_a_score_that_the_suffix_has_no_place_for() -> None:
    with pytest.raises(UsageError, match="--aesthetic-score"):
        encode_prompt(role(byte_tokenizer(), suffix=" moving"), "a", 48, 5.0)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_is_named(text: str) -> None:
    with pytest.raises(PackageError, match="tokenizer cannot be read"):
        encode_prompt(TextToVideo(text), "a", 8)


def test_noise_is_that_of_the_seed() -> None:
    first = noise((1, 4, 10, 8, 8), 7)
    assert first.dtype == torch.float32 and torch.equal(first, noise((1, 4, 10, 8, 8), 7))
    assert abs(float(first.mean())) < 0.08 and abs(float(first.std()) - 1) < 0.08
    assert not torch.equal(first, noise((1, 4, 10, 8, 8), 8))
    state = torch.get_rng_state()
    noise((2,), LARGEST_SEED)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 2**70])
def test_seeds_there_are_not(seed: int) -> None:
    with pytest.raises(UsageError, match=f"the seed {seed}"):
        noise((2,), seed)


SPECS = (
    TensorSpec("z", (1, 4, 2, 3, 3), torch.float16),
    TensorSpec("ids", (1, 40), torch.int64),
    TensorSpec("weight", (), torch.float32),
    TensorSpec("rate", (1,), torch.float32),
)
EXAMPLES = {
    "z": torch.zeros(1, 4, 2, 3, 3, dtype=torch.float16),
    "ids": torch.zeros(1, 40, dtype=torch.int64),
    "weight": torch.tensor(3.0),
    "rate": torch.tensor([12.0]),
}


def test_every_input_of_the_host_is_given() -> None:
    text = role(byte_tokenizer(), suffix="", tokens="ids", mask="", guidance="weight")
    found, warnings = host_inputs(text, SPECS, EXAMPLES, "a red circle", 7)
    assert list(found) == [spec.name for spec in SPECS] and warnings == ()
    for spec in SPECS:
        assert found[spec.name].shape == spec.shape and found[spec.name].dtype == spec.dtype
    assert torch.equal(found["z"], noise((1, 4, 2, 3, 3), 7).half())
    assert found["weight"] == 3.0 and found["rate"] == 12.0
    other, _ = host_inputs(text, SPECS, EXAMPLES, "a red circle", 7, guidance=1.5)
    assert other["weight"] == 1.5
    assert EXAMPLES["weight"] == 3.0


@pytest.mark.parametrize(
    ("roles", "guidance", "kind", "expected"),
    [
        ({"guidance": ""}, 2.0, UsageError, "no guidance"),
        ({"guidance": "weight"}, float("nan"), UsageError, "a guidance of nan"),
        ({"guidance": "weight"}, 1e40, UsageError, r"a guidance of 1e\+40"),
        ({"guidance": "weight"}, -1000.5, UsageError, "from -1000 to 1000"),
        ({"guidance": "wieght"}, None, PackageError, "no input 'wieght'"),
    ],
)
def test_a_guidance_that_cannot_be_used(
    roles: dict[str, str], guidance: float | None, kind: type[OdsoraError], expected: str
) -> None:
    text = role(byte_tokenizer(), suffix="", tokens="ids", mask="", **roles)
    with pytest.raises(kind, match=expected):
        host_inputs(text, SPECS, EXAMPLES, "a red circle", 7, guidance)


def test_the_tokenizer_in_a_bundle_is_plain_json() -> None:
    assert json.loads(role(piece_tokenizer()).tokenizer)["model"]["type"] == "Unigram"
