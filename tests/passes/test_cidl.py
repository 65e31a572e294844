"""The pass `cidl`: chunks under a budget, the same weights in all functions, equal results."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from odsora_passes.cidl import CIDL
from odsora_passes.tdtm import TDTM
from torch import Tensor, fx, nn

import odsora_compiler as odsora
from odsora_compiler.analysis.cost import weight_bytes
from odsora_compiler.errors import PassError
from odsora_compiler.ir.chunks import ChunkedFunction, split
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import tensor_bytes
from odsora_compiler.ir.program import Component, Plan, Program
from odsora_compiler.ir.reference import evaluate_component, evaluate_program
from odsora_compiler.ir.serialize import fingerprint, function_to_data, load_program, save_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import EncodedWeights, LookupTable
from odsora_compiler.pipeline.base import Context
from odsora_compiler.pipeline.options import ByteSize

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 48,
    "num_heads": 4,
    "caption_channels": 24,
    "model_max_length": 10,
    "latent_frames": 3,
    "latent_height": 4,
    "latent_width": 6,
}


@pytest.fixture(scope="module")
def captured() -> Program:
    return odsora.capture(ROOT / "examples/open_sora/stdit3.py", options={"depth": 6, **TINY})


@pytest.fixture(scope="module")
def captured_with_tdtm(captured: Program) -> Program:
    program = captured.copy()
    TDTM().run(program, Context("tdtm"))
    assert set(program.components["stdit3"].functions) == {"base", "tdtm"}
    return program


@pytest.fixture(params=["base", "base and tdtm"])
def program(request: pytest.FixtureRequest) -> Program:
    name = "captured" if request.param == "base" else "captured_with_tdtm"
    fixture: Program = request.getfixturevalue(name)
    return fixture.copy()


def cut(program: Program, budget: int | None, precision: str = "fp16") -> tuple[Component, Plan]:
    CIDL(None if budget is None else ByteSize(budget)).run(program, Context("cidl", precision))
    verify_program(program)
    (component,) = program.components.values()
    assert component.plan is not None
    return component, component.plan


def stored(component: Component, names: set[str], precision: str = "fp16") -> int:
    return sum(weight_bytes(component.weights, name, precision) for name in names)


def weights(chunked: ChunkedFunction) -> list[set[str]]:
    return [set(chunk.weight_names()) for chunk in chunked.chunks]


def block_bytes(component: Component) -> int:
    names = component.functions["base"].weight_names()
    return stored(component, {name for name in names if name.startswith("spatial_blocks.0.")})


def structure(function: Function) -> str:
    """Operators, arguments and shapes, in order; nodes by number, weights and values unnamed."""
    number = {node: index for index, node in enumerate(function.graph.nodes)}
    return "\n".join(
        repr(
            (
                node.op,
                str(node.target) if node.op == "call_function" else "",
                fx.node.map_arg((node.args, node.kwargs), lambda used: number[used]),
                tensor_bytes(node.meta.get("val")),
            )
        )
        for node in function.graph.nodes
    )


# ------------------------------------------------------------------ STDiT3


@pytest.mark.parametrize("blocks", [1, 2, 3.5, 6])
def test_chunks_keep_the_budget_and_the_result(program: Program, blocks: float) -> None:
    whole = program.components["stdit3"]
    budget = int(blocks * block_bytes(whole)) + 25_000
    expected = {
        name: evaluate(function, whole.weights, program.examples)
        for name, function in whole.functions.items()
    }
    component, plan = cut(program, budget)

    cuts = {name: split(function, component) for name, function in component.functions.items()}
    assert plan.budget == budget
    for name, chunked in cuts.items():
        assert weights(chunked) == weights(cuts["base"])
        results = evaluate_component(component, name, program.examples)
        assert all(torch.equal(results[key], expected[name][key]) for key in expected[name])
    sizes = [stored(component, names) for names in weights(cuts["base"])]
    assert sizes == [chunk.weight_bytes for chunk in plan.chunks]
    assert max(sizes) <= budget
    assert set().union(*weights(cuts["base"])) == set(component.functions["base"].weight_names())


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_chunks_between_first_and_last_are_alike(program: Program, blocks: int) -> None:
    component = program.components["stdit3"]
    component, plan = cut(program, blocks * block_bytes(component) + 5000)

    assert len(plan.chunks) >= 4
    for function in component.functions.values():
        inner = split(function, component).chunks[1:-1]
        assert len({structure(chunk) for chunk in inner}) == 1
        kinds = {name.split(".")[0] for name in inner[0].weight_names()}
        assert kinds == {"spatial_blocks", "temporal_blocks", "rope"}


def test_crossing_bytes_are_what_the_chunks_pass_on(program: Program) -> None:
    component, plan = cut(program, 150_000)
    assert set(plan.chunks[0].crossing_bytes) == set(component.functions)
    for name, function in component.functions.items():
        chunks = split(function, component).chunks
        inputs = {spec.name for spec in function.inputs}
        for index, chunk in enumerate(plan.chunks):
            made = {spec.name: spec for each in chunks[: index + 1] for spec in each.outputs}
            read = {spec.name for each in chunks[index + 1 :] for spec in each.inputs} & made.keys()
            assert read.isdisjoint(inputs)
            assert all(made[key].dtype == torch.float32 for key in read)
            passed_on = sum(2 * torch.Size(made[key].shape).numel() for key in read)
            assert chunk.crossing_bytes[name] == passed_on
    assert plan.chunks[-1].crossing_bytes == dict.fromkeys(component.functions, 0)


def test_every_cut_has_a_reason(captured: Program) -> None:
    component = captured.copy().components["stdit3"]
    budget = 2 * block_bytes(component) + 5000
    _, plan = cut(captured.copy(), budget)

    assert plan.chunks[-1].reason == "the end"
    reasons = [chunk.reason for chunk in plan.chunks[1:-1]]
    for reason in reasons:
        place, handed, passing, later = reason.replace(": hands on", ";hands on").split(";")
        assert place.startswith(("after spatial_blocks.", "after temporal_blocks."))
        assert handed.startswith("hands on add_")
        assert handed.endswith("(3.5 kB)")
        assert passing == " 3 earlier values passing by (3.3 kB)"
        assert "the next cut as narrow, after " in later
        assert later.endswith("over the budget of 156.2 kB")
    assert "fewest bytes" in plan.cost


def test_masks_and_position_tables_are_made_in_every_chunk_that_reads_them(
    captured: Program,
) -> None:
    component, _ = cut(captured.copy(), 100_000)
    chunks = split(component.functions["base"], component).chunks

    readers = [chunk for chunk in chunks if "rope.freqs" in chunk.weight_names()]
    assert len(readers) >= 6
    for chunk in readers:
        assert {"cos", "sin"} <= {
            node.target._opname for node in chunk.operators() if node.target is not operator.getitem
        }
    masked = [chunk for chunk in chunks if "mask" in {spec.name for spec in chunk.inputs}]
    assert len(masked) >= 6
    assert all(spec.dtype != torch.bool for chunk in chunks for spec in chunk.outputs)


def test_the_default_is_an_eighth_of_the_weights() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(20)))
    spec = odsora.ModelSpec(module, {"input": torch.ones(1, 512)})
    _, plan = cut(odsora.capture(spec), None)

    assert plan.budget == 20 * 2 * 512**2 // 8
    assert len(plan.chunks) == 10  # of two layers each, 2.5 would fit


def test_the_default_makes_no_chunks_below_a_megabyte(captured: Program) -> None:
    _, plan = cut(captured.copy(), None)

    assert plan.budget == 10**6
    assert len(plan.chunks) == 2


def test_one_chunk_when_all_fits(captured: Program) -> None:
    _, plan = cut(captured.copy(), 10**9)

    (chunk,) = plan.chunks
    assert chunk.reason == "all weights fit in one chunk"
    assert chunk.crossing_bytes == {"base": 0}


def test_the_smallest_budget_is_named_and_works(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        cut(program, 1000)
    assert "cannot be cut into chunks of at most 1.0 kB" in str(caught.value)
    assert "(t_block.1 (" in str(caught.value)
    component = program.components["stdit3"]
    assert component.plan is None

    least = stored(component, {"t_block.1.weight", "t_block.1.bias"})
    assert f"cidl{{budget={least}}}" in caught.value.hint
    _, plan = cut(program, least)
    assert max(chunk.weight_bytes for chunk in plan.chunks) == least
    with pytest.raises(PassError):
        cut(program, least - 1)


def test_fp32_weights_count_twice(captured: Program) -> None:
    _, half = cut(captured.copy(), 200_000, "fp16")
    _, full = cut(captured.copy(), 400_000, "fp32")

    def doubled(plan: Plan) -> list[int]:
        return [2 * chunk.weight_bytes for chunk in plan.chunks]

    assert doubled(half) == [chunk.weight_bytes for chunk in full.chunks]


def test_compressed_weights_count_compressed(captured: Program) -> None:
    program = captured.copy()
    component = program.components["stdit3"]
    dense = component.weights
    tables = {
        name: LookupTable(
            4,
            torch.zeros(dense.spec(name).shape, dtype=torch.uint8),
            torch.zeros(1, 16),
        )
        for name in component.functions["base"].weight_names()
        if len(dense.spec(name).shape) == 2
    }
    _, before = cut(captured.copy(), 100_000)
    component.weights = EncodedWeights(dense, tables)
    component, after = cut(program, 100_000)

    assert len(after.chunks) < len(before.chunks) / 2
    for chunk, names in zip(
        after.chunks, weights(split(component.functions["base"], component)), strict=True
    ):
        assert chunk.weight_bytes == stored(component, names) <= 100_000


def test_cutting_again_replaces_the_plan(program: Program) -> None:
    fresh = program.copy()
    cut(program, 100_000)
    component, plan = cut(program, 300_000)
    expected, expected_plan = cut(fresh, 300_000)

    assert plan == expected_plan
    for name, function in component.functions.items():
        assert function_to_data(function) == function_to_data(expected.functions[name])


def test_saving_keeps_the_plan(program: Program, tmp_path: Path) -> None:
    component, plan = cut(program, 200_000)
    loaded = load_program(save_program(program, tmp_path / "saved"))

    verify_program(loaded)
    assert loaded.components["stdit3"].plan == plan
    before = evaluate_component(component, "base", program.examples)
    after = evaluate_component(loaded.components["stdit3"], "base", program.examples)
    assert torch.equal(before["v"], after["v"])


def test_runs_in_a_pipeline(captured: Program) -> None:
    program = odsora.run_passes(captured.copy(), "tdtm,cidl{budget=150kB}")

    plan = program.components["stdit3"].plan
    assert plan is not None
    assert plan.budget == 150_000
    assert "plan" in program.facts
    assert program.history == ["tdtm", "cidl{budget=150kB}"]
    assert evaluate_program(program, program.examples)["v"].isfinite().all()


def test_the_plan_does_not_depend_on_the_process(captured: Program, tmp_path: Path) -> None:
    program = captured.copy()
    saved = save_program(program, tmp_path / "saved")
    cut(program, 110_000)
    script = (
        "import sys\n"
        "from odsora_compiler.ir.serialize import fingerprint, load_program\n"
        "from odsora_compiler.pipeline.base import Context\n"
        "from odsora_compiler.pipeline.options import ByteSize\n"
        "from odsora_passes.cidl import CIDL\n"
        "program = load_program(sys.argv[1])\n"
        "CIDL(ByteSize(110_000)).run(program, Context('cidl'))\n"
        "print(fingerprint(program))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(saved)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == fingerprint(program)


# ------------------------------------------------------------------ other models


class UNet(nn.Module):
    """Convolutions down and up with skip connections, and a weight used at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.middle = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        skips = []
        for layer in self.down:
            x = torch.relu(layer(x))
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        for layer in self.middle:
            x = torch.relu(layer(x))
        for layer in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.relu(layer(torch.cat([x, skips.pop()], dim=1)))
        return self.mix(x)


@pytest.mark.parametrize("budget", [620, 1000, 2000])
def test_skips_and_shared_weights(budget: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 16, 16)
    module = UNet().eval()
    program = odsora.capture(odsora.ModelSpec(module, {"x": x}))
    component, plan = cut(program, budget)

    assert len(plan.chunks) > 1
    assert max(chunk.weight_bytes for chunk in plan.chunks) <= budget
    (value,) = evaluate_program(program, {"x": x}).values()
    with torch.no_grad():
        assert torch.equal(value, module(x))
    found = weights(split(component.functions["base"], component))
    assert "mix.weight" in found[0] & found[-1]
    for first, second in itertools.combinations(found, 2):
        assert first & second <= {"mix.weight", "mix.bias"}


class Unprojected(nn.Module):
    """Nothing to cut: no weights at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


def test_a_component_without_weights_is_one_chunk() -> None:
    program = odsora.capture(odsora.ModelSpec(Unprojected(), {"x": torch.randn(2, 3)}))
    component, plan = cut(program, None)

    assert [chunk.weight_bytes for chunk in plan.chunks] == [0]
    assert len(split(component.functions["base"], component).chunks) == 1


class SharedBias(nn.Module):
    """Attention-like blocks that all add one table made from a small weight, as in T5."""

    def __init__(self, depth: int, width: int, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, 4))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.length)
        distance = (places[None, :] - places[:, None]).abs().clamp(max=31)
        bias = self.table[distance].permute(2, 0, 1)  # [4, length, length]
        for layer in self.layers:
            scores = (x @ x.transpose(-1, -2) + bias).softmax(-1)
            x = x + layer(scores @ x)
        return x


def test_a_large_constant_is_made_once_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    width, length = 64, 96
    spec = odsora.ModelSpec(SharedBias(4, width, length), {"x": torch.randn(4, length, width)})
    constant = 2 * 4 * length * length
    budget = constant + 2 * width * width + 4096
    program = odsora.run_passes(odsora.capture(spec), f"cidl{{budget={budget}}}")
    plan = program.components["model"].plan
    assert plan is not None and len(plan.chunks) > 1
    assert constant <= plan.chunks[0].weight_bytes <= budget
    bundle = odsora.lower(program, tmp_path / "bias.odsora")
    packages = odsora.load(bundle).bundle.component("model").packages.values()
    written = [entry.weight_bytes for entry in packages]
    assert max(written) <= budget
    assert sum(written) < 1.5 * constant + 2 * 4 * width * width
