"""The lowering stage's entry: chunks of a component's functions become packages.

Each chunk is one package, whose functions are the chunk's part of every function of the component.
Chunks of equal structure are converted once. What the chunks are is the planner's business, what
becomes of the packages the bundle's.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import WeightStore
from odsora_compiler.lowering.compressed import compress
from odsora_compiler.lowering.convert import convert
from odsora_compiler.lowering.interface import Interface, Names, Precision, interface_of
from odsora_compiler.lowering.legalize import LegalWeights, legalize
from odsora_compiler.lowering.link import Part, write_package
from odsora_compiler.lowering.precision import exact_boundaries
from odsora_compiler.lowering.rules import DEFAULT_RULES, HALF_RULES
from odsora_compiler.lowering.template import (
    NoTemplateError,
    Template,
    make_template,
    structure_key,
)
from odsora_compiler.rewrite.rules import Rule


@dataclass(frozen=True)
class LoweringSettings:
    """How to lower. `half_rules` are applied after `rules` where the precision is "fp16"."""

    precision: Precision = "fp16"
    rules: Sequence[Rule] = DEFAULT_RULES
    half_rules: Sequence[Rule] = HALF_RULES

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The legalization rules for this precision."""
        return (*self.rules, *(self.half_rules if self.precision == "fp16" else ()))


@dataclass(frozen=True)
class ChunkSource:
    """A chunk to lower. `name` becomes the package's file name.

    `functions`: function name → the chunk's part of it, as `ir.chunks.split` gives it; the first
    is the package's default. `half_io`: inputs and outputs that may be float16 in a "fp16" package
    (values handed from chunk to chunk); the others are float32.
    """

    name: str
    functions: dict[str, Function]
    half_io: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FunctionReport:
    """How one function of a package came about.

    `interface`: names, dtypes and shapes of the Core ML features, named as in the chunk's function.
    `template`: the conversion it shares with functions of equal structure ("" where it was
    converted in full, for the `reason` given). `operators`: the stem of an operation's name in the
    package (`op12_linear`) → the node it comes from; one that makes an output bears the output's
    name. `legal`: the legalized function, whose weights are `weights`.
    """

    interface: Interface
    template: str
    reason: str
    operators: dict[str, str]
    legal: Function
    weights: LegalWeights


@dataclass(frozen=True)
class PackageReport:
    """A package that was written. `dense`: compressed weights that had to be written dense."""

    name: str
    path: Path
    weight_bytes: int
    seconds: float
    functions: dict[str, FunctionReport]
    dense: tuple[str, ...] = ()


def lower_chunks(
    chunks: Sequence[ChunkSource],
    weights: WeightStore,
    folder: Path,
    settings: LoweringSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[PackageReport]:
    """Write `folder`/NAME.mlpackage for every chunk, given in the order in which they run.

    Weights are read one at a time; a chunk whose structure occurs once is held as a whole. Raises
    `LoweringError` naming function and node where something cannot be lowered.
    """
    settings = settings or LoweringSettings()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    parts = legal_parts(chunks, weights, settings)
    occurrences = Counter(legal.key for legal in parts.values())
    lowering = _Lowering(folder, settings, occurrences)
    reports: list[PackageReport] = []

    def finish(pending: Future[PackageReport]) -> None:
        reports.append(pending.result())
        progress(_line(reports[-1]))

    # Converting is Python's work, casting and writing weights is not: the two overlap. One package
    # is written while the next is converted, so that no more than that is held.
    with ThreadPoolExecutor(1, "write") as writer:
        pending: Future[PackageReport] | None = None
        for chunk in chunks:
            scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".lower-")
            try:
                made = {
                    name: lowering.function(parts[chunk.name, name], Path(scratch.name) / name)
                    for name in chunk.functions
                }
                if pending is not None:
                    finish(pending)
            except BaseException:
                scratch.cleanup()
                raise
            path = folder / f"{chunk.name}.mlpackage"
            pending = writer.submit(_write, path, made, scratch, start)
            start = time.perf_counter()
        if pending is not None:
            finish(pending)
    return reports


def _write(
    path: Path,
    made: Mapping[str, _Made],
    scratch: tempfile.TemporaryDirectory[str],
    start: float,
) -> PackageReport:
    """Link the functions into the package; `scratch` holds full conversions until then."""
    with scratch:
        parts = [result.part for result in made.values()]
        size = write_package(path, parts, default=parts[0].name)
    dense = sorted({name for result in made.values() for name in result.dense})
    functions = {name: result.report for name, result in made.items()}
    seconds = time.perf_counter() - start
    return PackageReport(path.stem, path, size, seconds, functions, tuple(dense))


@dataclass(frozen=True)
class LegalPart:
    """One function of one chunk, legalized: ready to be converted.

    `half_io`: inputs and outputs that are float16; `exact`: values that must not be rounded.
    """

    name: str
    chunk: str
    function: Function
    weights: LegalWeights
    precision: Precision
    half_io: frozenset[str]
    exact: frozenset[str]

    @cached_property
    def key(self) -> str:
        """Equal for parts of equal structure."""
        return structure_key(self.function, self.weights, self.precision, self.half_io, self.exact)

    @property
    def compressed(self) -> list[str]:
        """Weights that have a look-up table."""
        names = self.function.weight_names()
        return [name for name in names if self.weights.encoding(name) is not None]

    def report(self, template: str = "", reason: str = "") -> FunctionReport:
        """How it came about, by conversion or by a template."""
        interface = interface_of(self.function, self.precision, self.half_io)
        operators = Names.operators(self.function)
        return FunctionReport(interface, template, reason, operators, self.function, self.weights)


def legal_parts(
    chunks: Sequence[ChunkSource], weights: WeightStore, settings: LoweringSettings
) -> dict[tuple[str, str], LegalPart]:
    """Names of chunk and function → that function of the chunk, legalized.

    Raises `LoweringError` naming the node where something would be lost.
    """
    exact = frozenset(_exact_boundaries(chunks))
    parts = {}
    for chunk in chunks:
        for name, function in chunk.functions.items():
            legal, own = legalize(function, weights, settings.all_rules)
            parts[chunk.name, name] = LegalPart(
                name, chunk.name, legal, own, settings.precision, chunk.half_io - exact, exact
            )
    return parts


@dataclass(frozen=True)
class _Made:
    part: Part
    report: FunctionReport
    dense: set[str] = field(default_factory=set)


def _exact_boundaries(chunks: Sequence[ChunkSource]) -> set[str]:
    names = dict.fromkeys(name for chunk in chunks for name in chunk.functions)
    return {
        value
        for name in names
        for value in exact_boundaries(
            [chunk.functions[name] for chunk in chunks if name in chunk.functions]
        )
    }


class _Lowering:
    """Converts functions, each structure that occurs more than once by a template."""

    def __init__(self, folder: Path, settings: LoweringSettings, occurrences: Counter[str]) -> None:
        self._folder = folder
        self._precision = settings.precision
        self._occurrences = occurrences
        self._in_range: set[str] = set()
        self._templates: dict[str, tuple[Template | None, str, str]] = {}

    def function(self, legal: LegalPart, scratch: Path) -> _Made:
        reason = "its structure occurs once"
        if self._occurrences[legal.key] > 1 or legal.compressed:
            template, title, reason = self._template(legal)
            if template is not None:
                try:
                    return self._from_template(legal, template, title)
                except NoTemplateError as error:
                    reason = str(error)
        converted = convert(
            legal.function, legal.weights, scratch, self._precision, legal.half_io, legal.exact
        )
        Names(legal.function).restore(converted.specification)
        part = Part.of_file(legal.name, converted.specification, converted.weights)
        return _Made(part, legal.report(reason=reason), set(legal.compressed))

    def _template(self, legal: LegalPart) -> tuple[Template | None, str, str]:
        if legal.key not in self._templates:
            title = f"{legal.chunk}/{legal.name}"
            try:
                template = make_template(
                    legal.function,
                    legal.weights,
                    self._folder,
                    self._precision,
                    legal.half_io,
                    legal.exact,
                )
                self._templates[legal.key] = (template, title, "")
            except NoTemplateError as error:
                self._templates[legal.key] = (None, title, str(error))
        return self._templates[legal.key]

    def _from_template(self, legal: LegalPart, template: Template, title: str) -> _Made:
        part = template.part(legal.name, legal.function, legal.weights, self._in_range)
        whole = template.whole_weights(legal.function)
        part, done = compress(part, whole, legal.weights)
        return _Made(part, legal.report(template=title), set(legal.compressed) - done)


def _line(report: PackageReport) -> str:
    how = ", ".join(
        f"{name} {'like ' + item.template if item.template else 'converted'}"
        for name, item in report.functions.items()
    )
    return f"{report.name}: {report.weight_bytes / 1e6:.1f} MB, {how}, {report.seconds:.1f} s"
