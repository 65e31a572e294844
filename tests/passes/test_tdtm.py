"""Token merging: parity with the published implementation and with merging written out by hand."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import video_models as models
from odsora_passes.tdtm import TDTM, Positions
from safetensors import safe_open
from torch import Tensor, nn

from odsora_compiler.analysis.attention import Site
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import fingerprint, load_program, save_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.pipeline.base import Context

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/open_sora"))
import stdit3

ROOT = Path(__file__).parents[2]


def run(program: Program, **options: Any) -> Context:
    """Run the pass, as published and on joint attention, and check the structure of its result."""
    context = Context("tdtm")
    TDTM(**{"positions": Positions.COMPACT, "sites": tuple(Site), **options}).run(program, context)
    verify_program(program)
    return context


def output(program: Program) -> Tensor:
    (value,) = evaluate_program(program, program.examples).values()
    return value


def largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def merged_function(program: Program) -> Function:
    (component,) = program.components.values()
    return component.function("tdtm")


# ------------------------------------------------------------------ STDiT3


def golden(name: str, text: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    with safe_open(ROOT / f"tests/golden/{name}.safetensors", "pt") as file:
        config = stdit3.STDiT3Config(**json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    module = stdit3.STDiT3(config).eval()
    module.load_state_dict(
        {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    )
    inputs = {key.removeprefix("in."): t for key, t in tensors.items() if key.startswith("in.")}
    axes = {"z": "b c t h w", "timestep": "b", "y": "b _ l d", "mask": "b l"}
    if text == "full_length_text":
        del inputs["mask"], axes["mask"]
    return ModelSpec(module, inputs, axes), tensors


@pytest.mark.parametrize("name", ["stdit3_a", "stdit3_b"])
@pytest.mark.parametrize("text", ["masked_text", "full_length_text"])
def test_matches_the_published_merging(name: str, text: str) -> None:
    spec, tensors = golden(name, text)
    program = capture(spec)
    context = run(program)

    assert not context.declined
    depth = spec.module.config.depth
    assert context.notes == [
        f"model: merged frames around attention: {depth} spatial, {2 * depth} cross, "
        f"{depth} temporal"
    ]
    torch.testing.assert_close(output(program), tensors[f"out.tdtm_{text}"], rtol=0, atol=1e-5)
    assert largest(tensors[f"out.tdtm_{text}"], tensors[f"out.{text}"]) > 0.1


@functools.cache
def tiny(frames: int) -> Program:
    """A small STDiT3 on pairs of equal frames whose positions its rotary table does not tell."""
    spec = stdit3.build(
        depth=1,
        hidden_size=48,
        num_heads=4,
        caption_channels=24,
        model_max_length=10,
        latent_frames=frames,
        latent_height=4,
        latent_width=6,
    )
    with torch.no_grad():
        spec.module.rope.freqs.zero_()
    spec.inputs["z"] = spec.inputs["z"][:, :, ::2].repeat_interleave(2, dim=2)[:, :, :frames]
    return capture(spec)


@pytest.mark.parametrize("frames", [2, 6, 10, 14])
@pytest.mark.parametrize("positions", list(Positions))
def test_equal_frames_that_positions_do_not_tell_apart_stay_as_they_were(
    frames: int, positions: Positions
) -> None:
    program = tiny(frames).copy()
    before = output(program)
    run(program, positions=positions)

    assert largest(output(program), before) < 1e-5
    (call,) = program.calls()
    assert call.args[1] == "tdtm"


def test_only_chosen_sites_are_merged() -> None:
    program = tiny(6).copy()
    context = run(program, sites=(Site.CROSS,))
    assert context.notes == ["model: merged frames around attention: 2 cross"]
    assert not context.declined


def test_by_default_temporal_attention_is_left_alone() -> None:
    _, _, program = video("Spatial", "Temporal", "Joint", "Cross")
    context = Context("tdtm")
    TDTM().run(program, context)
    assert not context.declined
    assert context.notes == ["model: merged frames around attention: 1 spatial, 1 joint, 1 cross"]


def test_kinds_that_do_not_occur_leave_the_program_alone() -> None:
    _, _, program = video("Spatial")
    (declined,) = run(program, sites=(Site.TEMPORAL, Site.CROSS)).declined
    assert declined.reason == "none of its attention sites is temporal or cross"
    assert list(program.component("model").functions) == ["base"]


def test_program_can_be_saved_and_loaded_and_tells_what_the_pass_made(tmp_path: Path) -> None:
    program = tiny(6).copy()
    run(program)
    made = [
        node
        for node in merged_function(program).operators()
        if "tdtm" in node.meta["provenance"].passes
    ]
    assert {"spatial_blocks.0.attn.qkv", "temporal_blocks.0.cross_attn.proj"} <= {
        node.meta["provenance"].module for node in made
    }
    assert not any(
        "tdtm" in node.meta["provenance"].passes
        for node in program.component("model").function("base").operators()
    )
    values = [node.meta["val"] for node in made if isinstance(node.meta["val"], Tensor)]
    assert max(value.dim() for value in values) <= 5

    loaded = load_program(save_program(program, tmp_path / "saved"))
    verify_program(loaded)
    assert fingerprint(loaded) == fingerprint(program)
    torch.testing.assert_close(output(loaded), output(program), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ other video models


def video(
    *parts: str, frames: int = 4, size: tuple[int, int] = (4, 4), batch: int = 2
) -> tuple[Any, dict[str, Tensor], Program]:
    seed = 0
    random = torch.Generator().manual_seed(seed)
    shape = (batch, frames, *size, models.WIDTH)
    inputs = {
        "x": torch.randn(shape, generator=random),
        "text": torch.randn(batch, 5, models.WIDTH, generator=random),
    }
    module = models.Video(*(getattr(models, part) for part in parts)).eval()
    axes = {"x": "b t h w c", "text": "b l c"}
    return module, inputs, capture(ModelSpec(module, inputs, axes))


def by_hand(module: Any, inputs: dict[str, Tensor], centers: bool = False) -> Tensor:
    module.centers = centers
    with torch.no_grad():
        return module(**inputs, merged=True)


LAYOUTS = {
    "Spatial": Site.SPATIAL,
    "SpatialRankFive": Site.SPATIAL,
    "Temporal": Site.TEMPORAL,
    "CausalTemporal": Site.TEMPORAL,
    "Joint": Site.JOINT,
    "Cross": Site.CROSS,
    "CrossPerFrame": Site.CROSS,
    "CrossPerSample": Site.CROSS,
}


@pytest.mark.parametrize("part", LAYOUTS)
@pytest.mark.parametrize(("frames", "size"), [(4, (4, 4)), (5, (2, 3))], ids=str)
def test_every_layout_equals_merging_by_hand(part: str, frames: int, size: tuple[int, int]) -> None:
    module, inputs, program = video(part, frames=frames, size=size)
    plain = output(program)
    context = run(program)

    assert not context.declined
    assert context.notes == [f"model: merged frames around attention: 1 {LAYOUTS[part].value}"]
    torch.testing.assert_close(output(program), by_hand(module, inputs), rtol=0, atol=1e-5)
    assert largest(output(program), plain) > 1e-2


@pytest.mark.parametrize("part", ["Temporal", "CausalTemporal", "Joint"])
def test_centers_equal_merging_by_hand(part: str) -> None:
    module, inputs, program = video("Spatial", part, frames=7, size=(2, 3))
    context = run(program, positions=Positions.CENTER)

    assert not context.declined
    expected = by_hand(module, inputs, centers=True)
    torch.testing.assert_close(output(program), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "size", "batch"), [(2, (3, 1), 2), (7, (1, 1), 2), (5, (3, 2), 1)], ids=str
)
def test_models_of_several_kinds_of_attention(
    frames: int, size: tuple[int, int], batch: int
) -> None:
    parts = ("Spatial", "Cross", "Temporal", "Joint", "CrossPerFrame", "SpatialRankFive")
    module, inputs, program = video(*parts, frames=frames, size=size, batch=batch)
    context = run(program)
    assert not context.declined
    torch.testing.assert_close(output(program), by_hand(module, inputs), rtol=0, atol=1e-5)


class OneBlock(nn.Module):
    """`attend(block, q, k, v, x)` between projections; x and the result are [b, t, s, c]."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = models.WIDTH
        self.attend = attend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.register_buffer("table", torch.randn(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (models.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.attend(self, q, k, v, x)


def one_block(attend: Any, axes: str = "b t s c", frames: int = 4) -> tuple[Any, Tensor, Program]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, frames, 3, models.WIDTH, generator=random)
    module = OneBlock(attend).eval()
    return module, x, capture(ModelSpec(module, {"x": x}, {"x": axes}))


def plain(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return block.proj(models.joined(F.scaled_dot_product_attention(q, k, v)))


def test_region_ends_where_a_stream_that_was_not_merged_joins() -> None:
    """A gate computed from every frame multiplies what attention gave before the projection."""

    def gated(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        y = models.joined(F.scaled_dot_product_attention(q, k, v))
        return block.proj(y * block.gate(x).sigmoid())

    module, x, program = one_block(gated, frames=5)
    assert not run(program).declined
    with torch.no_grad():
        q, k, v = (models.heads(part) for part in module.qkv(models.average(x)).chunk(3, dim=-1))
        y = models.repeat(models.joined(F.scaled_dot_product_attention(q, k, v)), 5)
        expected = module.proj(y * module.gate(x).sigmoid())
    torch.testing.assert_close(output(program), expected, rtol=0, atol=1e-5)


def test_attention_feeding_attention_and_time_in_patches() -> None:
    """No residual between two sites; before them, patches of two frames by reshape and linear."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2 * models.WIDTH, models.WIDTH)
            self.one, self.two = OneBlock(plain), OneBlock(plain)

        def patches(self, x: Tensor) -> Tensor:
            return self.embed(x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.patches(x)))

    module = Chain().eval()
    x = torch.randn(2, 10, 3, models.WIDTH, generator=torch.Generator().manual_seed(0))
    program = capture(ModelSpec(module, {"x": x}, {"x": "b t s c"}))
    assert not run(program).declined
    with torch.no_grad():
        y = models.repeat(module.one(models.average(module.patches(x))), 5)
        expected = models.repeat(module.two(models.average(y)), 5)
    torch.testing.assert_close(output(program), expected, rtol=0, atol=1e-5)


def rotated_by_table(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Temporal attention whose rotary angles are stored for more frames than there are."""
    q, k, v = (part.permute(0, 3, 2, 1, 4) for part in (q, k, v))
    angles = block.table[: q.shape[-2]]
    y = F.scaled_dot_product_attention(models.turn(q, angles), models.turn(k, angles), v)
    return block.proj(y.permute(0, 3, 1, 2, 4).flatten(3))


def test_stored_positions_compact() -> None:
    module, x, program = one_block(rotated_by_table, frames=7)
    assert not run(program).declined
    with torch.no_grad():
        expected = models.repeat(module(models.average(x)), 7)
    torch.testing.assert_close(output(program), expected, rtol=0, atol=1e-5)


def test_stored_positions_have_no_centers() -> None:
    _, _, program = one_block(rotated_by_table)
    (declined,) = run(program, positions=Positions.CENTER).declined
    assert "positions" in declined.reason
    assert "tdtm" not in program.component("model").functions


# ------------------------------------------------------------------ places left alone


def in_channels(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    q, k, v = (part.permute(0, 2, 3, 4, 1).flatten(3) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).unflatten(3, (-1, x.shape[1]))
    return block.proj(y.permute(0, 4, 2, 1, 3).flatten(3))


def over_frames(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    v = v - v.mean(dim=1, keepdim=True)
    return block.proj(models.joined(F.scaled_dot_product_attention(q, k, v)))


def unknown_operator(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(torch.cummax(q, dim=-1).values + q, k, v)
    return block.proj(models.joined(y))


def windows(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Attention within windows of two frames: time is in the batch and in the tokens."""
    q, k, v = (part.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    y = y.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2)  # b t heads s d
    return block.proj(models.joined(y))


def written_out(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.eye(3) > 0, -1e4).softmax(dim=-1)
    return block.proj(models.joined(F.dropout(weights, training=False) @ v))


def written_as_einsum(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    weights = torch.einsum("bthqd,bthkd->bthqk", q, k).float().softmax(dim=-1)
    return block.proj(models.joined(torch.einsum("bthqk,bthkd->bthqd", weights, v)))


def with_weights(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """PyTorch's own attention layer when its weights are asked for."""
    frames = x.flatten(0, 1)
    attention = F.multi_head_attention_forward(
        *(frames.transpose(0, 1),) * 3, *(models.WIDTH, models.HEADS),
        *(block.qkv.weight, block.qkv.bias), None, None, False, 0.0,
        *(block.proj.weight, block.proj.bias), training=False,
    )  # fmt: skip
    return attention[0].transpose(0, 1).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("attend", "axes", "reason"),
    [
        (written_out, "b t s c", "it is written out as matrix products and a softmax"),
        (written_as_einsum, "b t s c", "it is written out as matrix products and a softmax"),
        (with_weights, "b t s c", "it is written out as matrix products and a softmax"),
        (plain, "b _ s c", "no input names the axis 't'"),
        (plain, "b (t u) s c", "the sizes of (t u), 4 in all, are not given by other inputs"),
        (in_channels, "b t s c", "axis 't' lies in the channels of its queries"),
        (over_frames, "b t s c", "'mean' is computed from all positions of 't'"),
        (unknown_operator, "b t s c", "it is not known what cummax does"),
        (windows, "b t s c", "its queries hold several axes 't'"),
    ],
)
def test_declines_with_a_reason(attend: Any, axes: str, reason: str) -> None:
    _, _, program = one_block(attend, axes)
    before = fingerprint(program)
    (declined,) = run(program).declined

    assert reason in declined.reason
    assert fingerprint(program) == before


def test_one_frame_is_nothing_to_merge() -> None:
    _, _, program = one_block(plain, frames=1)
    (declined,) = run(program).declined
    assert "one frame" in declined.reason
    assert list(program.component("model").functions) == ["base"]


def test_a_product_without_a_softmax_is_no_attention() -> None:
    def linear_attention(block: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return block.proj(models.joined(q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)))

    _, _, program = one_block(linear_attention)
    (declined,) = run(program).declined
    assert declined.reason == "it has no attention"


def test_a_refused_site_does_not_keep_others_from_being_merged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = OneBlock(over_frames), OneBlock(plain)

        def forward(self, x: Tensor) -> Tensor:
            return self.good(x + self.bad(x))

    module = Two().eval()
    x = torch.randn(2, 4, 3, models.WIDTH, generator=torch.Generator().manual_seed(0))
    program = capture(ModelSpec(module, {"x": x}, {"x": "b t s c"}))
    (declined,) = run(program).declined

    assert declined.place.startswith("model: scaled_dot_product_attention of bad")
    with torch.no_grad():
        y = x + module.bad(x)
        expected = models.repeat(module.good(models.average(y)), 4)
    torch.testing.assert_close(output(program), expected, rtol=0, atol=1e-5)


def test_attention_without_projection_is_declined() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(2, 4, 3, 8)
    program = capture(ModelSpec(Bare(), {"x": x}, {"x": "b t s c"}))
    (declined,) = run(program).declined
    assert declined.reason == "no projection between input 'x' and the attention"


# ------------------------------------------------------------------ the host


def test_steps_merge_in_the_first_calls_only() -> None:
    _, _, program = one_block(plain)
    call_twice(program)
    run(program, steps=1)
    assert [node.args[1] for node in program.calls()] == ["tdtm", "base"]

    _, _, program = one_block(plain)
    call_twice(program)
    context = run(program, steps=15)
    assert [node.args[1] for node in program.calls()] == ["tdtm", "tdtm"]
    assert context.notes[-1] == "model: steps=15, all 2 of the host"

    _, _, program = one_block(plain)
    call_twice(program)
    run(program)
    assert [node.args[1] for node in program.calls()] == ["tdtm", "tdtm"]


def call_twice(program: Program) -> None:
    """Let the host call the component again on what it gave."""
    (call,) = program.calls()
    (item,) = call.users
    with program.host.graph.inserting_after(item):
        again = program.host.graph.call_function(call_component, call.args, {"x": item})
    with program.host.graph.inserting_after(again):
        result = program.host.graph.call_function(item.target, (again, item.args[1]))
    again.meta, result.meta = dict(call.meta), dict(item.meta)
    program.host.output_node.args = ((result,),)


@pytest.mark.parametrize("options", [{"sites": ()}, {"steps": 0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TDTM(**options)
