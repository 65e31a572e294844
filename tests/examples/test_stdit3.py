"""The reference denoiser: parity with the public implementation, its names, and its export."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_files import ROOT, load_example
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TINY = {
    "depth": 1,
    "hidden_size": 48,
    "num_heads": 4,
    "caption_channels": 24,
    "model_max_length": 10,
    "latent_frames": 3,
    "latent_height": 4,
    "latent_width": 6,
}

stdit3 = load_example("stdit3")


def run(spec: Any, **changed: Tensor) -> Tensor:
    with torch.no_grad():
        return spec.module(**{**spec.inputs, **changed})["v"]


@pytest.mark.parametrize("name", ["stdit3_a", "stdit3_b"])
@pytest.mark.parametrize("text", ["masked_text", "full_length_text"])
def test_matches_the_public_implementation(name: str, text: str) -> None:
    with safe_open(ROOT / f"tests/golden/{name}.safetensors", "pt") as golden:
        config = stdit3.STDiT3Config(**json.loads(golden.metadata()["config"]))
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118
    state = {
        key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")
    }
    inputs = {key.removeprefix("in."): t for key, t in tensors.items() if key.startswith("in.")}
    if text == "full_length_text":
        del inputs["mask"]

    model = stdit3.STDiT3(config)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        v = model(**inputs)["v"]

    torch.testing.assert_close(v, tensors[f"out.{text}"], rtol=0, atol=1e-5)


def test_xl_has_the_released_parameters() -> None:
    with torch.device("meta"):
        model = stdit3.STDiT3(stdit3.STDiT3Config())

    linears = ["t_block.1"]
    linears += [f"{part}_embedder.mlp.{i}" for part in ("t", "fps") for i in (0, 2)]
    linears += ["x_embedder.proj", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"]
    linears += ["final_layer.linear"]
    others = {"rope.freqs", "y_embedder.y_embedding", "final_layer.scale_shift_table"}
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)):
        linears += [f"{block}.attn.qkv", f"{block}.attn.proj", f"{block}.mlp.fc1"]
        linears += [f"{block}.mlp.fc2", f"{block}.cross_attn.q_linear"]
        linears += [f"{block}.cross_attn.kv_linear", f"{block}.cross_attn.proj"]
        others |= {f"{block}.attn.q_norm.weight", f"{block}.attn.k_norm.weight"}
        others.add(f"{block}.scale_shift_table")
    expected = others | {f"{name}.{part}" for name in linears for part in ("weight", "bias")}

    state = model.state_dict()
    assert set(state) == expected
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 1207.6
    assert state["y_embedder.y_embedding"].shape == (300, 4096)
    assert state["rope.freqs"].shape == (36,)
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2)
    assert state["temporal_blocks.27.attn.qkv.weight"].shape == (3456, 1152)


@pytest.mark.parametrize("sizes", [{"hidden_size": 50, "num_heads": 4}, {"hidden_size": 6}])
def test_refuses_sizes_that_do_not_divide(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"hidden_size={sizes['hidden_size']}"):
        stdit3.STDiT3Config(**{"num_heads": 1, **sizes})


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 3)])
@pytest.mark.parametrize("frames", [1, 5])
def test_sizes_that_do_not_fill_patches_are_padded_with_zeros(
    frames: int, patch: tuple[int, int, int]
) -> None:
    spec = stdit3.build(
        **{**TINY, "latent_frames": frames, "latent_height": 7, "latent_width": 8},
        patch_size=patch,
    )
    z = spec.inputs["z"]
    padding = [amount for i in (2, 1, 0) for amount in (0, -z.shape[2 + i] % patch[i])]

    v = run(spec)
    v_of_padded = run(spec, z=F.pad(z, padding))

    assert v.shape == (2, 8, frames, 7, 8)
    torch.testing.assert_close(v, v_of_padded[:, :, :frames, :7, :8], rtol=0, atol=1e-6)


def test_patches_keep_their_place() -> None:
    """With the blocks silenced, a change of one patch of the input stays in that patch."""
    spec = stdit3.build(**{**TINY, "latent_frames": 4}, patch_size=(2, 2, 3))
    with torch.no_grad():
        for block in [*spec.module.spatial_blocks, *spec.module.temporal_blocks]:
            block.scale_shift_table.zero_()
            block.cross_attn.proj.weight.zero_()
        spec.module.t_block[1].weight.zero_()
        spec.module.t_block[1].bias.zero_()
    z = spec.inputs["z"].clone()
    z[1, :, 3, 1, 4] += 1

    changed = (run(spec, z=z) != run(spec)).any(dim=1)

    expected = torch.zeros_like(changed)
    expected[1, 2:4, 0:2, 3:6] = True
    assert torch.equal(changed, expected)


def test_masked_text_is_not_attended() -> None:
    spec = stdit3.build(**TINY)
    y, mask = spec.inputs["y"], spec.inputs["mask"]
    assert all(0 < length < mask.shape[1] for length in mask.sum(dim=1))
    v = run(spec)

    padding_changed = torch.where(mask[:, None, :, None] == 0, y + 1, y)
    assert torch.equal(run(spec, y=padding_changed), v)
    text_changed = torch.where(mask[:, None, :, None] == 1, y + 1, y)
    assert not torch.allclose(run(spec, y=text_changed), v, atol=1e-3)


def test_no_mask_means_all_text() -> None:
    spec = stdit3.build(**TINY, masked_text=False)
    assert "mask" not in spec.inputs and "mask" not in spec.axes
    all_text = torch.ones(2, TINY["model_max_length"], dtype=torch.long)
    torch.testing.assert_close(run(spec), run(spec, mask=all_text), rtol=0, atol=1e-6)


def test_only_the_rotary_frequencies_tell_frames_apart() -> None:
    """Reversed frames give a reversed result exactly if `rope.freqs` turns nothing."""
    spec = stdit3.build(**TINY)
    z = spec.inputs["z"]

    def reversal_error() -> float:
        return (run(spec, z=z.flip(2)).flip(2) - run(spec)).abs().max().item()

    assert reversal_error() > 1e-4
    with torch.no_grad():
        spec.module.rope.freqs.zero_()
    assert reversal_error() < 1e-6


def test_temporal_block_turns_queries_and_keys_by_position_times_frequency() -> None:
    """Against complex multiplication: feature pairs times exp(i · position · frequency)."""
    seed = 3
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    rope = stdit3.RotaryEmbedding(8)
    with torch.no_grad():
        rope.freqs.copy_(torch.rand(4, generator=random))
    x = torch.randn(2, 3, 5, 8, generator=random)

    turned = stdit3.rotate(x, *rope(5))

    angles = torch.arange(5)[:, None] * rope.freqs
    pairs = torch.view_as_complex(x.reshape(2, 3, 5, 4, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(turned, expected)


def test_norm_of_small_values_adds_the_released_epsilon() -> None:
    norm = stdit3.RMSNorm(4)
    x = torch.tensor([[1e-3, -1e-3, 1e-3, -1e-3]])  # mean square 1e-6, as large as epsilon
    torch.testing.assert_close(norm(x), x / (2e-6) ** 0.5)


def test_build_gives_the_same_model_for_the_same_seed_only() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (stdit3.build(**TINY, seed=seed) for seed in (0, 0, 1))

    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(first), run(again))
    assert not torch.equal(first.inputs["z"], other.inputs["z"])
    assert not torch.allclose(run(first), run(other, **first.inputs))


def test_every_input_and_every_parameter_of_the_default_model_matters() -> None:
    spec = stdit3.build(depth=1, latent_frames=3, latent_height=4, latent_width=6)
    v = run(spec)
    assert v.std() > 0.1

    for name, value in spec.inputs.items():
        changed = 1 - value if name == "mask" else value * 1.5
        assert (run(spec, **{name: changed}) - v).abs().max() > 1e-3, name

    spec.module(**spec.inputs)["v"].square().sum().backward()
    for name, parameter in spec.module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_axes_name_every_dimension_of_every_input() -> None:
    spec = stdit3.build(**TINY)
    assert list(spec.inputs) == ["z", "timestep", "y", "mask", "fps", "height", "width"]
    assert {name: len(axes.split()) for name, axes in spec.axes.items()} == {
        name: value.dim() for name, value in spec.inputs.items()
    }
    assert spec.inputs["height"].item() == 32 and spec.inputs["width"].item() == 48


def test_build_takes_every_field_of_the_config() -> None:
    values = {
        "depth": 2,
        "hidden_size": 96,
        "num_heads": 2,
        "patch_size": (2, 1, 1),
        "in_channels": 3,
        "out_channels": 5,
        "mlp_ratio": 2.0,
        "caption_channels": 7,
        "model_max_length": 6,
        "input_sq_size": 256,
        "qk_norm": False,
    }
    assert set(values) == {field.name for field in dataclasses.fields(stdit3.STDiT3Config)}
    spec = stdit3.build(**values, latent_frames=2, latent_height=2, latent_width=2, batch=3)
    assert spec.module.config == stdit3.STDiT3Config(**values)
    assert run(spec).shape == (3, 5, 2, 2, 2)


def test_build_works_without_memory_for_parameters() -> None:
    with torch.device("meta"):
        on_meta = stdit3.build(**TINY)
    assert all(p.is_meta for p in on_meta.module.parameters())
    assert not any(value.is_meta for value in on_meta.inputs.values())

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = stdit3.build(**TINY)
        program = torch.export.export(fake.module, (), fake.inputs, strict=False)
    assert all(isinstance(p, FakeTensor) for p in fake.module.parameters())
    assert "scaled_dot_product_attention" in str(program.graph)


@pytest.mark.parametrize("masked_text", [True, False])
@pytest.mark.parametrize("size", [(1, 4, 4), (5, 7, 9), (6, 4, 6)])
def test_export_computes_the_same(size: tuple[int, int, int], masked_text: bool) -> None:
    sizes = dict(zip(("latent_frames", "latent_height", "latent_width"), size, strict=True))
    spec = stdit3.build(**{**TINY, **sizes, "depth": 2}, masked_text=masked_text)

    program = torch.export.export(spec.module, (), spec.inputs, strict=False)
    program = program.run_decompositions({})

    signature = program.graph_signature
    assert list(signature.user_inputs) == list(spec.inputs)
    assert not signature.buffers_to_mutate and not signature.user_inputs_to_mutate
    values = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert max(value.dim() for value in values) <= 5
    with torch.no_grad():
        exported = program.module()(**spec.inputs)
    assert set(exported) == {"v"}
    torch.testing.assert_close(exported["v"], run(spec), rtol=0, atol=1e-6)


@pytest.mark.parametrize("latent_height", [4, 7])
def test_converts_to_core_ml(latent_height: int) -> None:
    import coremltools as ct

    spec = stdit3.build(**{**TINY, "latent_height": latent_height})
    program = torch.export.export(spec.module, (), spec.inputs, strict=False)
    converted = ct.convert(
        program.run_decompositions({}),
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )

    description = converted.get_spec().description
    assert [value.name for value in description.input] == list(spec.inputs)
    assert list(description.output[0].type.multiArrayType.shape) == [2, 8, 3, latent_height, 6]
    assert not description.state
