"""What lowering will make of a component, without converting anything.

Order, interfaces, FLOPs and activations of the chunks are those that the manifest will have. Sizes
of packages are estimates: of weights to the few constants that conversion adds or finds equal, of
the specification, which is kilobytes, by its operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from odsora_compiler.analysis.cost import FLOAT_BYTES, weight_bytes
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.manifest import ComponentEntry
from odsora_compiler.ir.program import Component
from odsora_compiler.lowering.bundle import LoweredComponent, chunk_sources, component_entry
from odsora_compiler.lowering.chunks import (
    LegalPart,
    LoweringSettings,
    PackageReport,
    legal_parts,
)
from odsora_compiler.lowering.template import INLINE_ELEMENTS
from odsora_compiler.mil.blobs import ALIGNMENT

aten = torch.ops.aten

# What a specification takes, in bytes, fitted to those of the examples: good to a tenth, mostly.
# A convolution has its strides, padding and dilation as constants besides.
_FUNCTION_BYTES, _CONVOLUTION_BYTES = 640, 1400
_OPERATOR_BYTES = {"fp16": 250, "fp32": 215}
# Weights in memory are said to be more than estimated by this part and so many bytes, so that what
# fits by the forecast fits.
_SPARE_PART, _SPARE_BYTES = 1000, 1024


@dataclass(frozen=True)
class Forecast:
    """`entry`: the component in the manifest of a bundle, as its plan cuts it. `legal`: function →
    its chunks as they would be converted."""

    entry: ComponentEntry
    legal: Mapping[str, tuple[Function, ...]]


WEIGHTS, TEXT = "weights", "specification"  # the files of a package


def forecast(component: Component, settings: LoweringSettings) -> Forecast:
    """What lowering will make of `component`, as its plan cuts it.

    Takes about a second for ten thousand operators. Raises `LoweringError` where lowering would
    refuse the component.
    """
    functions, sources = chunk_sources(component)
    parts = legal_parts(sources, component.weights, settings)
    reports = []
    files = {}
    for source in sources:
        legal = [parts[source.name, name] for name in source.functions]
        size = _weights_file(legal)
        files[source.name] = {
            WEIGHTS: (size, ""),
            TEXT: (sum(map(_specification_bytes, legal)), ""),
        }
        spare = size // _SPARE_PART + _SPARE_BYTES
        made = {part.name: part.report() for part in legal}
        path = Path(f"{source.name}.mlpackage")
        reports.append(PackageReport(source.name, path, size + spare, 0.0, made))
    lowered = LoweredComponent(component, functions, tuple(reports))
    chunks = {
        name: tuple(parts[source.name, name].function for source in sources) for name in functions
    }
    return Forecast(component_entry(lowered, files, settings.precision), chunks)


def _weights_file(parts: Iterable[LegalPart]) -> int:
    """Bytes of a package's weights: of all its functions, each once."""
    sizes: dict[tuple[str, int], int] = {}
    for part in parts:
        for name in part.function.weight_names():
            spec = part.weights.spec(name)
            if spec.elements >= INLINE_ELEMENTS:
                size = weight_bytes(part.weights, name, part.precision)
                if not spec.dtype.is_floating_point:
                    size = min(size, spec.elements * _INTEGER_BYTES)
                sizes[name, spec.elements] = size
        for elements in _broadcast(part.function.operators()):
            sizes["", elements] = elements * FLOAT_BYTES[part.precision]
    return ALIGNMENT + sum(ALIGNMENT + _aligned(size) for size in sizes.values())


_INTEGER_BYTES = 4  # Core ML has no integers of 64 bits.


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _broadcast(nodes: Iterable[fx.Node]) -> Iterable[int]:
    """Elements of constants that coremltools makes as large as the result of a `where`."""
    for node in nodes:
        if node.target is aten.where.self:
            elements = node.meta["val"].numel()
            constants = (used for used in node.all_input_nodes if used.op == "get_attr")
            if any(used.meta["val"].numel() < elements for used in constants):
                yield elements


def _specification_bytes(part: LegalPart) -> int:
    operators = list(part.function.operators())
    convolutions = sum(node.target in _CONVOLUTIONS for node in operators)
    size = _FUNCTION_BYTES + len(operators) * _OPERATOR_BYTES[part.precision]
    return size + convolutions * _CONVOLUTION_BYTES


_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.convolution.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
