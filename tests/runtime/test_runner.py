"""The runner of a pipeline's bundle: what is in memory when, and what an early exit leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.errors import UsageError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Progress, Runner
from odsora_compiler.runtime.trace import Trace

STEPS = 6


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 16)

    def forward(self, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.tanh(self.out(text))}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            z = torch.tanh(layer(z) + y * t[:, None])
        return z


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.out(z)


def sample(c: Any, text: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
    y = c.encoder(text=text)
    for step in range(STEPS):
        t = torch.full((2,), 1 - step / STEPS)
        z = z + c.denoiser(z=z, t=t, y=y) * (1 / STEPS)
    return {"decoded": c.decoder(z=z)}


@pytest.fixture(scope="module")
def program() -> odsora.Program:
    torch.manual_seed(0)
    z, y, text = torch.randn(2, 16), torch.randn(2, 16), torch.randn(2, 64)
    spec = odsora.PipelineSpec(
        {
            "encoder": odsora.ModelSpec(Encoder(), {"text": text}),
            "denoiser": odsora.ModelSpec(Denoiser(), {"z": z, "t": torch.rand(2), "y": y}),
            "decoder": odsora.ModelSpec(Decoder(), {"z": z}),
        },
        host=sample,
        inputs={"text": text, "z": z},
    )
    return odsora.run_passes(odsora.capture(spec), "lpl{min_steps=1 patience=1 scope=tensor}")


@pytest.fixture(scope="module")
def bundle(program: odsora.Program, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "toy.odsora"
    return Bundle(odsora.lower(program, out, precision="fp32"))


def events(trace: Trace, path: Path) -> list[dict[str, Any]]:
    trace.save(path)
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def test_the_bundle_does_what_the_program_does(program: odsora.Program, bundle: Bundle) -> None:
    found = Runner(bundle).run(program.examples)
    expected = evaluate_program(program, program.examples)
    assert (found["decoded"] - expected["decoded"]).abs().max() < 1e-5


def test_a_component_goes_when_another_one_is_called_and_it_is_not_needed_again(
    program: odsora.Program, bundle: Bundle, tmp_path: Path
) -> None:
    trace = Trace()
    Runner(bundle, trace=trace).run(program.examples)
    seen = [
        (event["cat"], event["name"]) for event in events(trace, tmp_path / "t") if "cat" in event
    ]
    order = [item for item in seen if item[0] in ("load", "evict")]
    assert order == [
        ("load", "encoder-00"),
        ("evict", "encoder-00"),
        ("load", "denoiser-00"),
        ("evict", "denoiser-00"),
        ("load", "decoder-00"),
    ]


def test_an_early_exit_leaves_calls_out_and_everyone_is_told(
    program: odsora.Program, bundle: Bundle
) -> None:
    told: list[Progress] = []
    runner = Runner(bundle, progress=told.append)
    assert runner.calls == {"encoder": 1, "denoiser": STEPS, "decoder": 1}
    runner.run(program.examples)
    calls = [(item.component, item.call, item.calls) for item in told]
    made: list[str] = []
    evaluate_program(program, program.examples, lambda name, *_: made.append(name))
    steps = made.count("denoiser")
    assert 2 <= steps < STEPS
    assert calls == [
        ("encoder", 1, 1),
        *(("denoiser", index + 1, STEPS) for index in range(steps)),
        ("decoder", 1, 1),
    ]


def test_a_budget_for_one_component_at_a_time_is_enough(
    program: odsora.Program, bundle: Bundle
) -> None:
    sizes = [
        package.weight_bytes
        for component in bundle.manifest.components.values()
        for package in component.packages.values()
    ]
    runner = Runner(bundle, memory_budget=max(sizes))
    expected = Runner(bundle).run(program.examples)
    assert torch.equal(runner.run(program.examples)["decoded"], expected["decoded"])
    assert runner.peak_weight_bytes == max(sizes) < sum(sizes)
    with pytest.raises(UsageError, match=f"Give at least {max(sizes)} bytes"):
        Runner(bundle, memory_budget=max(sizes) - 1)


def test_a_function_is_called_of_the_components_that_have_it(
    program: odsora.Program, tmp_path: Path
) -> None:
    changed = program.copy()
    faster = changed.component("denoiser").derive("negative")
    editor = Editor(faster, "test")
    (result,) = faster.results.values()
    negated = editor.call(torch.ops.aten.neg.default, result)
    editor.replace(result, negated)
    bundle = odsora.lower(changed, tmp_path / "b.odsora", precision="fp32")
    told: list[Progress] = []
    runner = Runner(Bundle(bundle), progress=told.append)
    base = runner.run(program.examples)["decoded"]
    assert {(item.component, item.function) for item in told} == {
        (name, "base") for name in ("encoder", "denoiser", "decoder")
    }
    told.clear()
    assert not torch.allclose(runner.run(program.examples, "negative")["decoded"], base)
    assert {(item.component, item.function) for item in told} == {
        ("encoder", "base"),
        ("denoiser", "negative"),
        ("decoder", "base"),
    }


def test_an_unknown_function_is_refused(program: odsora.Program, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no function 'tdtm'"):
        Runner(bundle).run(program.examples, "tdtm")
