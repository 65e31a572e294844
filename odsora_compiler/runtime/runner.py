"""Running a bundle: the host program, and a component's chunks one after another in a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from odsora_compiler.errors import RunError, UsageError
from odsora_compiler.ir.function import TensorSpec
from odsora_compiler.ir.host_program import HostProgram, Operation
from odsora_compiler.ir.manifest import ChunkCall, Feature, FunctionEntry
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.executors import Executor, LoadedPackage, MilExecutor
from odsora_compiler.runtime.trace import Trace

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """A chunk finished: number `chunk` of `chunks` in number `call` of the component's `calls`."""

    component: str
    function: str
    call: int
    calls: int
    chunk: int
    chunks: int


class Runner:
    """Runs a bundle.

    `memory_budget`: most bytes of weights in memory at once; None keeps every loaded chunk until
    its component has been called for the last time. `progress` is told of each chunk that ran.
    Raises `UsageError` when the budget is below the largest chunk.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor | None = None,
        memory_budget: int | None = None,
        trace: Trace | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.bundle = bundle
        self.trace = trace or Trace()
        self._host = HostProgram.from_data(bundle.manifest.host)
        self._executor: Executor = executor or MilExecutor()
        self._residency = _Residency(bundle, self._executor, memory_budget, self.trace)
        self.progress = progress

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes, dtypes and axes of what `run` takes."""
        return tuple(spec for spec, _ in self._host.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, shapes and dtypes of what `run` gives."""
        return tuple(spec for spec, _ in self._host.outputs)

    @property
    def calls(self) -> dict[str, int]:
        """Component → how often the host calls it; an early exit leaves the last ones out."""
        return dict(Counter(call["component"] for call in self._host.calls))

    @property
    def peak_weight_bytes(self) -> int:
        """Most bytes of weights that were in memory at once so far."""
        return self._residency.peak

    def run(
        self, inputs: Tensors, function: str | None = None, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Run the host program on named `inputs`; returns its named outputs.

        `function`: what to call instead of the function the host names, of components that have it;
        raises `UsageError` when none has. `seed` changes what random operations of the host draw. A
        component is loaded when it is called, and its memory given back when another one is called
        and it is not needed again.
        """
        self.bundle.manifest.check_function(function)
        calls, done = self.calls, Counter[str]()
        places = {id(item): place for place, item in enumerate(self._host.calls)}
        last_places = {item["component"]: places[id(item)] for item in self._host.calls}

        def call(item: Operation, given: dict[str, torch.Tensor]) -> Tensors:
            component = item["component"]
            for other, last in last_places.items():
                if other != component and last < places[id(item)]:
                    self._residency.release(other)
            done[component] += 1
            chosen = self.bundle.component(component).called(item["function"], function)
            return self.run_function(component, chosen, given, (done[component], calls[component]))

        return self._host.run(inputs, self.bundle.constants(), call, seed)

    def run_function(
        self, component: str, function: str, inputs: Tensors, call: tuple[int, int] = (1, 1)
    ) -> dict[str, torch.Tensor]:
        """Run one function of a component, chunk by chunk; values are freed at their last use.

        `call`: which call of how many this is, for those who watch the progress.
        """
        entry = self.bundle.component(component).function(function)
        values = dict(inputs)
        for index, (chunk, freed) in enumerate(zip(entry.chunks, _last_uses(entry), strict=True)):
            given = {item.name: as_feature(values[item.name], item) for item in chunk.inputs}
            values.update(self.run_chunk(component, function, chunk, given))
            for name in freed:
                values.pop(name, None)
            if self.progress is not None:
                chunks = len(entry.chunks)
                self.progress(Progress(component, function, *call, index + 1, chunks))
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
            raise UsageError(
                f"the memory budget is {int(budget)} bytes, chunk '{worst[1]}' alone takes "
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

    def release(self, component: str) -> None:
        """Give back the memory of a component that is not called again in this run."""
        for key in [key for key in self._loaded if key[0] == component]:
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
