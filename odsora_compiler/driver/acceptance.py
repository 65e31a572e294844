"""Holding lowered packages to the PyTorch program they were made from, by executing them.

Weights are read back from every package and compared with the store: one wrong number may change
an output less than half precision does. Every chunk whose structure has not run yet is executed on
the inputs the reference gives it and compared with what PyTorch computes there. Where a run of the
whole function is affordable, all chunks are executed, chained as a device would chain them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import fx

from odsora_compiler.analysis.cost import function_flops
from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.drift import Drift, measure_drift
from odsora_compiler.ir.evaluate import call_operator, evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.manifest import Feature
from odsora_compiler.ir.program import Component
from odsora_compiler.lowering.bundle import LoweredComponent
from odsora_compiler.lowering.chunks import FunctionReport, PackageReport
from odsora_compiler.lowering.interface import Names
from odsora_compiler.lowering.rules import HALF_MASK, HALF_MAX
from odsora_compiler.lowering.template import is_free
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Runner, as_feature

Tensors = Mapping[str, torch.Tensor]
_Known = TypeVar("_Known")

FP32_MAXIMUM = 1e-4  # largest error, of the output's largest value
FP16_COSINE = 0.9995
# A cosine says nothing about size, and nothing at all where an output is one number. Results with
# that cosine are 0.03 apart when their sizes are equal.
FP16_RELATIVE = 0.05

# An operation that leaves its operands' scale by more than this, its operands being right, is wrong
# by itself. In fp16 rounding alone comes near, so there it only helps to name a culprit.
_LOCAL_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
_SAMPLES = 2048


@dataclass
class AcceptanceReport:
    """What was compared: (package, function) → drift of the chunk, component.function → drift.

    `host`: drift of the whole program, where its host does more than one call.
    `weights_compared`: package, place in its weights file, and weight, of each weight read back.
    """

    chunks: dict[tuple[str, str], Drift] = field(default_factory=dict)
    functions: dict[str, Drift] = field(default_factory=dict)
    weights_compared: set[tuple[str, int, str]] = field(default_factory=set)
    host: Drift | None = None


def accept(
    bundle: Bundle,
    lowered: Mapping[str, LoweredComponent],
    limit_flops: float | None,
    progress: Callable[[str], None] = lambda text: None,
) -> AcceptanceReport:
    """Execute and compare; raises `VerificationError` naming the first chunk and op that drift.

    Functions run on their component's examples. `limit_flops`: functions that need more for one run
    are compared by their distinct chunks only; None: whole functions always.
    """
    report = AcceptanceReport()
    for component in lowered.values():
        for function in component.functions:
            run = _FunctionRun(bundle, component, function, report, progress)
            run.compare(component.component.examples, limit_flops)
    return report


def compare_host(
    bundle: Bundle, inputs: Tensors, expected: Tensors, progress: Callable[[str], None]
) -> Drift:
    """How far the whole bundle, host and all, is from PyTorch on the host's `inputs`.

    Raises `VerificationError` on NaN only: every component is right by itself, and a sampler of
    many steps carries their rounding on as it does any change of its input.
    """
    progress("comparing the whole program")
    runner = Runner(bundle)
    drift = measure_drift(runner.run(inputs), expected)
    runner.release()
    if drift.nan:
        raise VerificationError(
            "the program as a whole gives NaN, none of its components does by itself",
            "The sampler may leave the range of half precision: try --precision fp32.",
        )
    return drift


class _FunctionRun:
    """One function of one component, compared chunk by chunk."""

    def __init__(
        self,
        bundle: Bundle,
        lowered: LoweredComponent,
        function: str,
        report: AcceptanceReport,
        progress: Callable[[str], None],
    ) -> None:
        self._bundle = bundle
        self._lowered = lowered
        self._component = lowered.component
        self._function = function
        self._chunked = lowered.functions[function]
        self._report = report
        self._progress = progress
        self._precision = bundle.manifest.precision
        # Structure → number of a weight in its function → the constant that holds it.
        self._places: dict[str, dict[int, str]] = {}

    def compare(self, inputs: Tensors, limit_flops: float | None) -> None:
        flops = function_flops(self._chunked.whole)
        whole = limit_flops is None or flops <= limit_flops
        reference = self._compare_chunks(inputs, every=whole)
        if whole and len(self._chunked.chunks) > 1:
            self._compare_whole(inputs, reference)
        elif whole:
            name = f"{self._component.name}.{self._function}"
            (self._report.functions[name],) = (
                self._report.chunks[package.name, self._function]
                for package in self._lowered.reports
            )

    def _compare_chunks(self, inputs: Tensors, every: bool) -> Tensors:
        """Each distinct chunk (or each chunk) on the reference's inputs; the reference's outputs.

        A chunk of a structure seen before is given that chunk's outputs instead of being run:
        values of the right kind for the chunks after it.
        """
        values = dict(inputs)
        seen: dict[str, list[torch.Tensor]] = {}
        steps = zip(
            self._chunked.chunks, self._lowered.reports, self._chunked.last_uses(), strict=True
        )
        for chunk, report, freed in steps:
            structure = report.functions[self._function].template or report.name
            names = [spec.name for spec in chunk.outputs]
            told = self._weights_agree(report, structure)
            if structure in seen and not every and told:
                values.update(zip(names, seen[structure], strict=True))
            else:
                given = {spec.name: values[spec.name] for spec in chunk.inputs}
                self._progress(f"comparing {report.name} {self._function}")
                outputs = self._compare_chunk(chunk, report, given)
                seen[structure] = [outputs[name] for name in names]
                values.update(outputs)
            for name in freed:
                values.pop(name, None)
        return {name: values[value] for name, value in self._chunked.outputs.items()}

    def _compare_chunk(
        self, chunk: Function, report: PackageReport, inputs: Tensors
    ) -> dict[str, torch.Tensor]:
        package = report.name
        samples: dict[str, _Sample] = {}

        def observe(node: fx.Node, value: torch.Tensor) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                samples[node.name] = _Sample.of(value)

        expected = evaluate(chunk, self._component.weights, inputs, observe)
        _refuse_nan(expected, chunk)
        operators = report.functions[self._function].operators
        watch = _Watch(chunk, operators, samples, self._precision)
        entry = self._bundle.component(self._component.name).function(self._function)
        (call,) = [call for call in entry.chunks if call.package == package]
        given = {item.name: _as_handed_on(inputs[item.name], item) for item in call.inputs}
        interpreter = Interpreter(self._package(package), self._function)
        found = interpreter.run(given, watch)
        if watch.suspects and self._precision == "fp32":
            again = _Operands(watch)
            interpreter.run(given, again)
            watch.acquit(
                node for node in watch.suspects if again.explain(node, inputs, self._component)
            )
        interpreter.release()
        found = {
            name: found[name].to(value.dtype).reshape(value.shape)
            for name, value in expected.items()
        }
        drift = self._drift(found, expected)
        self._report.chunks[package, self._function] = drift
        problem = self._problem(drift) or watch.problem()
        if problem:
            raise VerificationError(
                f"chunk {package}, function '{self._function}': {problem}",
                f"First operation that drifts: {watch.culprit()}",
            )
        return expected

    def _weights_agree(self, report: PackageReport, structure: str) -> bool:
        """Whether the package of a chunk holds the chunk's weights.

        False where that cannot be told; raises `VerificationError` where it holds others.
        """
        package = self._package(report.name)
        item = report.functions[self._function]
        names = Names(item.legal).weights()
        told: set[str] = set()
        unnamed: dict[str, torch.Tensor] = {}
        for value, blob in package.function(self._function).blob_references():
            name = _find(value, names)
            if name is None or item.weights.spec(name).shape != blob.shape:
                unnamed[value] = package.tensor(blob)
                continue
            place = (report.name, blob.offset, name)
            if place in self._report.weights_compared and not item.weights.is_folded(name):
                # Functions of a package share its weights, but fold constants of their own.
                told.add(name)
                continue
            expected = item.weights.load(name)
            if bool(expected.isnan().any()):
                raise VerificationError(
                    f"chunk {report.name}, function '{self._function}': weight '{name}' of the "
                    "model has NaN",
                    "The file of weights is at fault, or the code that makes them.",
                )
            if not _holds(package.tensor(blob), expected):
                raise VerificationError(
                    f"chunk {report.name}, function '{self._function}': weight '{name}' in the "
                    "package is not the model's"
                )
            told.add(name)
            self._report.weights_compared.add(place)
        return self._unnamed_agree(structure, item, told, unnamed)

    def _unnamed_agree(
        self,
        structure: str,
        item: FunctionReport,
        told: set[str],
        unnamed: Mapping[str, torch.Tensor],
    ) -> bool:
        """Whether the weights not yet `told` are in constants that coremltools named itself.

        Which constant is which weight, in what shape, is found by value in the first chunk of a
        structure, which is executed, and holds for the others of that structure. False where two
        constants have a weight's values, or none has.
        """
        places = self._places.setdefault(structure, {})
        known = bool(places)
        for index, name in enumerate(item.legal.weight_names()):
            # Others are part of the structure, see `lowering.template`.
            if name in told or not is_free(item.weights, name):
                continue
            expected = item.weights.load(name)
            candidates = [value for value, stored in unnamed.items() if _holds(stored, expected)]
            if len(candidates) != 1 or (known and places.get(index) != candidates[0]):
                return False
            if not known:
                places[index] = candidates[0]
        return True

    def _package(self, name: str) -> Package:
        return Package.open(self._bundle.package_path(self._component.name, name))

    def _compare_whole(self, inputs: Tensors, reference: Tensors) -> None:
        name = f"{self._component.name}.{self._function}"
        self._progress(f"comparing {name} as a whole")
        runner = Runner(self._bundle)
        found = runner.run_function(self._component.name, self._function, inputs)
        runner.release()
        drift = self._drift(found, reference)
        self._report.functions[name] = drift
        problem = self._problem(drift)
        if problem:
            raise VerificationError(
                f"function '{name}' as a whole: {problem}",
                "Every chunk alone is within tolerance: errors add up along the chunks. "
                "Try --precision fp32.",
            )

    def _drift(self, found: Tensors, expected: Tensors) -> Drift:
        if self._precision == "fp16":
            pairs = {name: _alike_where_masked(found[name], expected[name]) for name in expected}
            found = {name: pair[0] for name, pair in pairs.items()}
            expected = {name: pair[1] for name, pair in pairs.items()}
        return measure_drift(found, expected)

    def _problem(self, drift: Drift) -> str:
        if drift.nan:
            return str(drift)
        if self._precision == "fp32" and drift.maximum > FP32_MAXIMUM:
            return f"the package is {drift.maximum:.2e} off, at most {FP32_MAXIMUM:g} is allowed"
        if self._precision == "fp16" and drift.cosine < FP16_COSINE:
            return f"the package's cosine is {drift.cosine:.6f}, at least {FP16_COSINE} is needed"
        if self._precision == "fp16" and drift.relative > FP16_RELATIVE:
            return (
                f"the package is {drift.relative:.2e} of the outputs' norm off, "
                f"at most {FP16_RELATIVE} is allowed"
            )
        return ""


@dataclass(frozen=True)
class _Sample:
    """Values of a tensor at fixed places. `peak`: its largest absolute value, NaN if it has one."""

    shape: tuple[int, ...]
    values: torch.Tensor
    peak: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Sample:
        count = min(_SAMPLES, tensor.numel())
        # In float64: float32 cannot tell the last places of a large tensor apart.
        places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
        # In the order of memory, which is many times faster than across it.
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
        bounds = torch.aminmax(tensor.permute(order))
        peak = float(torch.maximum(bounds.min.neg(), bounds.max))
        return cls(tuple(tensor.shape), torch.take(tensor, places).float(), peak)


class _Watch:
    """Sees every value a package computes and compares those that are values of the graph too."""

    def __init__(
        self,
        chunk: Function,
        operators: Mapping[str, str],
        expected: Mapping[str, _Sample],
        precision: str,
    ) -> None:
        nodes = {node.name: node for node in chunk.operators()}
        # Package values are named by stems such as `op12_linear`; `operators` maps them to nodes.
        self._nodes = {stem: nodes[name] for stem, name in operators.items() if name in nodes}
        # An output has its own name in the package.
        self._nodes |= {name: node for name, node in chunk.results.items() if node.name in nodes}
        self._expected = expected
        self._precision = precision
        self._tolerance = _LOCAL_TOLERANCE[precision]
        self._errors: dict[str, float] = {}
        self.suspects: dict[fx.Node, str] = {}
        self._first_large: str | None = None
        self._first_off: str | None = None
        self._nan: str | None = None
        self._infinite: str | None = None

    def __call__(self, name: str, op: str, value: torch.Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        sample = _Sample.of(value)
        if self._nan is None and math.isnan(sample.peak):
            self._nan = f"{op} '{name}' gives NaN{self._place(name)}"
        node = _find(name, self._nodes)
        expected = self._expected.get(node.name) if node is not None else None
        overflow = math.isinf(sample.peak) and (expected is None or math.isfinite(expected.peak))
        if self._infinite is None and overflow:
            self._infinite = f"{op} '{name}' gives infinity{self._place(name)}"
        if node is None or expected is None or node.name in self._errors:
            return
        if tuple(value.shape) != expected.shape:
            return
        ours, reference = sample.values, expected.values
        if self._precision == "fp16":
            ours, reference = _alike_where_masked(ours, reference)
        error = float((ours - reference).abs().nan_to_num(torch.inf).max())
        self._errors[node.name] = error
        sources = [used.name for used in node.all_input_nodes if used.name in self._expected]
        scale = max([expected.peak, *(self._expected[source].peak for source in sources)])
        if not self.exceeds(node, error):
            if self._first_off is None and error > self._tolerance * expected.peak:
                self._first_off = (
                    f"{op} '{name}', which makes rounded operands of up to {scale:.2e} into values "
                    f"of up to {expected.peak:.2e}, off by {error:.2e}{self._place(name)}"
                )
            return
        text = f"{op} '{name}', off by {error:.2e} at values up to {scale:.2e}{self._place(name)}"
        self._first_large = self._first_large or text
        inherited = any(
            self._errors.get(source, 0.0) > 0.1 * self._tolerance * self._expected[source].peak
            for source in sources
        )
        if not inherited:
            self.suspects.setdefault(node, text)

    def problem(self) -> str:
        """What is wrong even where the outputs hide it."""
        if self._nan is not None:
            return self._nan
        if self._precision == "fp32" and self.suspects:
            return "an operation computes something else than PyTorch"
        return ""

    def acquit(self, nodes: Iterable[fx.Node]) -> None:
        """Take operators off the suspects."""
        for node in list(nodes):
            del self.suspects[node]

    def node(self, name: str) -> fx.Node | None:
        """The graph's counterpart of a package's value."""
        return _find(name, self._nodes)

    def exceeds(self, node: fx.Node, error: float) -> bool:
        """Whether an error is too large for the sizes of the operator's operands and result."""
        sources = [used.name for used in node.all_input_nodes if used.name in self._expected]
        peaks = [self._expected[name].peak for name in (node.name, *sources)]
        return error > self._tolerance * max(peaks)

    def culprit(self) -> str:
        """The first operation that drifts, in words."""
        return (
            self._nan
            or next(iter(self.suspects.values()), None)
            or self._first_large
            or self._infinite
            or self._first_off
            or "none by itself (only values with a counterpart in the graph are compared)"
        )

    def _place(self, name: str) -> str:
        node = _find(name, self._nodes)
        return f" [{node.target} {node.meta['provenance']}]" if node is not None else ""


class _Operands:
    """Keeps what suspected operators read and gave in a second run of the package.

    An operator that amplifies the rounding of its operands (tanh(1/x) near 0) is off although it is
    right: PyTorch's operator gives the same on the operands that the package has.
    """

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        self._wanted = {*watch.suspects}
        for node in watch.suspects:
            self._wanted |= set(node.all_input_nodes)
        self._kept: dict[fx.Node, torch.Tensor] = {}

    def __call__(self, name: str, op: str, value: torch.Tensor) -> None:
        node = self._watch.node(name)
        if node is not None and node in self._wanted:
            self._kept.setdefault(node, value)

    def explain(self, node: fx.Node, inputs: Tensors, component: Component) -> bool:
        """Whether the operator gave what PyTorch gives on the same operands."""
        values: dict[fx.Node, torch.Tensor] = {}
        for used in (node, *node.all_input_nodes):
            if used.op == "placeholder":
                values[used] = inputs[str(used.target)]
            elif used.op == "get_attr":
                values[used] = component.weights.load(str(used.target))
            elif used in self._kept and self._kept[used].shape == used.meta["val"].shape:
                values[used] = self._kept[used].to(used.meta["val"].dtype)
            else:
                return False
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        expected = call_operator(node, args, kwargs)
        error = (expected - values[node]).abs().nan_to_num(torch.inf).max()
        return not self._watch.exceeds(node, float(error))


def _as_handed_on(value: torch.Tensor, feature: Feature) -> torch.Tensor:
    """What the chunk before would hand on where the reference has `value`.

    In half precision a mask's minus infinity is smaller, see the rule "half-mask".
    """
    if feature.torch_dtype is torch.float16:
        value = value.masked_fill(value < -HALF_MAX, -HALF_MASK)
    return as_feature(value, feature)


def _alike_where_masked(
    found: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with 0 where the reference has a mask's minus infinity and the package one of its own.

    Half precision's is smaller, see the rule "half-mask", and more than an ordinary score.
    """
    if not expected.is_floating_point():
        return found, expected
    masked = (expected < -HALF_MAX) & (found <= -HALF_MASK / 2) & found.isfinite()
    return found.masked_fill(masked, 0.0), expected.masked_fill(masked, 0.0)


def _find(name: str, known: Mapping[str, _Known]) -> _Known | None:
    """What is known by a package value's name, less what coremltools appended (`_cast_fp16`)."""
    while name not in known:
        shorter = _APPENDED.sub("", name)
        if shorter == name:
            return None
        name = shorter
    return known[name]


_APPENDED = re.compile(r"(_cast|_to)?_fp\d+$")


def _holds(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a package's constant is that weight, in its shape or with axes of 1 more or fewer."""
    if stored.numel() != expected.numel():
        return False
    cast = expected.to(stored.dtype).reshape(stored.shape)
    # Tiny numbers may be rounded otherwise, see `lowering.template.rounded`.
    return torch.equal(stored, cast) or torch.allclose(stored.float(), cast.float(), atol=1e-7)


def _refuse_nan(outputs: Tensors, chunk: Function) -> None:
    bad = [name for name, value in outputs.items() if bool(value.isnan().any())]
    if bad:
        raise VerificationError(
            f"PyTorch itself gives NaN in '{bad[0]}' of function '{chunk.name}'",
            "The model's weights or example inputs are at fault; nothing can be compared with NaN.",
        )
