"""A small model file, its bundle and a way to run the commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from odsora_compiler.cli.run import app

MODEL = """
import torch
import odsora_compiler as odsora


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.fc1 = torch.nn.Linear(width, 2 * width)
        self.fc2 = torch.nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x)), approximate="tanh"))


class Net(torch.nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x, shift):
        for block in self.blocks:
            x = block(x)
        return {"y": x + shift}


def build(width: int = 32, depth: int = 4, seed: int = 0):
    torch.manual_seed(seed)
    return odsora.ModelSpec(
        Net(width, depth),
        inputs={"x": torch.randn(2, 6, width), "shift": torch.randn(width)},
        axes={"x": "b t c"},
    )
"""

InFolder = Callable[..., CommandResult]


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in `cwd`."""
    name, *arguments = map(str, command)
    return subprocess.run(
        [sys.executable, "-m", f"odsora_compiler.cli.{name}", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def odsora_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InFolder:
    """odsora-run in this process, in an empty folder; asserts that there is no traceback.

    Much quicker than `run`, which starts a process and imports PyTorch anew.
    """
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> CommandResult:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model file in a folder of its own."""
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled bundle of the model; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "net.py").write_text(MODEL)
    result = run(
        "compile", "net.py", "--passes", "cidl{budget=10kB}", "-o", "net.odsora", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return folder / "net.odsora"
