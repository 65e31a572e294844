"""Executors behind their one interface: what is loaded when, and what it takes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.errors import PackageError, RunError, UsageError
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.mil.package import Package
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.executors import (
    CoreMLExecutor,
    MilExecutor,
    OpenPackage,
    make_executor,
)
from odsora_compiler.runtime.storage import Storage

WIDTH = 256
X = {"x": torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)}


class Layers(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    program = odsora.capture(odsora.ModelSpec(Layers(WIDTH, 2), X))
    out = tmp_path_factory.mktemp("executors") / "layers.odsora"
    bundle = Bundle(odsora.lower(program, out, verify="structure"))
    ((component, entry),) = bundle.manifest.components.items()
    (name,) = entry.packages
    return bundle.package_path(component, name)


def weights_file(package: Path) -> Path:
    (found,) = package.rglob("weight.bin")
    return found


def load(
    opened: OpenPackage, buffers: Buffers, functions: Collection[str] = ("base",), **options: Any
) -> None:
    opened.load(functions, Storage(**options), buffers, lambda: False)


def test_a_package_runs_when_it_is_loaded_and_only_then(package: Path) -> None:
    opened, buffers = MilExecutor().open(package), Buffers()
    expected = Interpreter(Package.open(package)).run(X)
    opened.release()
    for _ in range(2):
        with pytest.raises(RunError, match=r"base of package .* is not loaded"):
            opened.run("base", X)
        load(opened, buffers)
        # fp32 in memory, fp16 on disk; matrices and biases.
        weights = 2 * 4 * (WIDTH * WIDTH + WIDTH)
        assert buffers.mapped_bytes == opened.resident_bytes(["base"])
        assert weights <= buffers.mapped_bytes < weights + 4096
        found = opened.run("base", X)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        opened.release()
        assert buffers.mapped_bytes == 0


def test_only_the_functions_that_were_loaded_run(package: Path) -> None:
    opened, buffers = MilExecutor().open(package), Buffers()
    assert opened.resident_bytes([]) == 0
    load(opened, buffers, [])
    with pytest.raises(RunError, match="base of package"):
        opened.run("base", X)
    load(opened, buffers)
    opened.run("base", X)
    opened.release()
    with pytest.raises(PackageError, match="no function 'bose'") as caught:
        opened.resident_bytes(["bose"])
    assert "'base'" in caught.value.hint


def test_a_cancelled_load_is_no_load(package: Path) -> None:
    opened, buffers = MilExecutor().open(package), Buffers()
    opened.load(["base"], Storage(), buffers, lambda: True)
    assert buffers.mapped_bytes == 0
    with pytest.raises(RunError, match="is not loaded"):
        opened.run("base", X)


def test_a_wrong_checksum_is_found_before_anything_runs(package: Path) -> None:
    opened, buffers = MilExecutor().open(package), Buffers()
    file = weights_file(package)
    with pytest.raises(PackageError, match=r"weight\.bin: its checksum"):
        load(opened, buffers, checksums={file: "0" * 64})
    assert buffers.mapped_bytes == 0
    load(opened, buffers, checksums={file: hashlib.sha256(file.read_bytes()).hexdigest()})
    opened.run("base", X)
    opened.release()


def test_errors_of_the_storage_come_through(package: Path) -> None:
    class Broken(Storage):
        def blocks(self, path: Path) -> Iterator[tuple[int, memoryview]]:
            yield next(super().blocks(path))
            raise PackageError(f"{path} is gone")

    opened, buffers = MilExecutor().open(package), Buffers()
    with pytest.raises(PackageError, match="is gone"):
        opened.load(["base"], Broken(), buffers, lambda: False)
    assert buffers.mapped_bytes == 0
    load(opened, buffers)
    opened.release()


_MEMORY = """
import os, sys
from pathlib import Path
import torch
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.runtime.executors import MilExecutor
from odsora_compiler.runtime.storage import Storage

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def report(name):
    print(name, resident() - start)

opened, buffers = MilExecutor().open(Path(sys.argv[1])), Buffers()
x = {"x": torch.ones(1, 2048)}
size = opened.resident_bytes(["base"])
opened.load(["base"], Storage(), buffers, lambda: False)
opened.run("base", x)
opened.release()
# The code of torch that this takes is in memory now.
start = resident()
print("size", size)
for turn in range(3):
    opened.load(["base"], Storage(), buffers, lambda: False)
    report("loaded")
    assert "weight.bin" not in Path("/proc/self/maps").read_text()
    out = opened.run("base", x)
    assert "weight.bin" not in Path("/proc/self/maps").read_text()
    opened.release()
    report("released")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_leaves_the_process(tmp_path: Path) -> None:
    program = odsora.capture(odsora.ModelSpec(Layers(2048, 4), {"x": torch.ones(1, 2048)}))
    bundle = Bundle(odsora.lower(program, tmp_path / "large.odsora", verify="structure"))
    (path,) = bundle.path.rglob("*.mlpackage")
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    print(lines)
    assert lines[0][0] == "size"
    size = int(lines[0][1])
    assert size == pytest.approx(4 * 4 * 2048**2, rel=0.01)
    slack = 2 << 20
    for name, growth in lines[1:]:
        expected = size if name == "loaded" else 0
        assert abs(int(growth) - expected) < slack, name


class FakeModel:
    """Stands for coremltools' MLModel: computes with the interpreter what Core ML would."""

    alive = 0

    def __init__(self, path: str, function_name: str) -> None:
        self._interpreter = Interpreter(Package.open(path), function_name)
        self._interpreter.run(X)
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        assert all(isinstance(value, np.ndarray) for value in inputs.values())
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        if given["x"].isnan().any():
            raise RuntimeError("the espresso engine says no")
        return {name: value.numpy() for name, value in self._interpreter.run(given).items()}


def test_core_ml_models_are_made_by_load_and_dropped_by_release(package: Path) -> None:
    opened, buffers = CoreMLExecutor(FakeModel).open(package), Buffers()
    assert opened.resident_bytes(["base"]) == weights_file(package).stat().st_size
    with pytest.raises(RunError, match=r"base of package .* is not loaded"):
        opened.run("base", X)
    load(opened, buffers)
    assert FakeModel.alive == 1
    expected = Interpreter(Package.open(package)).run(X)
    found = opened.run("base", X)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(RunError, match=r"Core ML failed in function base .* espresso"):
        opened.run("base", {"x": torch.full((3, WIDTH), torch.nan)})
    opened.release()
    assert FakeModel.alive == 0
    opened.load(["base"], Storage(), buffers, lambda: True)
    assert FakeModel.alive == 0


def test_core_ml_loads_only_what_has_its_checksum(package: Path) -> None:
    opened = CoreMLExecutor(FakeModel).open(package)
    with pytest.raises(PackageError, match=r"weight\.bin: its checksum"):
        load(opened, Buffers(), checksums={weights_file(package): "0" * 64})
    assert FakeModel.alive == 0


def test_what_core_ml_refuses_is_named(package: Path) -> None:
    def refuse(path: str, function_name: str) -> Any:
        raise RuntimeError("compiler error -5")

    opened = CoreMLExecutor(refuse).open(package)
    with pytest.raises(PackageError, match=r"load function base of package .*error -5"):
        load(opened, Buffers())
    with pytest.raises(PackageError, match="no function 'bose'"):
        load(opened, Buffers(), ["bose"])


def test_executors_have_names() -> None:
    assert make_executor("mil").name == "mil"
    with pytest.raises(UsageError, match="no executor 'mill'") as caught:
        make_executor("mill")
    assert "'mil'" in caught.value.hint
    if sys.platform != "darwin":
        with pytest.raises(RunError, match="needs macOS"):
            make_executor("coreml")


def test_a_package_that_is_not_there_does_not_open(tmp_path: Path) -> None:
    for executor in (MilExecutor(), CoreMLExecutor(FakeModel)):
        with pytest.raises(PackageError, match=r"gone\.mlpackage is missing"):
            executor.open(tmp_path / "gone.mlpackage")


def test_a_weights_file_that_is_gone_is_named(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy.mlpackage"))
    opened = MilExecutor().open(copy)
    opened.resident_bytes(["base"])
    os.remove(weights_file(copy))
    buffers = Buffers()
    with pytest.raises(PackageError, match=r"weight\.bin cannot be read: No such file"):
        load(opened, buffers)
    assert buffers.mapped_bytes == 0
