"""What runs a chunk: the interpreter of saved packages anywhere, Core ML itself on macOS."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from odsora_compiler.errors import PackageError, RunError, UsageError, nearest
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.loading import Loading
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.mil.package import Package
from odsora_compiler.runtime.storage import Storage

Tensors = Mapping[str, torch.Tensor]


class OpenPackage(Protocol):
    """A package's program, without its weights until they are loaded.

    One thread may load while another runs another package.
    """

    def resident_bytes(self, functions: Collection[str]) -> int:
        """Bytes of memory that loading it for these functions takes, from its start on."""

    def load(
        self,
        functions: Collection[str],
        storage: Storage,
        buffers: Buffers,
        cancelled: Callable[[], bool],
    ) -> None:
        """Read all that running these functions takes, which share one copy of the weights.

        Nothing is loaded after an error, nor when `cancelled` said so while it was asked now and
        then. Raises PackageError where the package is not what it was, or cannot be read.
        """

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The outputs of a function that is loaded, by name. Raises RunError when it is not."""

    def release(self) -> None:
        """Give the memory back; nothing where nothing is loaded."""


class Executor(Protocol):
    """Opens packages.

    `activation_expansion`: most bytes of memory for a byte of inputs, outputs and what lies between
    them, as the package has them, while a function runs.
    """

    name: str
    activation_expansion: float

    def open(self, package: Path) -> OpenPackage:
        """Read what a package computes. Raises PackageError where it is damaged."""


class MilExecutor:
    """Interprets saved packages with torch.

    Half-precision weights are held in float32 where they are multiplied in it, so they take up to
    twice their bytes in the package; and half-precision values are widened to be computed with.
    """

    name = "mil"
    activation_expansion = 2.0

    def open(self, package: Path) -> OpenPackage:
        return _OpenMilPackage(Package.open(package))


class _OpenMilPackage:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._interpreters: dict[str, Interpreter] = {}
        self._loadings: dict[frozenset[str], Loading] = {}
        self._loading: Loading | None = None
        self._loaded: frozenset[str] = frozenset()

    def resident_bytes(self, functions: Collection[str]) -> int:
        return self._loading_of(functions).resident_bytes

    def load(
        self,
        functions: Collection[str],
        storage: Storage,
        buffers: Buffers,
        cancelled: Callable[[], bool],
    ) -> None:
        self.release()
        loading = self._loading_of(functions)
        if loading.load(storage.blocks, buffers, cancelled):
            self._loading, self._loaded = loading, frozenset(functions)

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        if function not in self._loaded:
            raise _not_loaded(function, self._package.path)
        return self._interpreters[function].run(inputs)

    def release(self) -> None:
        loading, self._loading, self._loaded = self._loading, None, frozenset()
        if loading is not None:
            loading.release()

    def _loading_of(self, functions: Collection[str]) -> Loading:
        wanted = frozenset(functions)
        if wanted not in self._loadings:
            for name in wanted - self._interpreters.keys():
                self._interpreters[name] = Interpreter(self._package, name)
            requests = [
                request for name in sorted(wanted) for request in self._interpreters[name].requests
            ]
            self._loadings[wanted] = Loading(self._package, requests)
            # Its numbers of weights were looked at; from now on files are read by storages alone.
            self._package.unmap()
        return self._loadings[wanted]


class CoreMLExecutor:
    """Runs packages with Core ML through coremltools, which only macOS has.

    `model`: makes a loaded model of a package's path and `function_name`, by default coremltools'
    MLModel. This project's tests, which have no Mac, give one of their own that stands for it.
    """

    name = "coreml"
    activation_expansion = 1.0  # It computes in what the package says.

    def __init__(self, model: Callable[..., Any] | None = None) -> None:
        if model is None and sys.platform != "darwin":
            raise RunError(
                "the 'coreml' executor needs macOS", "Use --executor mil, which runs anywhere."
            )
        self._model = model

    def open(self, package: Path) -> OpenPackage:
        return _OpenCoreMLPackage(Package.open(package), self._model or _core_ml_model)


class _OpenCoreMLPackage:
    def __init__(self, package: Package, model: Callable[..., Any]) -> None:
        self._package = package
        self._model = model
        self._models: dict[str, Any] = {}

    def resident_bytes(self, functions: Collection[str]) -> int:
        # Core ML maps the weights file; what it makes of it for the neural engine is not told.
        return sum(file.stat().st_size for file in self._weights_files())

    def load(
        self,
        functions: Collection[str],
        storage: Storage,
        buffers: Buffers,
        cancelled: Callable[[], bool],
    ) -> None:
        self.release()
        path = self._package.path
        for file in self._weights_files():
            storage.verify(file)
        models: dict[str, Any] = {}
        for function in sorted(functions):
            if cancelled():
                return
            self._package.function(function)
            try:
                models[function] = self._model(str(path), function_name=function)
            except Exception as error:
                raise PackageError(
                    f"Core ML cannot load function {function} of package {path}: {error}",
                    "Does this system's Core ML know the package's version? Else compile it again.",
                ) from error
        self._models = models

    def run(self, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        if function not in self._models:
            raise _not_loaded(function, self._package.path)
        given = {name: value.numpy() for name, value in inputs.items()}
        try:
            results = self._models[function].predict(given)
        except Exception as error:
            raise RunError(
                f"Core ML failed in function {function} of package {self._package.path}: {error}"
            ) from error
        return {name: torch.from_numpy(value) for name, value in results.items()}

    def release(self) -> None:
        self._models = {}

    def _weights_files(self) -> list[Path]:
        return sorted(self._package.path.rglob("*.bin"))


def _core_ml_model(path: str, function_name: str) -> Any:
    import coremltools

    return coremltools.models.MLModel(path, function_name=function_name)


def _not_loaded(function: str, package: Path) -> RunError:
    return RunError(
        f"function {function} of package {package} is not loaded", "Load it before it is run."
    )


_EXECUTORS: dict[str, type[MilExecutor] | type[CoreMLExecutor]] = {
    "mil": MilExecutor,
    "coreml": CoreMLExecutor,
}


def make_executor(name: str) -> Executor:
    """The executor; raises `UsageError` when there is none, `RunError` where it cannot run."""
    if name not in _EXECUTORS:
        raise UsageError(f"there is no executor '{name}'", nearest(name, _EXECUTORS))
    return _EXECUTORS[name]()
