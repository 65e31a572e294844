"""The reference text encoder: what `build` makes of sizes and folders, and that it compiles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_files import ROOT, load_example
from torch import Tensor

import odsora_compiler as odsora

t5 = load_example("t5")
TINY = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "length": 9,
}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the encoder is transformers' T5EncoderModel")


def run(spec: Any, **changed: Tensor) -> Tensor:
    with torch.no_grad():
        return spec.module(**{**spec.inputs, **changed}).last_hidden_state


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install transformers"):
        t5.build(**TINY)


def test_xxl_has_the_released_parameters(transformers: Any) -> None:
    with torch.device("meta"):
        spec = t5.build(32128, 4096, 64, 10240, 24, 64, length=300)

    state = spec.module.state_dict()
    assert round(sum(p.numel() for p in spec.module.parameters()) / 1e9, 2) == 4.76
    assert state["shared.weight"].shape == (32128, 4096)
    block = "encoder.block.23.layer"
    assert state[f"{block}.1.DenseReluDense.wi_1.weight"].shape == (10240, 4096)
    assert state[f"{block}.0.SelfAttention.q.weight"].shape == (4096, 4096)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    assert state[bias.format(0)].shape == (32, 64) and bias.format(1) not in state
    assert spec.inputs["input_ids"].shape == (1, 300) and not spec.inputs["input_ids"].is_meta


def test_tokens_that_are_padding_are_not_attended(transformers: Any) -> None:
    spec = t5.build(**TINY, batch=2)
    ids, mask = spec.inputs["input_ids"], spec.inputs["attention_mask"]
    assert mask.sum(dim=1).tolist() == [3, 6]
    text = mask.bool()
    output = run(spec)

    padding_changed = torch.where(text, ids, (ids + 1) % 40)
    torch.testing.assert_close(run(spec, input_ids=padding_changed)[text], output[text])
    text_changed = torch.where(text, (ids + 1) % 40, ids)
    assert not torch.allclose(run(spec, input_ids=text_changed)[text], output[text], atol=1e-2)


def test_build_gives_the_same_model_for_the_same_seed_only(transformers: Any) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (t5.build(**TINY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(first), run(again))
    assert not torch.allclose(run(first), run(other, **first.inputs))


def test_axes_name_every_dimension_of_every_input(transformers: Any) -> None:
    spec = t5.build(**TINY)
    assert list(spec.inputs) == ["input_ids", "attention_mask"]
    assert spec.axes == {"input_ids": "b l", "attention_mask": "b l"}


def test_folder_gives_config_and_weights(transformers: Any, tmp_path: Path) -> None:
    saved = t5.build(**TINY, seed=3)
    saved.module.save_pretrained(tmp_path)

    spec = t5.build(folder=tmp_path, length=9)

    assert spec.module.config.d_ff == 40
    assert torch.equal(run(spec, **saved.inputs), run(saved))


def test_folder_of_a_whole_t5_gives_its_encoder(transformers: Any, tmp_path: Path) -> None:
    config = t5.build(**TINY).module.config
    whole = transformers.T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)

    spec = t5.build(folder=tmp_path, length=9)

    with torch.no_grad():
        expected = whole.encoder(**spec.inputs).last_hidden_state
    assert torch.equal(run(spec), expected)


def test_folder_without_a_config_is_refused(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent: no folder with a config\.json"):
        t5.build(folder=tmp_path / "absent")


def test_folder_with_missing_weights_is_refused(transformers: Any, tmp_path: Path) -> None:
    module = t5.build(**TINY).module
    state = module.state_dict()
    del state["encoder.final_layer_norm.weight"]
    module.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"weights missing: encoder\.final_layer_norm\.weight"):
        t5.build(folder=tmp_path)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_compiled_encoder_computes_the_same(
    transformers: Any, tmp_path: Path, precision: str, limit: float
) -> None:
    """The folder's config is read by the model, its weights by the compiler when they are used."""
    folder = tmp_path / "released"
    spec = t5.build(**TINY, batch=2)
    spec.module.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    options = {"folder": folder, "length": 9, "batch": 2}

    program = odsora.capture(ROOT / "examples/open_sora/t5.py", options, folder)
    program = odsora.run_passes(program, "cidl{budget=8kB}", precision=precision)
    bundle = odsora.load(odsora.lower(program, tmp_path / "t5.odsora", precision=precision))

    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(5))
    (output,) = bundle.run({**spec.inputs, "input_ids": ids}).values()
    expected = run(spec, input_ids=ids)
    assert [value.name for value in bundle.outputs] == ["last_hidden_state"]
    assert (output - expected).abs().max() <= limit * expected.abs().max()
    assert len(list((tmp_path / "t5.odsora").rglob("*.mlpackage"))) > 1
