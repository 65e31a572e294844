"""The whole of Open-Sora 1.2: the sampler's parity, the film, its sizes, checkpoints, passes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from example_files import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.errors import CaptureError
from odsora_compiler.frontend.model_file import load_build
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.runtime.prompt import encode_prompt

MODEL = ROOT / "examples/open_sora/pipeline.py"

pytest.importorskip("diffusers", reason="the decoder's spatial part is diffusers' AutoencoderKL")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")

build = load_build(MODEL)
text_to_video = sys.modules["text_to_video"]  # the model file imports it


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other at every small operator when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ the sampler


class ToyDrift(nn.Module):
    """The drift of the golden files; the first half of y is the prompt's."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("W", W)
        self.register_buffer("b", b)

    def forward(self, z: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        time = self.b * timestep[:, None] / 1000
        drift = torch.tanh(torch.einsum("bcthw,cd->bdthw", z, self.W))
        return drift + (time + y.mean(dim=(1, 2, 3))[:, None])[..., None, None, None]


@pytest.fixture(params=["rflow_a", "rflow_b"])
def golden(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """The film, the file's config and its tensors."""
    with safe_open(ROOT / f"tests/golden/{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    film = text_to_video.Film(
        frames=config["num_frames"],
        height=int(config["height"]),
        width=int(config["width"]),
        fps=24.0,
        steps=config["num_sampling_steps"],
        time_shift=config["use_timestep_transform"],
        group_frames=17,
        group_latents=5,
        decode_frames=1,
    )
    return film, config, tensors


def test_timesteps_are_those_of_the_public_implementation(golden: Any) -> None:
    film, _, tensors = golden
    assert text_to_video.timesteps(film) == tensors["out.timesteps"].tolist()


def test_the_sampler_follows_the_public_implementation(golden: Any) -> None:
    film, config, tensors = golden
    drift = ToyDrift(tensors["in.W"], tensors["in.b"])
    y = torch.cat([tensors["in.y"], tensors["in.y_null"]])

    def host(c: Any, z: Tensor, y: Tensor, guidance: Tensor) -> dict[str, Tensor]:
        def velocity(z: Tensor, timestep: Tensor) -> Tensor:
            return c.drift(z=z, timestep=timestep, y=y)

        times = text_to_video.timesteps(film)
        return {"out": text_to_video.rectified_flow(velocity, z, times, guidance)}

    inputs = {"z": tensors["in.z"], "y": y, "guidance": torch.tensor([config["cfg_scale"]])}
    eager = host(SimpleNamespace(drift=drift), **inputs)["out"]
    torch.testing.assert_close(eager, tensors["out.z_full"], rtol=0, atol=1e-5)

    example = {"z": torch.cat([inputs["z"]] * 2), "timestep": torch.zeros(2), "y": y}
    spec = odsora.PipelineSpec({"drift": odsora.ModelSpec(drift, example)}, host, inputs)
    program = odsora.capture(spec)
    assert len(program.calls()) == config["num_sampling_steps"]
    captured = evaluate_program(program, inputs)["out"]
    torch.testing.assert_close(captured, tensors["out.z_full"], rtol=0, atol=1e-5)


def test_timesteps_without_the_shift_and_of_small_films() -> None:
    def times(**changed: Any) -> list[float]:
        film = {"frames": 17, "height": 512, "width": 512, "fps": 24.0, "steps": 4}
        rest = {"time_shift": True, "group_frames": 17, "group_latents": 5, "decode_frames": 1}
        return text_to_video.timesteps(text_to_video.Film(**{**film, **rest, **changed}))

    even = [1000.0, 750.0, 500.0, 250.0]
    assert times(time_shift=False) == even
    # A single picture of 512 x 512, and any film shorter than a group, count as one latent frame.
    assert times(frames=1) == pytest.approx(even)
    assert times(frames=16) == pytest.approx(even)
    r = 5**0.5
    assert times()[2] == pytest.approx(1000 * r * 0.5 / (1 + (r - 1) * 0.5))


# ------------------------------------------------------------------ the whole

SMALL = {"steps": 3, "height": 8, "width": 16}


def eager_film(spec: Any, **changed: Tensor) -> Tensor:
    """The film that the modules make without the compiler."""

    def caller(part: Any) -> Any:
        bound = {k: v for k, v in part.inputs.items() if not isinstance(v, Tensor)}

        def call(**inputs: Tensor) -> Tensor:
            output = part.module(**inputs, **bound)
            return next(iter(output.values())) if isinstance(output, dict) else output

        return call

    c = SimpleNamespace(**{name: caller(part) for name, part in spec.components.items()})
    with torch.no_grad():
        return spec.host(c, **{**spec.inputs, **changed})["video"]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """A spec of 20 frames, a whole group of 17 and a rest, and its program."""
    spec = build(**SMALL)
    return spec, odsora.capture(spec)


def test_the_program_makes_the_film_that_the_modules_make(small: Any) -> None:
    spec, program = small
    found = evaluate_program(program, program.examples)["video"]
    assert found.shape == (1, 3, 20, 8, 16)
    torch.testing.assert_close(found, eager_film(spec), rtol=0, atol=1e-5)


def test_it_follows_prompt_noise_and_guidance(small: Any) -> None:
    spec, program = small
    roles = program.text_to_video
    prompt = encode_prompt(roles, "snow", program.examples["tokens"].shape[1])
    inputs = {
        "tokens": prompt.tokens,
        "mask": prompt.mask,
        "z": torch.randn(1, 4, 6, 4, 8, generator=torch.Generator().manual_seed(3)),
        "guidance": torch.tensor([2.0]),
    }
    found = evaluate_program(program, inputs)["video"]
    torch.testing.assert_close(found, eager_film(spec, **inputs), rtol=0, atol=1e-5)
    for name, value in inputs.items():
        other = evaluate_program(program, {**program.examples, name: value})["video"]
        before = evaluate_program(program, program.examples)["video"]
        assert name == "mask" or not torch.equal(other, before), name


def test_the_decoder_in_groups_is_the_decoder_at_once(small: Any) -> None:
    spec, _ = small
    temporal, spatial = (
        spec.components[name].module for name in ("temporal_decoder", "spatial_decoder")
    )
    z = torch.randn(1, 4, 6, 4, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = spatial(temporal(z, 20)["latents"], 20)["video"]
        c = SimpleNamespace(
            temporal_decoder=lambda z: temporal(z, 17)["latents"],
            temporal_decoder_rest=lambda z: temporal(z, 3)["latents"],
            spatial_decoder=lambda z: spatial(z, 1)["video"],
        )
        parts = text_to_video.decode(c, z, spec.host.keywords["film"])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_the_empty_caption_counts_as_guidance_says() -> None:
    """At guidance 1 the caption of no text has no weight, at 0 it has all."""
    spec = build(**SMALL)
    captions = spec.components["captions"].module

    def film(guidance: float) -> Tensor:
        return eager_film(spec, guidance=torch.tensor([guidance]))

    before = film(0.0), film(1.0)
    assert list(captions.state_dict()) == ["y_embedder.y_embedding"]
    captions.y_embedder.y_embedding.add_(1.0)
    assert not torch.allclose(film(0.0), before[0], atol=1e-2)
    torch.testing.assert_close(film(1.0), before[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("frames", "components", "calls"),
    [
        (17, {"temporal_decoder"}, 17),
        (34, {"temporal_decoder"}, 2),
        (5, {"temporal_decoder_rest"}, 5),
        (1, {"temporal_decoder_rest"}, 1),
    ],
)
def test_films_of_other_lengths(frames: int, components: set[str], calls: int) -> None:
    spec = build(**SMALL, frames=frames, decode_frames=frames // calls)
    decoders = {name for name in spec.components if name.startswith("temporal")}
    assert decoders == components
    assert eager_film(spec).shape == (1, 3, frames, 8, 16)


def test_released_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        spec = build(size="release")
    millions = {
        name: sum(p.numel() for p in spec.components[name].module.parameters()) / 1e6
        for name in ("text_encoder", "denoiser", "temporal_decoder", "spatial_decoder")
    }
    assert millions["text_encoder"] == pytest.approx(4762.3, abs=0.1)
    assert millions["denoiser"] == pytest.approx(1207.6, abs=0.1)
    assert spec.inputs["z"].shape == (1, 4, 20, 24, 24)
    assert spec.inputs["tokens"].shape == (1, 300)
    assert spec.text_to_video.suffix == " aesthetic score: {aesthetic_score}."
    assert spec.host.keywords["film"].steps == 30


def test_tokens_are_padded_bytes_with_an_end(small: Any) -> None:
    spec, _ = small
    tokens, mask = spec.inputs["tokens"][0].tolist(), spec.inputs["mask"][0].tolist()
    length = sum(mask)
    assert mask == [1] * length + [0] * (48 - length)
    assert tokens[length - 1 :] == [1] + [0] * (48 - length)
    assert length == len("a red circle moving left aesthetic score: 6.5.") + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 9}, "height=9: it must be a multiple of 2 pixels, such as 8 or 10"),
        ({"width": 0}, "width=0: it must be a multiple of 2 pixels, such as 2 or 4"),
        ({"frames": 0}, "frames=0: a film has at least 1 frame"),
        ({"steps": 0}, "steps=0: a sampler takes at least 1 step"),
        ({"decode_frames": 3}, "decode_frames=3: it must divide the 20 frames: 1, 2, 4, 5, 10, 20"),
        ({"tokenizer": Path("none.json")}, "none.json: no such file"),
    ],
)
def test_what_cannot_be_made_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace(".", r"\.")):
        build(**{**SMALL, **options})
    with pytest.raises(CaptureError, match=message.replace(".", r"\.")):
        odsora.capture(MODEL, {**SMALL, **options})


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"word{number}": number for number in range(600)}
    Tokenizer(models.WordLevel(words, unk_token="word2")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer has 600 tokens, the text encoder 512"):
        build(**SMALL, tokenizer=tmp_path / "tokenizer.json")


def test_checkpoints_in_the_released_layouts(small: Any, tmp_path: Path) -> None:
    """One checkpoint for the denoiser and the empty caption, one for both decoders."""
    spec, _ = small
    other = build(**SMALL, seed=5)
    denoiser = other.components["denoiser"].module.state_dict()
    text_encoder = other.components["text_encoder"].module.state_dict()
    del text_encoder["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    text_encoder["decoder.final_layer_norm.weight"] = torch.zeros(3)
    vae = {
        **other.components["temporal_decoder"].module.state_dict(),
        **other.components["spatial_decoder"].module.state_dict(),
    }
    assert {"scale", "shift"} <= vae.keys()
    (tmp_path / "denoiser").mkdir()
    names = sorted(denoiser)
    for part in range(2):
        shard = {name: denoiser[name] for name in names[part::2]}
        save_file(shard, tmp_path / f"denoiser/model-{part + 1}-of-2.safetensors")
    save_file(text_encoder, tmp_path / "text_encoder.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    program = odsora.capture(MODEL, SMALL, weights=tmp_path)
    found = evaluate_program(program, spec.inputs)["video"]
    torch.testing.assert_close(found, eager_film(other, **spec.inputs), rtol=0, atol=1e-5)


def test_token_merging_finds_the_denoiser_only(small: Any) -> None:
    _, program = small
    merged = odsora.run_passes(program, "tdtm{steps=2}", verify="structure")
    functions = {name: set(part.functions) for name, part in merged.components.items()}
    assert functions.pop("denoiser") == {"base", "tdtm"}
    assert all(names == {"base"} for names in functions.values())
    assert [node.args[1] for node in merged.calls("denoiser")] == ["tdtm", "tdtm", "base"]
