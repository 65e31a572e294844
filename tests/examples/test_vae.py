"""The reference video decoder: parity with the public implementation, its names, its grouping."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_files import ROOT, load_example
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import odsora_compiler as odsora

vae = load_example("vae")
TINY = {
    "filters": 8,
    "num_groups": 4,
    "block_out_channels": (8, 16),
    "latent_height": 4,
    "latent_width": 6,
}


def need_diffusers() -> None:
    pytest.importorskip("diffusers", reason="the spatial part is diffusers' AutoencoderKL")


def run(spec: Any, **changed: Any) -> Tensor:
    with torch.no_grad():
        (output,) = spec.module(**{**spec.inputs, **changed}).values()
    return output


@pytest.fixture(scope="module")
def golden() -> tuple[Any, dict[str, Tensor], int]:
    """The temporal part of the golden file, the file's tensors and the number of frames."""
    with safe_open(ROOT / "tests/golden/vae_temporal_a.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    frames = config.pop("num_frames")
    model = vae.TemporalVAE(vae.TemporalVAEConfig(**config))
    state = {
        key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")
    }
    model.load_state_dict(state, strict=True)
    return model, tensors, frames


def test_decoding_matches_the_public_implementation(golden: Any) -> None:
    model, tensors, frames = golden
    with torch.no_grad():
        decoded = model.decode(tensors["in.z"], frames)
    torch.testing.assert_close(decoded, tensors["out.decoded"], rtol=0, atol=1e-5)


def test_encoding_matches_the_public_implementation(golden: Any) -> None:
    model, tensors, _ = golden
    with torch.no_grad():
        moments = model.encode(tensors["in.x"])
    torch.testing.assert_close(moments, tensors["out.encoded_moments"], rtol=0, atol=1e-5)


def test_temporal_part_has_the_released_parameters() -> None:
    with torch.device("meta"):
        model = vae.VideoVAE(vae.TemporalVAEConfig(), None)

    biased = ["quant_conv", "post_quant_conv", "decoder.conv1", "decoder.conv_out", "encoder.conv2"]
    biased += [f"{half}.conv_blocks.{i}" for half in ("encoder", "decoder") for i in (1, 2)]
    unbiased, norms = ["encoder.conv_in"], []
    for half in ("encoder", "decoder"):
        norms.append(f"{half}.norm1")
        stages = [f"{half}.block_res_blocks.{i}" for i in range(4)]
        for block in (f"{s}.{j}" for s in [*stages, f"{half}.res_blocks"] for j in range(4)):
            norms += [f"{block}.norm1", f"{block}.norm2"]
            unbiased += [f"{block}.conv1", f"{block}.conv2"]
    unbiased += [f"encoder.block_res_blocks.{i}.0.conv3" for i in (1, 3)]
    unbiased += [f"decoder.block_res_blocks.{i}.0.conv3" for i in (0, 2)]
    expected = {f"temporal_vae.{name}.conv.weight" for name in biased + unbiased}
    expected |= {f"temporal_vae.{name}.conv.bias" for name in biased}
    expected |= {f"temporal_vae.{name}.{part}" for name in norms for part in ("weight", "bias")}

    state = model.state_dict()
    assert set(state) == expected | {"scale", "shift"}
    shape = state["temporal_vae.decoder.conv_blocks.2.conv.weight"].shape
    assert shape == (1024, 512, 3, 3, 3)  # twice the channels of the stage before
    assert state["temporal_vae.encoder.conv_blocks.1.conv.weight"].shape == (256, 256, 3, 3, 3)


def test_whole_vae_has_the_released_parameters() -> None:
    need_diffusers()
    with torch.device("meta"):
        model = vae.VideoVAE(vae.TemporalVAEConfig(), vae.SpatialVAEConfig())

    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {
        "temporal_vae",
        "spatial_vae",
        "scale",
        "shift",
    }
    spatial = {n: t.shape for n, t in state.items() if n.startswith("spatial_vae.module.")}
    assert sum(shape.numel() for shape in spatial.values()) == 83_653_863  # the SDXL decoder's
    assert spatial["spatial_vae.module.post_quant_conv.weight"] == (4, 4, 1, 1)
    assert spatial["spatial_vae.module.decoder.mid_block.attentions.0.to_q.weight"] == (512, 512)
    assert spatial["spatial_vae.module.decoder.up_blocks.3.resnets.2.conv2.weight"][0] == 128


def test_latents_are_unnormalised_for_each_channel() -> None:
    spec = vae.build(**TINY, part="temporal", frames=5)
    z = spec.inputs["z"]
    scale = torch.tensor([3.85, 2.32, 2.33, 3.06])[:, None, None, None]
    shift = torch.tensor([-0.10, 0.34, 0.27, 0.98])[:, None, None, None]
    with torch.no_grad():
        expected = spec.module.temporal_vae.decode(z * scale + shift, 5)
    torch.testing.assert_close(run(spec), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "groups"),
    [(34, [(5, 17), (5, 17)]), (22, [(5, 17), (2, 5)]), (18, [(5, 17), (1, 1)]), (4, [(1, 4)])],
)
def test_groups_of_latent_frames_are_decoded_on_their_own(
    frames: int, groups: list[tuple[int, int]]
) -> None:
    spec = vae.build(**TINY, part="temporal", frames=frames, batch=2)
    parts = spec.inputs["z"].split([latent for latent, _ in groups], dim=2)

    each = [run(spec, z=z, frames=count) for z, (_, count) in zip(parts, groups, strict=True)]

    decoded = run(spec)
    assert decoded.shape == (2, 4, frames, 4, 6)
    torch.testing.assert_close(decoded, torch.cat(each, dim=2), rtol=0, atol=1e-5)


def test_short_groups_lose_their_first_frames() -> None:
    spec = vae.build(**TINY, part="temporal", frames=8)
    torch.testing.assert_close(run(spec, frames=6), run(spec)[:, :, 2:], rtol=0, atol=0)


@pytest.mark.parametrize("frames", [4, 9])
def test_latents_of_another_number_of_frames_are_refused(frames: int) -> None:
    spec = vae.build(**TINY, part="temporal", frames=8)
    with pytest.raises(ValueError, match=f"{frames} frames have . latent frames, not 2"):
        run(spec, frames=frames)


def test_convolutions_see_no_later_frame() -> None:
    x = torch.randn(1, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, :, 4:] += 1
    for stride in (1, 2):
        conv = vae.CausalConv3d(2, 2, 3, time_stride=stride)
        with torch.no_grad():
            changed = (conv(later) != conv(x)).any(dim=(0, 1)).any(dim=(1, 2))
        assert changed.tolist() == [False] * (4 // stride) + [True] * (2 // stride)


def test_spatial_part_decodes_frame_by_frame() -> None:
    need_diffusers()
    spec = vae.build(**TINY, part="spatial", frames=3, batch=2)
    z = spec.inputs["z"]

    video = run(spec)

    assert video.shape == (2, 3, 3, 8, 12)
    for b in range(2):
        for t in range(3):
            with torch.no_grad():
                picture = spec.module.spatial_vae.module.decode(z[b : b + 1, :, t] / 0.18215).sample
            torch.testing.assert_close(video[b, :, t], picture[0], rtol=0, atol=1e-5)


def test_parts_make_up_the_whole() -> None:
    need_diffusers()
    whole, temporal, spatial = (
        vae.build(**TINY, frames=18, part=part) for part in ("video", "temporal", "spatial")
    )
    state = whole.module.state_dict()
    names = [set(part.module.state_dict()) for part in (temporal, spatial)]
    assert names[0].isdisjoint(names[1]) and names[0] | names[1] == set(state)
    for part in (temporal, spatial):
        part.module.load_state_dict({name: state[name] for name in part.module.state_dict()})

    latents = run(temporal, z=whole.inputs["z"])

    torch.testing.assert_close(run(spatial, z=latents), run(whole), rtol=0, atol=1e-5)


def test_only_the_spatial_part_needs_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install diffusers, or build with part=temporal"):
        vae.build(**TINY)
    assert run(vae.build(**TINY, part="temporal", frames=1)).shape == (1, 4, 1, 4, 6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"filters": 10, "num_groups": 4}, "filters=10 must be a multiple of num_groups=4"),
        ({"channel_multipliers": (1, 2)}, "temporal_downsample has 3 values.* the 2 of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.TemporalVAEConfig(**sizes)


def test_build_takes_every_field_of_the_temporal_config() -> None:
    values = {
        "filters": 6,
        "num_res_blocks": 2,
        "channel_multipliers": (1, 3),
        "temporal_downsample": (True,),
        "num_groups": 3,
    }
    assert set(values) == {field.name for field in dataclasses.fields(vae.TemporalVAEConfig)}
    spec = vae.build(**values, part="temporal", group_frames=4, frames=7, batch=2)
    assert spec.module.temporal_vae.config == vae.TemporalVAEConfig(**values)
    assert spec.inputs["z"].shape == (2, 4, 4, 8, 8)  # two latent frames for 4 frames, two for 3
    assert run(spec).shape == (2, 4, 7, 8, 8)


def test_build_gives_the_same_model_for_the_same_seed_only() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        vae.build(**TINY, part="temporal", frames=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(run(first), run(again))
    assert not torch.equal(first.inputs["z"], other.inputs["z"])
    assert not torch.allclose(run(first), run(other, **first.inputs))


@pytest.mark.parametrize(
    ("part", "precision", "limit"),
    [("temporal", "fp32", 1e-4), ("video", "fp32", 1e-4), ("video", "fp16", 2e-2)],
)
def test_compiled_decoder_computes_the_same(
    tmp_path: Path, part: str, precision: str, limit: float
) -> None:
    """Weights come from a file, three groups of frames are decoded, and the model is cut."""
    if part == "video":
        need_diffusers()
    options = {**TINY, "frames": 39, "part": part}
    spec = vae.build(**options)
    save_file(spec.module.state_dict(), tmp_path / "weights.safetensors")

    program = odsora.capture(
        ROOT / "examples/open_sora/vae.py", options, tmp_path / "weights.safetensors"
    )
    program = odsora.run_passes(program, "cidl{budget=400kB}", precision=precision)
    bundle = odsora.load(odsora.lower(program, tmp_path / "vae.odsora", precision=precision))

    z = torch.randn(spec.inputs["z"].shape, generator=torch.Generator().manual_seed(5))
    (output,) = bundle.run({"z": z}).values()
    expected = run(spec, z=z)
    assert [value.name for value in bundle.inputs] == ["z"]
    assert (output - expected).abs().max() <= limit * expected.abs().max()
    chunks = {entry.name for entry in (tmp_path / "vae.odsora").rglob("*.mlpackage")}
    assert len(chunks) > 1
