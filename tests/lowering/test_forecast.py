"""What is forecast of a component, against what lowering then makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from odsora_passes.cidl import CIDL
from odsora_passes.tdtm import TDTM

import odsora_compiler as odsora
from odsora_compiler.analysis.cutting import cut, cut_points, uncut
from odsora_compiler.analysis.partition import CutPoints, Span, least_budget, partition
from odsora_compiler.ir.manifest import ComponentEntry, Manifest
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.lowering.chunks import LoweringSettings
from odsora_compiler.lowering.forecast import forecast
from odsora_compiler.lowering.joining import FinestCut
from odsora_compiler.pipeline.base import Context
from odsora_compiler.pipeline.options import ByteSize

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "caption_channels": 24,
    "model_max_length": 10,
    "latent_frames": 4,
    "latent_height": 4,
    "latent_width": 6,
}
SETTINGS = LoweringSettings("fp16")


@pytest.fixture(scope="module")
def stdit3() -> Program:
    program = odsora.capture(EXAMPLES / "open_sora/stdit3.py", options=TINY)
    TDTM().run(program, Context("tdtm"))
    CIDL(ByteSize(70_000)).run(program, Context("cidl"))
    return program


@pytest.fixture(scope="module")
def shapes() -> Program:
    program = odsora.capture(EXAMPLES / "shapes/pipeline.py", options={"steps": 2})
    CIDL(ByteSize(500_000)).run(program, Context("cidl"))
    return program


@pytest.fixture(params=["stdit3", "shapes"])
def program(request: pytest.FixtureRequest) -> Program:
    found: Program = request.getfixturevalue(request.param)
    return found.copy()


def test_the_forecast_is_what_lowering_makes(program: Program, tmp_path: Path) -> None:
    bundle = odsora.lower(program, tmp_path / "made.odsora", verify="structure")
    manifest = Manifest.load(bundle)
    for name, component in program.components.items():
        told, made = forecast(component, SETTINGS).entry, manifest.components[name]
        assert told.functions == made.functions
        assert told.compute_units == made.compute_units
        assert list(told.packages) == list(made.packages)
        for key, package in made.packages.items():
            weights = told.packages[key].weight_bytes
            assert package.weight_bytes <= weights <= 1.03 * package.weight_bytes + 1500
            read = sum(size for size, _ in package.files.values())
            told_read = sum(size for size, _ in told.packages[key].files.values())
            assert told_read == pytest.approx(read, rel=0.05, abs=3000)


def needed(entry: ComponentEntry) -> dict[str, list[int]]:
    """Per function and chunk, weights and activations."""
    return {
        name: [entry.packages[c.package].weight_bytes + c.activation_bytes for c in each.chunks]
        for name, each in entry.functions.items()
    }


@pytest.mark.parametrize("times", [1, 2, 4])
def test_joined_chunks_are_those_of_a_coarser_cut(program: Program, times: int) -> None:
    for component in program.components.values():
        points = cut_points(component, "fp16")
        joined = FinestCut(component, points, SETTINGS).joined(budgeted(points, times))
        cut(component, points, budgeted(points, times), 0, "fp16", "")
        made = forecast(component, SETTINGS).entry
        assert joined is not None
        for name, function in made.functions.items():
            for told, call in zip(joined.functions[name].chunks, function.chunks, strict=True):
                assert {item.name for item in told.inputs} == {item.name for item in call.inputs}
                assert {item.name for item in told.outputs} == {item.name for item in call.outputs}
                assert told.flops == pytest.approx(call.flops, rel=0.01)
            estimates, exact = needed(joined)[name], needed(made)[name]
            assert estimates == pytest.approx(exact, rel=0.15)
            assert max(estimates) == pytest.approx(max(exact), rel=0.06)


def budgeted(points: CutPoints, times: int) -> list[Span]:
    spans = partition(points, times * least_budget(points).weight_bytes)
    assert spans is not None
    return spans


def test_no_other_cut_needs_less_than_the_narrowest(program: Program) -> None:
    for component in program.components.values():
        points = cut_points(component, "fp16")
        finest = FinestCut(component, points, SETTINGS)
        narrowest = peak(component, points, finest.narrowest())
        others = [budgeted(points, times) for times in (1, 2, 3, 5, 8, 50)]
        for spans in others:
            assert narrowest <= 1.02 * peak(component, points, spans)
        uncut(component)
        assert component.plan is None


def peak(component: Component, points: CutPoints, spans: list[Span]) -> int:
    cut(component, points, spans, 0, "fp16", "")
    every = needed(forecast(component, SETTINGS).entry)
    return max(max(each) for each in every.values())
