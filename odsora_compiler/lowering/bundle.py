"""Writing a bundle: every component's chunks as packages, and the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from odsora_compiler.analysis.cost import function_flops
from odsora_compiler.analysis.footprint import activation_bytes
from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.chunks import ChunkedFunction, split
from odsora_compiler.ir.function import TensorSpec, dtype_name
from odsora_compiler.ir.host_program import HostProgram
from odsora_compiler.ir.manifest import (
    CONSTANTS_NAME,
    EXAMPLES_NAME,
    TOKENIZER_NAME,
    ChunkCall,
    ComponentEntry,
    Feature,
    FunctionEntry,
    Manifest,
    PackageEntry,
)
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.lowering.chunks import (
    ChunkSource,
    LoweringSettings,
    PackageReport,
    lower_chunks,
)


@dataclass(frozen=True)
class LoweredComponent:
    """What lowering a component gave: functions as cut, a report per package, in order."""

    component: Component
    functions: dict[str, ChunkedFunction]
    reports: tuple[PackageReport, ...]


def write_bundle(
    program: Program,
    folder: Path,
    settings: LoweringSettings,
    target: str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, LoweredComponent]:
    """Lower `program` into the empty `folder`; returns what became of each component.

    Raises `LoweringError` when a chunk cannot be converted, OSError when the disk is full.
    """
    lowered: dict[str, LoweredComponent] = {}
    entries: dict[str, ComponentEntry] = {}
    for name, component in program.components.items():
        lowered[name] = _lower_component(component, folder, settings, progress)
        files = {
            report.name: _files(folder / "packages" / f"{report.name}.mlpackage")
            for report in lowered[name].reports
        }
        entries[name] = component_entry(lowered[name], files, settings.precision)
    manifest = Manifest(
        program.name,
        ",".join(program.history),
        settings.precision,
        target,
        {
            package: metadata.version(package)
            for package in ("odsora-compiler", "torch", "coremltools")
        },
        entries,
        HostProgram.of(program.host).to_data(),
        {
            name: asdict(component.plan)
            for name, component in program.components.items()
            if component.plan is not None
        },
        _without_tokenizer(program.text_to_video, folder),
    )
    manifest.save(folder)
    _write_tensors(program.constants, folder / CONSTANTS_NAME)
    return lowered


def chunk_sources(
    component: Component,
) -> tuple[dict[str, ChunkedFunction], list[ChunkSource]]:
    """The component's functions as its plan cuts them, and the chunks to lower, in order."""
    functions = {name: split(whole, component) for name, whole in component.functions.items()}
    crossing = frozenset(
        spec.name
        for chunked in functions.values()
        for spec in _crossing(chunked)
        if spec.dtype == torch.float32
    )
    count = len(next(iter(functions.values())).chunks)
    digits = max(2, len(str(count - 1)))
    return functions, [
        ChunkSource(
            f"{component.name}-{index:0{digits}d}",
            {name: chunked.chunks[index] for name, chunked in functions.items()},
            half_io=crossing,
        )
        for index in range(count)
    ]


def component_entry(
    lowered: LoweredComponent, files: Mapping[str, Mapping[str, tuple[int, str]]], precision: str
) -> ComponentEntry:
    """What the manifest says of a component. `files`: of every package, path → bytes, SHA-256."""
    functions = {}
    for name, chunked in lowered.functions.items():
        calls = tuple(_call(report, name, precision) for report in lowered.reports)
        functions[name] = FunctionEntry(
            tuple(map(Feature.of, chunked.whole.inputs)),
            tuple(map(Feature.of, chunked.whole.outputs)),
            calls,
            chunked.outputs,
        )
    packages = {
        report.name: PackageEntry(
            f"packages/{report.name}.mlpackage",
            tuple(lowered.functions),
            report.weight_bytes,
            _structure(report),
            _conversion(report),
            files[report.name],
        )
        for report in lowered.reports
    }
    return ComponentEntry(functions, packages, lowered.component.compute_units)


def write_examples(
    folder: Path, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> None:
    """Put example inputs, and the outputs PyTorch gave on them, into the bundle."""
    tensors = {f"in.{name}": value for name, value in inputs.items()}
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    _write_tensors(tensors, folder / EXAMPLES_NAME)


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # Copied, because two inputs may be one tensor, which the format does not hold.
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    path.chmod(0o644)


def _without_tokenizer(roles: TextToVideo | None, folder: Path) -> TextToVideo | None:
    """`roles` for the manifest; the tokenizer becomes a file of its own."""
    if roles is None:
        return None
    (folder / TOKENIZER_NAME).write_text(roles.tokenizer, encoding="utf-8")
    return replace(roles, tokenizer="")


def _lower_component(
    component: Component,
    folder: Path,
    settings: LoweringSettings,
    progress: Callable[[str], None],
) -> LoweredComponent:
    functions, sources = chunk_sources(component)
    target = folder / "packages"
    target.mkdir(exist_ok=True)
    reports = lower_chunks(sources, component.weights, target, settings, progress)
    _check_budget(component, reports)
    return LoweredComponent(component, functions, tuple(reports))


def _check_budget(component: Component, reports: Sequence[PackageReport]) -> None:
    """Refuse a package that holds more than the plan allows; small constants are not planned."""
    if component.plan is None:
        return
    allowed = component.plan.budget + max(component.plan.budget // 100, _UNPLANNED_BYTES)
    for report in reports:
        if report.weight_bytes > allowed:
            dense = ", ".join(report.dense)
            raise LoweringError(
                f"chunk {report.name} holds {report.weight_bytes} bytes of weights, over the "
                f"budget of {component.plan.budget}",
                f"These could not be written compressed: {dense}." if dense else "This is a bug.",
            )


_UNPLANNED_BYTES = 64 * 1024


def _crossing(chunked: ChunkedFunction) -> list[TensorSpec]:
    """Values that pass between chunks and are neither inputs nor outputs of the whole."""
    outside = {spec.name for spec in chunked.whole.inputs} | set(chunked.outputs.values())
    return [spec for chunk in chunked.chunks for spec in chunk.outputs if spec.name not in outside]


def _call(report: PackageReport, function: str, precision: str) -> ChunkCall:
    made = report.functions[function]
    inputs, outputs = (
        tuple(Feature(item.name, dtype_name(item.dtype), item.shape) for item in side)
        for side in (made.interface.inputs, made.interface.outputs)
    )
    return ChunkCall(
        report.name,
        inputs,
        outputs,
        function_flops(made.legal),
        activation_bytes(made.legal, precision),
    )


def _structure(report: PackageReport) -> str:
    """Equal for packages that differ only in their weights."""
    return "; ".join(
        f"{name}: {item.template or report.name}" for name, item in report.functions.items()
    )


def _conversion(report: PackageReport) -> str:
    """In words: what the functions were converted from."""
    texts: dict[str, str] = {}
    for name, item in report.functions.items():
        source = item.template.partition("/")[0]
        if not source:
            texts[name] = f"own: {item.reason}"
        else:
            texts[name] = "first of its kind" if source == report.name else f"like {source}"
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def _files(package: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for file in sorted(path for path in package.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[file.relative_to(package).as_posix()] = (file.stat().st_size, digest)
    return found
