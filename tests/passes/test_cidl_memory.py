"""The pass `cidl` with `memory=`: chunks for a whole run, predicted as the bundle's plan says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from odsora_passes.cidl import CIDL
from odsora_passes.lpl import LPL
from odsora_passes.tdtm import TDTM
from typer.testing import CliRunner

import odsora_compiler as odsora
from odsora_compiler.cli.plan import app
from odsora_compiler.errors import PassError, UsageError
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_component
from odsora_compiler.ir.serialize import fingerprint
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.pipeline.base import Context
from odsora_compiler.pipeline.options import ByteSize
from odsora_compiler.planning.from_bundle import bundle_workload
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile, find_profile

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "depth": 3,
    "hidden_size": 96,
    "num_heads": 4,
    "caption_channels": 64,
    "model_max_length": 16,
    "latent_frames": 4,
    "latent_height": 8,
    "latent_width": 8,
}


@pytest.fixture(scope="module")
def captured() -> Program:
    program = odsora.capture(EXAMPLES / "open_sora/stdit3.py", options=SMALL)
    TDTM().run(program, Context("tdtm"))
    return program


@pytest.fixture(scope="module")
def film() -> Program:
    """A text encoder, a denoiser with two functions and early exits, decoders."""
    program = odsora.capture(EXAMPLES / "shapes/pipeline.py", options={"steps": 6})
    TDTM(steps=3).run(program, Context("tdtm"))
    LPL().run(program, Context("lpl"))
    return program


@pytest.fixture(scope="module")
def enough(captured: Program) -> int:
    """The least memory for it."""
    return least(captured)


def fit(program: Program, memory: int, profile: str = "iphone15pro") -> tuple[Program, Context]:
    """A copy that is cut, and what the pass says."""
    made, context = program.copy(), Context("cidl")
    CIDL(memory=ByteSize(memory), profile=profile).run(made, context)
    verify_program(made)
    return made, context


def chunks(program: Program) -> dict[str, int]:
    counts = {}
    for name, component in program.components.items():
        assert component.plan is not None
        counts[name] = len(component.plan.chunks)
    return counts


def predicted(text: str) -> float:
    found = re.search(r"predicted ([\d.e-]+) s, bound ([\d.e-]+) s, ratio ([\d.]+)", text)
    assert found is not None, text
    seconds, bound, ratio = map(float, found.groups())
    assert ratio == pytest.approx(seconds / bound, rel=0.01) and ratio >= 1
    return seconds


def least(program: Program) -> int:
    """What the error of too little memory says."""
    with pytest.raises(PassError, match=r"a run does not fit in 1\.0 kB") as caught:
        CIDL(memory=ByteSize(1000)).run(program.copy(), Context("cidl"))
    found = re.search(r"The least possible memory is cidl\{memory=(\d+)\}", caught.value.hint)
    assert found is not None
    return int(found[1])


def faster_storage(folder: Path, times: float) -> tuple[str, DeviceProfile]:
    """The phone with storage so many times faster, as a file."""
    phone = find_profile("iphone15pro")
    made = dataclasses.replace(phone, name="fast", read_bandwidth=phone.read_bandwidth * times)
    path = folder / "fast.json"
    path.write_text(json.dumps(made.to_data()))
    return str(path), made


# ------------------------------------------------------------------ options


def test_a_budget_and_a_memory_exclude_each_other(captured: Program) -> None:
    with pytest.raises(UsageError, match="budget= is for each chunk, memory= for the whole run"):
        odsora.run_passes(captured, "cidl{budget=1MB memory=2MB}")


def test_a_profile_needs_a_memory_and_must_exist(captured: Program) -> None:
    with pytest.raises(UsageError, match="profile= is for memory="):
        odsora.run_passes(captured, "cidl{profile=other.json}")
    with pytest.raises(UsageError, match="there is no profile 'iphone15'") as caught:
        odsora.run_passes(captured, "cidl{memory=1MB profile=iphone15}")
    assert "Did you mean 'iphone15pro'" in caught.value.hint


def test_runs_in_a_pipeline(captured: Program) -> None:
    program = odsora.run_passes(captured, "cidl{memory=900kB}")
    assert program.history[-1] == "cidl{memory=900kB}"
    assert "plan" in program.facts
    assert chunks(program)["stdit3"] > 1


# ------------------------------------------------------------------ the bundle keeps the promise


def bundle_plan(folder: Path, memory: int) -> float:
    """Seconds that odsora-plan predicts for the bundle within the memory."""
    result = CliRunner().invoke(app, [str(folder), "--memory-budget", str(memory)])
    assert result.exit_code == 0, result.output
    peak = re.search(r"memory: at most .* of .* whatever the timing", result.stdout)
    assert peak is not None
    return predicted(result.stdout)


@pytest.mark.parametrize("times", [1.0, 3.0])
def test_the_bundle_runs_within_the_memory_in_the_predicted_time(
    captured: Program, enough: int, tmp_path: Path, times: float
) -> None:
    memory = int(enough * times)
    made, context = fit(captured, memory)
    bundle = odsora.lower(made, tmp_path / "net.odsora", verify="structure")
    assert bundle_plan(bundle, memory) == pytest.approx(predicted(context.notes[0]), rel=0.01)


def test_a_pipelines_bundle_runs_within_the_memory_in_the_predicted_time(
    film: Program, tmp_path: Path
) -> None:
    memory = least(film)
    made, context = fit(film, memory)
    assert len(chunks(made)) == 5
    bundle = odsora.lower(made, tmp_path / "film.odsora", verify="structure")
    assert bundle_plan(bundle, memory) == pytest.approx(predicted(context.notes[0]), rel=0.01)


def test_a_byte_less_than_the_least_is_refused(captured: Program, enough: int) -> None:
    program = captured.copy()
    with pytest.raises(PassError, match="however finely component 'stdit3' is cut"):
        CIDL(memory=ByteSize(enough - 1)).run(program, Context("cidl"))
    assert program.components["stdit3"].plan is None
    assert fingerprint(program) == fingerprint(captured)


def test_the_least_does_not_depend_on_how_much_was_asked_for(
    captured: Program, enough: int
) -> None:
    with pytest.raises(PassError) as caught:
        fit(captured, int(0.9 * enough))
    assert f"cidl{{memory={enough}}}" in caught.value.hint


# ------------------------------------------------------------------ what is chosen


def test_no_budget_per_chunk_is_faster(captured: Program, enough: int, tmp_path: Path) -> None:
    """Where reading takes about as long as computing, so that it matters how chunks are cut."""
    path, device = faster_storage(tmp_path, 10)
    memory = int(1.5 * enough)
    _, context = fit(captured, memory, path)
    chosen = predicted(context.notes[0])
    compared = 0
    for part in (2, 3, 6):
        other = captured.copy()
        CIDL(ByteSize(memory // part)).run(other, Context("cidl"))
        bundle = odsora.lower(other, tmp_path / f"{part}.odsora", verify="structure")
        workload = bundle_workload(bundle, device)
        if workload.least_budget <= memory:
            compared += 1
            seconds = make_plan(workload, device, memory).predicted_seconds
            assert chosen <= 1.01 * seconds, part
    assert compared >= 2


def test_a_run_in_more_memory_takes_no_longer(captured: Program, enough: int) -> None:
    seconds = [
        predicted(fit(captured, int(enough * times))[1].notes[0]) for times in (1.0, 1.4, 10.0)
    ]
    for before, after in itertools.pairwise(seconds):
        assert after <= 1.01 * before


def test_where_reading_takes_no_time_chunks_are_large(captured: Program, tmp_path: Path) -> None:
    path, _ = faster_storage(tmp_path, 10_000)
    fast, _ = fit(captured, 10**8, path)
    slow, _ = fit(captured, 10**8)
    assert chunks(fast)["stdit3"] < chunks(slow)["stdit3"]


def test_the_notes_say_what_was_chosen_and_predicted(film: Program) -> None:
    _, context = fit(film, 10**8)
    assert context.notes[0].startswith("a run in 100.0 MB on iphone15pro: predicted ")
    assert len(context.notes) == 6
    for name, note in zip(film.components, context.notes[1:], strict=True):
        assert re.match(rf"{name}: \d+ chunks? of at most .* of weights", note)


def test_cuts_have_reasons(captured: Program, enough: int) -> None:
    made, _ = fit(captured, int(1.5 * enough))
    plan = made.components["stdit3"].plan
    assert plan is not None and "reading a chunk waits for computing" in plan.cost
    assert plan.chunks[-1].reason == "the end"
    assert all("hands on" in chunk.reason for chunk in plan.chunks[:-1])


def test_results_stay_and_the_choice_is_the_same_again(captured: Program, enough: int) -> None:
    made, _ = fit(captured, int(1.3 * enough))
    again, _ = fit(captured, int(1.3 * enough))
    assert fingerprint(made) == fingerprint(again)
    component = made.components["stdit3"]
    for name, function in captured.components["stdit3"].functions.items():
        expected = evaluate(function, component.weights, captured.examples)
        results = evaluate_component(component, name, captured.examples)
        assert all(torch.equal(results[key], expected[key]) for key in expected)
