"""The workload of a program is that of the bundle it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from workloads import device

import odsora_compiler as odsora
from odsora_compiler.ir.manifest import Manifest
from odsora_compiler.ir.program import Program
from odsora_compiler.planning.from_bundle import bundle_workload
from odsora_compiler.planning.from_program import ProgramWorkloads

WIDTH, ROWS = 32, 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def sample(c, x):  # type: ignore[no-untyped-def]
    """Two networks that take turns between others, constants, noise and sums of the host."""
    scale = torch.linspace(0.5, 1.5, WIDTH)
    x = c.first(x=x)
    kept = x * scale
    for _ in range(2):
        x = c.left(x=x) + torch.randn(ROWS, WIDTH)
        x = c.right(x=x)
    x = c.last(x=x + kept)
    return {"y": x, "doubled": torch.cat([x, c.last(x=x)])}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    rows = torch.randn(ROWS, WIDTH)
    spec = odsora.PipelineSpec(
        components={name: odsora.ModelSpec(Net(), {"x": rows}) for name in NAMES},
        host=sample,
        inputs={"x": rows},
    )
    return odsora.run_passes(odsora.capture(spec), "cidl{budget=5kB}")


NAMES = ("first", "left", "right", "last")


def test_the_workload_is_that_of_the_bundle(program: Program, tmp_path: Path) -> None:
    bundle = odsora.lower(program, tmp_path / "net.odsora", verify="structure")
    manifest = Manifest.load(bundle)
    made = ProgramWorkloads(program, manifest.precision, device()).workload(manifest.components)
    assert made == bundle_workload(bundle, device())
    assert len(made.uses) == 2 * 7


def test_components_that_take_turns_are_a_group(program: Program) -> None:
    groups = ProgramWorkloads(program, "fp16", device()).groups()
    assert groups == [
        (("first",), (0,)),
        (("left", "right"), (1, 2, 3, 4)),
        (("last",), (5, 6)),
    ]
