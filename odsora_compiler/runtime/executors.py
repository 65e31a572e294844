"""What runs a chunk: the interpreter of saved packages anywhere, Core ML itself on macOS."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from odsora_compiler.errors import RunError, UsageError, nearest
from odsora_compiler.ir.manifest import PackageEntry
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package

Tensors = Mapping[str, torch.Tensor]


class LoadedPackage(Protocol):
    """A package whose weights are in memory, or read when a function first runs."""

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Compute the outputs of one of its functions, by name."""

    def release(self) -> None:
        """Give the weights' memory back."""


class Executor(Protocol):
    """Loads packages."""

    name: str

    def load(self, package: Path) -> LoadedPackage:
        """Make a package ready to run. Its functions share one copy of the weights."""

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        """Bytes of memory that the weights of a loaded package take."""


class MilExecutor:
    """Interprets saved packages with torch.

    Half-precision weights are widened to float32 once when they are first used, so they take twice
    their bytes in the package. A package that was released is not parsed again when it is loaded
    again: programs without weights are small.
    """

    name = "mil"

    def __init__(self) -> None:
        self._opened: dict[Path, _MilPackage] = {}

    def load(self, package: Path) -> LoadedPackage:
        if package not in self._opened:
            self._opened[package] = _MilPackage(package)
        return self._opened[package]

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        return entry.weight_bytes * (2 if precision == "fp16" else 1)


class _MilPackage:
    def __init__(self, path: Path) -> None:
        self._package = Package.open(path)
        self._functions: dict[str, Interpreter] = {}

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        if function not in self._functions:
            self._functions[function] = Interpreter(self._package, function)
        return self._functions[function].run(inputs)

    def release(self) -> None:
        for interpreter in self._functions.values():
            interpreter.release()


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

    def load(self, package: Path) -> LoadedPackage:
        return _CoreMLPackage(package)

    def resident_bytes(self, entry: PackageEntry, precision: str) -> int:
        return entry.weight_bytes


class _CoreMLPackage:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._models: dict[str, Any] = {}

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        import coremltools

        if function not in self._models:
            self._models[function] = coremltools.models.MLModel(
                str(self._path), function_name=function
            )
        given = {name: value.numpy() for name, value in inputs.items()}
        results = self._models[function].predict(given)
        return {name: torch.from_numpy(value) for name, value in results.items()}

    def release(self) -> None:
        self._models.clear()


_EXECUTORS: dict[str, type[MilExecutor] | type[CoreMLExecutor]] = {
    "mil": MilExecutor,
    "coreml": CoreMLExecutor,
}


def make_executor(name: str) -> Executor:
    """The executor; raises `UsageError` when there is none, `RunError` where it cannot run."""
    if name not in _EXECUTORS:
        raise UsageError(f"there is no executor '{name}'", nearest(name, _EXECUTORS))
    return _EXECUTORS[name]()
