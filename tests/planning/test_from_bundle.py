"""The workload of a compiled bundle: order of uses, bytes and FLOP."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from workloads import device

import odsora_compiler as odsora
from odsora_compiler.errors import PackageError, UsageError
from odsora_compiler.planning.from_bundle import bundle_workload
from odsora_compiler.planning.planner import make_plan

WIDTH, DEPTH, STEPS, ROWS = 64, 4, 3, 50


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.proj(text).relu()


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = z + y
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def sample(c, text, z):  # type: ignore[no-untyped-def]
    y = c.encoder(text=text)
    for _ in range(STEPS):
        z = z + c.denoiser(z=z, y=y) * (1 / STEPS)
    return {"film": z}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    rows = torch.randn(ROWS, WIDTH)
    spec = odsora.PipelineSpec(
        components={
            "encoder": odsora.ModelSpec(Encoder(), {"text": rows}, compute_units="cpu_only"),
            "denoiser": odsora.ModelSpec(Denoiser(), {"z": rows, "y": rows}),
        },
        host=sample,
        inputs={"text": rows, "z": rows},
    )
    program = odsora.run_passes(odsora.capture(spec), "cidl{budget=9kB}")
    return odsora.lower(program, tmp_path_factory.mktemp("bundle") / "film.odsora")


def test_uses_are_those_of_the_host_in_order(bundle: Path) -> None:
    workload = bundle_workload(bundle, device())
    names = [workload.chunks[use.chunk].name for use in workload.uses]
    steps = [f"denoiser-0{i}" for i in range(DEPTH)]
    assert names == ["encoder-00", *steps * STEPS]
    assert [use.call for use in workload.uses] == [0] + [k for k in (1, 2, 3) for _ in steps]
    assert {chunk.name: chunk.compute_units for chunk in workload.chunks} == {
        "encoder-00": "cpu_only",
        **dict.fromkeys(steps, "cpu_and_gpu"),
    }
    assert [len(segment) for segment in workload.segments] == [1, DEPTH * STEPS]


def test_bytes_and_flops(bundle: Path) -> None:
    workload = bundle_workload(bundle, device())
    packages = odsora.load(bundle).bundle.component("denoiser").packages
    for chunk in workload.chunks[1:]:
        files = packages[chunk.name].files.values()
        assert chunk.resident_bytes == packages[chunk.name].weight_bytes >= 2 * WIDTH * WIDTH
        assert chunk.read_bytes == sum(size for size, _ in files) > chunk.resident_bytes
    rows = ROWS * WIDTH
    for use in workload.uses[1:]:
        product = 2 * rows * WIDTH
        assert product <= use.flops <= product + 4 * rows
        # The host holds z and y in fp32, the chunk takes and makes at least one value in fp16.
        assert use.boundary_bytes >= 2 * 4 * rows
        assert use.boundary_bytes + 2 * rows <= use.activation_bytes <= 60 * rows


def test_a_device_may_hold_more_than_the_packages_have(bundle: Path) -> None:
    plain, wide = (
        bundle_workload(bundle, profile)
        for profile in (
            device(),
            replace(device(), weight_expansion={"fp16": 2.0}, activation_expansion=1.5),
        )
    )
    for before, after in zip(plain.chunks, wide.chunks, strict=True):
        assert after.resident_bytes == 2 * before.resident_bytes
        assert after.read_bytes == before.read_bytes
    for use, larger in zip(plain.uses, wide.uses, strict=True):
        assert larger.activation_bytes == pytest.approx(1.5 * use.activation_bytes, abs=1)
    plan = make_plan(wide, device(), wide.least_budget)
    assert plan.peak_bytes <= wide.least_budget


def test_a_run_holds_no_more_than_the_workload_says(bundle: Path) -> None:
    """Values of the interpreter, counted while it runs, against the activations of every use."""
    runner = odsora.load(bundle)
    wide = replace(device(), activation_expansion=2.0)
    most = max(use.activation_bytes for use in bundle_workload(bundle, wide).uses)
    rows = torch.zeros(ROWS, WIDTH)
    with torch.profiler.profile(profile_memory=True) as profiler:
        runner.run({"text": rows, "z": rows})
        runner.release()
    runner.run({"text": rows, "z": rows})
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    weights = sum(chunk.resident_bytes for chunk in bundle_workload(bundle, device()).chunks)
    assert 0 < peak <= most + 2 * weights


def test_a_function_is_planned_for_the_components_that_have_it(
    bundle: Path, tmp_path: Path
) -> None:
    """As the runner does it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    functions = manifest["components"]["denoiser"]["functions"]
    functions["merged"] = functions["base"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(bundle / "host.safetensors", tmp_path)
    workload = bundle_workload(tmp_path, device(), "merged")
    found = {(workload.chunks[use.chunk].component, use.function) for use in workload.uses}
    assert found == {("encoder", "base"), ("denoiser", "merged")}


def test_what_cannot_be_planned_is_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a bundle"):
        bundle_workload(tmp_path, device())
    with pytest.raises(UsageError, match="Did you mean 'base'"):
        bundle_workload(bundle, device(), "bsae")
