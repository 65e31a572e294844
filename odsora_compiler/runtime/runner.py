"""Running a bundle: the host program, and a component's chunks one after another.

Which chunk is in memory when is planned beforehand (`planning`) and done by `execution`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from odsora_compiler.errors import RunError
from odsora_compiler.ir.function import TensorSpec
from odsora_compiler.ir.host_program import HostProgram, Operation
from odsora_compiler.ir.manifest import CONSTANTS_NAME, Feature, FunctionEntry
from odsora_compiler.ir.weights import FileWeights
from odsora_compiler.planning.from_bundle import HeldCall, entries_workload, host_calls
from odsora_compiler.planning.plan import SchedulePlan
from odsora_compiler.planning.profile import DeviceProfile, find_profile
from odsora_compiler.planning.workload import Workload
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.execution import Execution, plan_within
from odsora_compiler.runtime.executors import Executor, MilExecutor, OpenPackage
from odsora_compiler.runtime.residency import ChunkSource
from odsora_compiler.runtime.storage import Storage
from odsora_compiler.runtime.summary import RunSummary
from odsora_compiler.runtime.trace import Trace

Tensors = Mapping[str, torch.Tensor]

# What is planned with where nobody says what this machine is like.
UNKNOWN_MACHINE = "unknown-machine"
_WEIGHTS = ".bin"


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
    """Runs a bundle, one thing at a time.

    `memory_budget`: most bytes of weights and of all other tensors in memory at once; the program
    itself (Python, PyTorch, this package) comes on top. None keeps every chunk from its first use
    to its last. It may be set to another value at any time, also from other threads and signal
    handlers: a run under way plans what is left of it anew before its next chunk. `profile`: of the
    machine, for the planning. `storage`: reads the packages; the default checks their checksums.
    `progress` is told of each chunk that ran.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor | None = None,
        memory_budget: int | None = None,
        trace: Trace | None = None,
        progress: Callable[[Progress], None] | None = None,
        *,
        profile: DeviceProfile | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.bundle = bundle
        self.memory_budget = memory_budget
        self.trace = trace or Trace()
        self.progress = progress
        self._host = HostProgram.from_data(bundle.manifest.host)
        self._executor: Executor = executor or MilExecutor()
        self._compared = profile
        planned = profile or find_profile(UNKNOWN_MACHINE)
        # The machine may be another one than the executor's, but memory is to be met here.
        expansion = max(planned.activation_expansion, self._executor.activation_expansion)
        self._profile = replace(planned, activation_expansion=expansion)
        self._storage = storage or Storage(bundle.checksums())
        self._packages: dict[tuple[str, str], OpenPackage] = {}
        self._jobs: dict[tuple[str | None, str | None], _Job] = {}
        self._last: tuple[_Job, Execution] | None = None
        self._running = threading.Lock()

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
    def plan(self) -> SchedulePlan:
        """The schedule of the last run, or of the one under way; before any, that of `run`.

        Where the budget changed on the way, that of the rest. Raises as `plan_run` does.
        """
        return self.plan_run() if self._last is None else self._last[1].plan

    def workload(self, function: str | None = None) -> Workload:
        """All that `run` with this `function` uses, with the bytes it takes on this executor.

        Raises as `plan_run` does, but for the budget.
        """
        return self._host_job(function).workload

    def plan_run(self, function: str | None = None) -> SchedulePlan:
        """The schedule that `run` with this `function` follows.

        Raises `UsageError` where no component has the function, and naming the least budget where
        the memory budget is below it.
        """
        return self._planned(self._host_job(function))

    def follow(self, plan: SchedulePlan, function: str | None = None) -> None:
        """Have `run` with this `function` follow `plan`, whose budget is the memory budget then.

        Raises `RunError` unless it is one for this bundle, on this executor, that keeps its budget.
        """
        job = self._host_job(function)
        try:
            plan.check(job.workload)
        except RunError as error:
            hint = "Plan with the bytes that are taken here: odsora-plan --executor."
            raise RunError(error.message, error.hint or hint) from error
        self.memory_budget = plan.budget
        job.plan, job.budget = plan, plan.budget

    @property
    def summary(self) -> RunSummary:
        """Time, bound and memory of the last run; raises `RunError` before any."""
        if self._last is None:
            raise RunError("nothing was run yet")
        job, execution = self._last
        uses = tuple(job.workload.uses[use] for use in execution.executed)
        return RunSummary(
            Workload(job.workload.chunks, uses),
            execution.most_bytes,
            self.trace.timeline(),
            self.trace.load_seconds(),
            self.trace.compute_seconds(),
            self._compared,
        )

    def run(
        self, inputs: Tensors, function: str | None = None, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Run the host program on named `inputs`; returns its named outputs.

        `function`: what to call instead of the function the host names, of components that have it;
        `seed` changes what random operations of the host draw. Raises as `plan_run` does, before
        anything is loaded; `PackageError` where a package is damaged, `RunError` where memory is
        less than the least.
        """
        job = self._host_job(function)
        calls, done = self.calls, Counter[str]()
        numbers = {id(item): number for number, item in enumerate(self._host.calls)}

        def work(execution: Execution) -> dict[str, torch.Tensor]:
            def call(item: Operation, given: dict[str, torch.Tensor]) -> Tensors:
                component = item["component"]
                done[component] += 1
                return self._call(
                    execution,
                    job.first_use(numbers[id(item)]),
                    component,
                    self.bundle.component(component).called(item["function"], function),
                    given,
                    (done[component], calls[component]),
                )

            return self._host.run(inputs, self.bundle.constants(), call, seed)

        return self._execute(job, work)

    def run_function(
        self, component: str, function: str, inputs: Tensors
    ) -> dict[str, torch.Tensor]:
        """Run one function of a component on inputs of its own. Raises like `run`."""
        job = self._function_job(component, function)
        return self._execute(
            job, lambda execution: self._call(execution, 0, component, function, inputs, (1, 1))
        )

    def release(self) -> None:
        """Forget opened packages and plans; weights are in memory during runs only."""
        self._packages.clear()
        self._jobs.clear()
        self._last = None

    def _execute(
        self, job: _Job, work: Callable[[Execution], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if not self._running.acquire(blocking=False):
            raise RunError("this Runner is running already", "Make one Runner for each thread.")
        try:
            plan = self._planned(job)
            execution = Execution(
                job.workload,
                plan,
                job.budget,
                job.sources,
                self._profile,
                lambda: self.memory_budget,
                self._storage,
                self.trace,
            )
            self._last = job, execution
            try:
                with self.trace.run():
                    execution.start()
                    return work(execution)
            finally:
                execution.close()
        finally:
            self._running.release()

    def _call(
        self,
        execution: Execution,
        first: int,
        component: str,
        function: str,
        inputs: Tensors,
        call: tuple[int, int],
    ) -> dict[str, torch.Tensor]:
        """Run a function chunk by chunk; values are freed at their last use.

        `first`: the use that is its first chunk. `call`: which call of how many this is.
        """
        entry = self.bundle.component(component).function(function)
        values = dict(inputs)
        for index, (chunk, freed) in enumerate(zip(entry.chunks, _last_uses(entry), strict=True)):
            given = {item.name: as_feature(values[item.name], item) for item in chunk.inputs}
            values.update(execution.run(first + index, function, given))
            del given
            for name in freed:
                values.pop(name, None)
            if self.progress is not None:
                chunks = len(entry.chunks)
                self.progress(Progress(component, function, *call, index + 1, chunks))
        return {
            item.name: as_feature(values[entry.results[item.name]], item) for item in entry.outputs
        }

    # ------------------------------------------------------------------ what to run

    def _planned(self, job: _Job) -> SchedulePlan:
        budget = self.memory_budget
        if job.plan is None or job.budget != budget:
            job.plan, job.budget = plan_within(job.workload, self._profile, budget), budget
        return job.plan

    def _host_job(self, function: str | None) -> _Job:
        self.bundle.manifest.check_function(function)
        key = (None, function)
        if key not in self._jobs:
            components = self.bundle.manifest.components
            constants = FileWeights(self.bundle.path / CONSTANTS_NAME)
            self._jobs[key] = self._job(host_calls(self._host, components, constants), function)
        return self._jobs[key]

    def _function_job(self, component: str, function: str) -> _Job:
        key = (component, function)
        if key not in self._jobs:
            entry = self.bundle.component(component).function(function)
            held = sum(item.bytes for item in entry.inputs)
            call = {"component": component, "function": function}
            calls: list[HeldCall] = [(call, held), (None, held)]
            self._jobs[key] = self._job(calls, None)
        return self._jobs[key]

    def _job(self, calls: list[HeldCall], function: str | None) -> _Job:
        """The workload of these calls with the bytes that weights take here, and its packages."""
        manifest = self.bundle.manifest
        counted = entries_workload(
            manifest.components, calls, manifest.precision, self._profile, function
        )
        chunks = list(counted.chunks)
        functions: dict[int, set[str]] = {}
        for use in counted.uses:
            functions.setdefault(use.chunk, set()).add(use.function)
        sources: list[ChunkSource | None] = [None] * len(chunks)
        for index, names in functions.items():
            chunk = chunks[index]
            source = ChunkSource(self._open(chunk.component, chunk.name), frozenset(names))
            size = source.package.resident_bytes(source.functions)
            # Kept only now: one that is damaged may be whole when it is opened again.
            self._packages[chunk.component, chunk.name] = source.package
            sources[index], chunks[index] = source, replace(chunk, resident_bytes=size)
        return _Job(Workload(tuple(chunks), counted.uses), sources)

    def _open(self, component: str, name: str) -> OpenPackage:
        if (component, name) in self._packages:
            return self._packages[component, name]
        path = self.bundle.package_path(component, name)
        for file in self.bundle.component(component).packages[name].files:
            # The weights are checked when they are read.
            if not file.endswith(_WEIGHTS):
                self._storage.verify(path / file)
        return self._executor.open(path)


@dataclass
class _Job:
    """Something to run. `plan`: made for the memory budget `budget`."""

    workload: Workload
    sources: list[ChunkSource | None]
    plan: SchedulePlan | None = None
    budget: int | None = None

    def first_use(self, call: int) -> int:
        """The first use that belongs to call number `call` of the host."""
        return bisect_left([use.call for use in self.workload.uses], call)


def load(
    bundle: str | Path | Bundle, executor: Executor | None = None, memory_budget: int | None = None
) -> Runner:
    """Open a bundle for running. `memory_budget` in bytes, see `Runner`."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    return Runner(opened, executor, memory_budget)


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
