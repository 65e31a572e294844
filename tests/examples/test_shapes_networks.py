"""The small text-to-video model: its tokenizer, its weights, and whether films show the prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/shapes"))
import clips
import evaluate
import networks
import reading
import train


@pytest.fixture(scope="module")
def model() -> networks.Networks:
    return networks.load()


@pytest.mark.parametrize(
    "text", ["a red circle", "Ein Käse, 日本語 🙂", " two  spaces\n", "<pad></s>", ""]
)
def test_tokens_are_the_bytes_of_the_text(model: networks.Networks, text: str) -> None:
    ids = model.tokenizer.encode(text).ids
    assert ids[-1] == networks.END
    assert len(ids) == len(text.encode()) + 1
    assert min([*ids[:-1], 2]) >= 2  # neither padding nor end
    assert model.tokenizer.decode(ids[:-1]) == text


def test_each_byte_has_a_token_of_its_own() -> None:
    tokenizer = networks.tokenizer()
    assert tokenizer.get_vocab_size() == networks.text_encoder().config.vocab_size == 258
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")) == (0, 1)


def test_encoding_pads_and_cuts(model: networks.Networks) -> None:
    ids, mask = networks.encode(model.tokenizer, ["red", "x" * 1000])
    assert ids.shape == mask.shape == (2, 48)
    assert mask.sum(dim=1).tolist() == [4, 48]
    assert (ids[0, 3], ids[1, 47]) == (networks.END, networks.END)
    assert ids[0, 4:].unique().tolist() == [networks.PAD]


def test_weights_are_small_and_complete(model: networks.Networks) -> None:
    files = sorted(path.name for path in networks.WEIGHTS.glob("*.safetensors"))
    assert files == ["stdit3.safetensors", "t5.safetensors", "vae.safetensors"]
    assert sum((networks.WEIGHTS / name).stat().st_size for name in files) <= 20e6
    modules = (model.text_encoder, model.denoiser, model.vae)
    for module in modules:
        assert not module.training
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    assert not torch.equal(model.vae.scale, networks.video_vae().scale)


def test_saving_and_loading_keeps_the_weights(model: networks.Networks, tmp_path: Path) -> None:
    networks.save(model, tmp_path)
    again = networks.load(tmp_path)
    for name in ("text_encoder", "denoiser", "vae"):
        state = getattr(again, name).state_dict()
        for key, tensor in getattr(model, name).state_dict().items():
            assert torch.equal(state[key], tensor), key


def test_a_folder_without_weights_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.py"):
        networks.load(tmp_path)


def test_autoencoder_keeps_what_a_clip_shows(model: networks.Networks) -> None:
    films = train.render_all(np.random.default_rng(11), 1)[::6]
    latents = train.encode(model.vae, torch.from_numpy(films))
    assert latents.shape[1:] == networks.LATENT
    assert 0.5 < latents.std() < 2  # normalised: the sampler starts from noise of deviation 1
    with torch.no_grad():
        decoded = evaluate.to_pixels(model.vae(latents, clips.FRAMES)["video"])
    for film, original, subject in zip(decoded, films, clips.SUBJECTS[::6], strict=True):
        assert reading.read(film).agrees(subject)["all"]
        assert reading.psnr(film, original) > 24


def test_films_show_what_their_prompts_say(model: networks.Networks) -> None:
    subjects = [clips.SUBJECTS[i] for i in (0, 17, 34, 43)]
    assert len({s.colour for s in subjects}) == 4 and len({s.shape for s in subjects}) == 3
    for film, subject in zip(
        evaluate.films(model, [s.prompt for s in subjects], seed=5), subjects, strict=True
    ):
        assert reading.read(film).agrees(subject)["all"], (subject.prompt, reading.read(film))


def test_figures_are_those_of_a_run_that_reached_the_goal() -> None:
    figures = json.loads((networks.WEIGHTS / "figures.json").read_text())
    assert figures["prompt adherence, %"]["all"] >= 90
    assert figures["wall time, minutes"] <= 90
