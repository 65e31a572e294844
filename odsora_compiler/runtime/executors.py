"""What runs a chunk: the interpreter of saved packages anywhere, Core ML itself on macOS."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from odsora_compiler.errors import RunError, nearest
from odsora_compiler.ir.manifest import PackageEntry

Tensors = Mapping[str, torch.Tensor]


class LoadedChunk(Protocol):
    """A function of a package, its weights in memory or read at the first run."""

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Compute the chunk's outputs, by name."""

    def release(self) -> None:
        """Give the weights' memory back."""


class Executor(Protocol):
    """Loads chunks."""

    name: str

    def load(self, package: Path, function: str) -> LoadedChunk:
        """Make a chunk ready to run."""

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        """Bytes of memory that the weights of a loaded package take."""


class MilExecutor:
    """Interprets saved packages with torch.

    Half-precision weights are widened to float32 once when a chunk is loaded, so they take twice
    their bytes in the package.
    """

    name = "mil"

    def load(self, package: Path, function: str) -> LoadedChunk:
        from odsora_compiler.mil.interpreter import Interpreter
        from odsora_compiler.mil.package import Package

        return Interpreter(Package.open(package), function)

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        return entry.weight_bytes * (2 if precision == "fp16" else 1)


class CoreMLExecutor:
    """Runs packages with Core ML through coremltools. Only macOS has Core ML.

    Not run by this project's tests, which have no Mac.
    """

    name = "coreml"

    def __init__(self) -> None:
        if sys.platform != "darwin":
            raise RunError(
                "the 'coreml' executor needs macOS", "Use --executor mil, which runs anywhere."
            )

    def load(self, package: Path, function: str) -> LoadedChunk:
        import coremltools

        return _CoreMLChunk(coremltools.models.MLModel(str(package), function_name=function))

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        return entry.weight_bytes


class _CoreMLChunk:
    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        results = self._model.predict({name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in results.items()}

    def release(self) -> None:
        self._model = None


_EXECUTORS: dict[str, type[MilExecutor] | type[CoreMLExecutor]] = {
    "mil": MilExecutor,
    "coreml": CoreMLExecutor,
}


def make_executor(name: str) -> Executor:
    """The executor of that name; raises `RunError` when there is none or this machine lacks it."""
    if name not in _EXECUTORS:
        raise RunError(f"there is no executor '{name}'", nearest(name, _EXECUTORS))
    return _EXECUTORS[name]()
