"""Holding lowered packages to the PyTorch program they were made from, by executing them.

Weights are read back from every package and compared with the store: one wrong number may change
an output less than half precision does. Every chunk whose structure has not run yet is executed on
the inputs the reference gives it and compared with what PyTorch computes there. Where a run of the
whole function is affordable, all chunks are executed, chained as a device would chain them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from odsora_compiler.analysis.cost import function_flops
from odsora_compiler.driver.watching import (
    Operands,
    Sample,
    Watch,
    alike_where_masked,
    find_by_name,
)
from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.drift import Drift, measure_drift
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.manifest import Feature
from odsora_compiler.lowering.bundle import LoweredComponent
from odsora_compiler.lowering.chunks import FunctionReport, PackageReport
from odsora_compiler.lowering.interface import Names
from odsora_compiler.lowering.rules import HALF_MASK, HALF_MAX
from odsora_compiler.lowering.template import is_free
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import BlobReference, Package
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Runner, as_feature

Tensors = Mapping[str, torch.Tensor]

FP32_MAXIMUM = 1e-4  # largest error, of the output's largest value
FP16_COSINE = 0.9995
# A cosine says nothing about size, and nothing at all where an output is one number. Results with
# that cosine are 0.03 apart when their sizes are equal.
FP16_RELATIVE = 0.05


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
        samples: dict[str, Sample] = {}

        def observe(node: fx.Node, value: torch.Tensor) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                samples[node.name] = Sample.of(value)

        expected = evaluate(chunk, self._component.weights, inputs, observe)
        _refuse_nan(expected, chunk)
        operators = report.functions[self._function].operators
        watch = Watch(chunk, operators, samples, self._precision)
        entry = self._bundle.component(self._component.name).function(self._function)
        (call,) = [call for call in entry.chunks if call.package == package]
        given = {item.name: _as_handed_on(inputs[item.name], item) for item in call.inputs}
        interpreter = Interpreter(self._package(package), self._function)
        found = interpreter.run(given, watch)
        if watch.suspects and self._precision == "fp32":
            again = Operands(watch)
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
        unnamed: dict[str, BlobReference] = {}
        for value, blob in package.function(self._function).blob_references():
            name = find_by_name(value, names)
            if name is None or item.weights.spec(name).shape != blob.shape:
                unnamed[value] = blob
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
        return self._unnamed_agree(structure, item, told, package, unnamed)

    def _unnamed_agree(
        self,
        structure: str,
        item: FunctionReport,
        told: set[str],
        package: Package,
        unnamed: Mapping[str, BlobReference],
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
            candidates = [
                value
                for value, blob in unnamed.items()
                if math.prod(blob.shape) == expected.numel()
                and _holds(package.tensor(blob), expected)
            ]
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
            pairs = {name: alike_where_masked(found[name], expected[name]) for name in expected}
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


def _as_handed_on(value: torch.Tensor, feature: Feature) -> torch.Tensor:
    """What the chunk before would hand on where the reference has `value`.

    In half precision a mask's minus infinity is smaller, see the rule "half-mask".
    """
    if feature.torch_dtype is torch.float16:
        value = value.masked_fill(value < -HALF_MAX, -HALF_MASK)
    return as_feature(value, feature)


def _holds(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a package's constant is that weight, in its shape or with axes of 1 more or fewer."""
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
