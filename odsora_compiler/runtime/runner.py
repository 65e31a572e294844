"""Running a bundle: the host program, and a component's chunks one after another in a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import RunError, nearest
from odsora_compiler.ir.evaluate import call_operator, check_inputs, walk
from odsora_compiler.ir.function import TensorSpec
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.manifest import ChunkCall, Feature, FunctionEntry
from odsora_compiler.ir.serialize import function_from_data
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.executors import Executor, LoadedPackage, MilExecutor
from odsora_compiler.runtime.trace import Trace

Tensors = Mapping[str, torch.Tensor]


class Runner:
    """Runs a bundle.

    `memory_budget`: most bytes of weights in memory at once; None keeps every loaded chunk.
    `progress(done, name)` is told of each chunk that finished. Raises `RunError` when the budget is
    below the largest chunk.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor | None = None,
        memory_budget: int | None = None,
        trace: Trace | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> None:
        self.bundle = bundle
        self.trace = trace or Trace()
        self._host = function_from_data(dict(bundle.manifest.host))
        self._executor: Executor = executor or MilExecutor()
        self._residency = _Residency(bundle, self._executor, memory_budget, self.trace)
        self._progress = progress
        self._done = 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes, dtypes and axes of what `run` takes."""
        return self._host.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of what `run` gives."""
        return self._host.outputs

    @property
    def peak_weight_bytes(self) -> int:
        """Most bytes of weights that were in memory at once so far."""
        return self._residency.peak

    def run(self, inputs: Tensors, function: str | None = None) -> dict[str, torch.Tensor]:
        """Run the host program on named `inputs`; returns its named outputs.

        `function`: the function of each component to call instead of the one the host names.
        """
        check_inputs(self._host, inputs)
        if function is not None:
            self._check_function(function)
        self._done = 0

        def compute(node: fx.Node, args: Any, kwargs: Any) -> Any:
            if node.target is not call_component:
                return call_operator(node, args, kwargs)
            component, named = args
            return self.run_function(component, function or named, kwargs)

        with torch.no_grad():
            return walk(self._host, None, inputs, compute)

    def run_function(
        self, component: str, function: str, inputs: Tensors
    ) -> dict[str, torch.Tensor]:
        """Run one function of a component, chunk by chunk; values are freed at their last use."""
        entry = self.bundle.component(component).function(function)
        values = dict(inputs)
        for call, freed in zip(entry.chunks, _last_uses(entry), strict=True):
            given = {item.name: as_feature(values[item.name], item) for item in call.inputs}
            values.update(self.run_chunk(component, function, call, given))
            for name in freed:
                values.pop(name, None)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, f"{component}.{function} {call.package}")
        return {
            item.name: as_feature(values[entry.results[item.name]], item) for item in entry.outputs
        }

    def run_chunk(
        self, component: str, function: str, call: ChunkCall, inputs: Tensors
    ) -> dict[str, torch.Tensor]:
        """Run one chunk on inputs of its declared dtypes."""
        package = self._residency.acquire(component, call.package)
        with self.trace.span("compute", f"{call.package}.{function}"):
            results = package.run(function, inputs)
        self._residency.finished(component, call.package)
        return results

    def release(self) -> None:
        """Give back the memory of all chunks."""
        self._residency.clear()

    def _check_function(self, function: str) -> None:
        for component in self.bundle.manifest.components.values():
            if function not in component.functions:
                raise RunError(
                    f"the bundle has no function '{function}'",
                    nearest(function, component.functions),
                )


def load(
    bundle: str | Path | Bundle, executor: Executor | None = None, memory_budget: int | None = None
) -> Runner:
    """Open a bundle for running. `memory_budget` in bytes of weights."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    return Runner(opened, executor, memory_budget)


class _Residency:
    """Which chunks are in memory.

    Chunks run in a cycle, so the one used last is needed last: chunks stay from the first on as
    long as the budget also has room for the largest of the others, which then come and go.
    """

    def __init__(
        self, bundle: Bundle, executor: Executor, budget: int | None, trace: Trace
    ) -> None:
        self._bundle = bundle
        self._executor = executor
        self._budget = budget
        self._trace = trace
        self._loaded: dict[tuple[str, str], LoadedPackage] = {}
        self._checked: set[tuple[str, str]] = set()
        self.peak = 0
        sizes = {
            (name, package): self._bytes(name, package)
            for name, component in bundle.manifest.components.items()
            for package in component.packages
        }
        self._largest = max(sizes.values(), default=0)
        if budget is not None and budget < self._largest:
            worst = max(sizes, key=lambda key: sizes[key])
            raise RunError(
                f"the memory budget is {budget} bytes, chunk '{worst[1]}' alone takes "
                f"{self._largest}",
                f"Give at least {self._largest} bytes, or compile with a smaller cidl budget.",
            )

    def acquire(self, component: str, package: str) -> LoadedPackage:
        """The package, loaded when it is not in memory."""
        key = (component, package)
        if key not in self._loaded:
            if key not in self._checked:
                with self._trace.span("check", package):
                    self._bundle.verify_checksums(component, package)
                self._checked.add(key)
            with self._trace.span("load", package):
                path = self._bundle.package_path(component, package)
                self._loaded[key] = self._executor.load(path)
            self._record()
        return self._loaded[key]

    def finished(self, component: str, package: str) -> None:
        """The chunk has run: it stays if the budget allows, else its memory is given back."""
        if self._budget is not None and self._held() + self._largest > self._budget:
            self._drop((component, package))

    def clear(self) -> None:
        for key in list(self._loaded):
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        with self._trace.span("evict", key[1]):
            self._loaded.pop(key).release()
        self._record()

    def _held(self) -> int:
        return sum(self._bytes(*key) for key in self._loaded)

    def _record(self) -> None:
        held = self._held()
        self.peak = max(self.peak, held)
        self._trace.resident(held)

    def _bytes(self, component: str, package: str) -> int:
        entry = self._bundle.component(component).packages[package]
        return self._executor.resident_bytes(entry, self._bundle.manifest.precision)


def _last_uses(entry: FunctionEntry) -> list[list[str]]:
    """Per chunk, the values that neither a later chunk nor a result needs."""
    needed = set(entry.results.values())
    freed: list[list[str]] = []
    for call in reversed(entry.chunks):
        names = dict.fromkeys(item.name for item in (*call.inputs, *call.outputs))
        freed.append([name for name in names if name not in needed])
        needed.update(names)
    return freed[::-1]


def as_feature(value: torch.Tensor, feature: Feature) -> torch.Tensor:
    """`value` in the dtype and shape of a package's feature.

    Raises `RunError` where an integer is too large: Core ML has int32 only.
    """
    if value.dtype == torch.int64 and feature.torch_dtype == torch.int32 and value.numel():
        low, high = (int(bound) for bound in torch.aminmax(value))
        limits = torch.iinfo(torch.int32)
        if low < limits.min or high > limits.max:
            raise RunError(
                f"'{feature.name}' has integers from {low} to {high}",
                f"Core ML's integers go from {limits.min} to {limits.max}.",
            )
    # Core ML has no features of rank 0: they have one element in a package.
    return value.to(feature.torch_dtype).reshape(feature.shape)
