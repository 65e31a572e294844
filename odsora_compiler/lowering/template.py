"""Converting one of several functions of equal structure, and writing the others' weights into it.

A template is made by converting with random weights. A constant that equals a weight is that
weight; one that equals a literal of the function belongs to the template. Where there are others, a
second conversion with other weights tells: those that stayed the same belong to the template, and
those that changed depend on the weights in a way that is not understood, so there is no template.
Real weights would not do: coremltools folds and merges special values such as ones.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import LookupTable, WeightSpec, WeightStore
from odsora_compiler.lowering.convert import Conversion, convert
from odsora_compiler.lowering.interface import Message, Names, Precision, interface_of
from odsora_compiler.lowering.legalize import LegalWeights
from odsora_compiler.lowering.link import Blob, Part
from odsora_compiler.mil.blobs import BlobFile, BlobType

# Constants of fewer elements stand in the specification.
INLINE_ELEMENTS = 10


class NoTemplateError(Exception):
    """A function has to be converted in full; the text is the reason."""


def structure_key(
    function: Function,
    weights: LegalWeights,
    precision: Precision,
    half_io: Collection[str] = (),
    exact_outputs: Collection[str] = (),
) -> str:
    """A digest equal for legalized functions that differ only in names and in weights' values.

    Constants that no parameter goes into, and integers, are part of the structure.
    """
    digest = hashlib.sha256()
    numbers: dict[fx.Node, int] = {}
    known: dict[str, int] = {}

    def reference(node: fx.Node) -> str:
        return f"%{numbers[node]}"

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    for node in function.graph.nodes:
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), reference)
        if node.op == "get_attr":
            name = str(node.target)
            number = known.setdefault(name, len(known))
            add("weight", number, weights.spec(name))
            if not is_free(weights, name):
                digest.update(_bytes_of(weights.load(name)))
        else:
            target = "" if node.op in ("placeholder", "output") else str(node.target)
            add(node.op, target, arguments, _described(node.meta.get("val")))
        numbers[node] = len(numbers)
    interface = interface_of(function, precision, half_io)
    add(precision, [(item.dtype, item.shape) for item in (*interface.inputs, *interface.outputs)])
    add([index for index, out in enumerate(function.outputs) if out.name in exact_outputs])
    return digest.hexdigest()


def is_free(weights: LegalWeights, name: str) -> bool:
    """Whether a weight may differ between functions of equal structure."""
    return weights.spec(name).dtype.is_floating_point and not weights.is_literal(name)


@dataclass(frozen=True)
class _Constant:
    """A blob that is the same whatever the weights are."""

    dtype: BlobType
    data: bytes


@dataclass(frozen=True)
class _Weight:
    """A blob that is a weight, as it is or transposed."""

    dtype: BlobType
    index: int
    transposed: bool = False


@dataclass(frozen=True)
class Template:
    """A converted function whose weights can be exchanged.

    `specification` has made-up names; `blobs` says what the offsets in it mean.
    """

    specification: bytes
    blobs: Mapping[int, _Constant | _Weight]

    def part(
        self, name: str, function: Function, weights: LegalWeights, in_range: set[str]
    ) -> Part:
        """The function `name` of a package, with the names and weights of `function`.

        `in_range`: weights known to fit half precision; those found to are added. Raises
        `NoTemplateError` where a weight does not fit.
        """
        from coremltools.proto import Model_pb2

        specification = Model_pb2.Model.FromString(self.specification)
        names = function.weight_names()
        halves = {names[blob.index] for blob in self._weights() if blob.dtype is BlobType.FLOAT16}
        _check_ranges(weights, halves - in_range)
        # Folded constants are a function's own; the others are the same in the next function.
        in_range.update(name for name in halves if not weights.is_folded(name))
        Names(function).restore(specification)
        blobs: dict[int, Blob] = {}
        for offset, blob in self.blobs.items():
            if isinstance(blob, _Constant):
                blobs[offset] = Blob(blob.dtype, blob.data, _reader(blob.data))
            else:
                weight = names[blob.index]
                key = ("weight", weight, blob.transposed, blob.dtype)
                blobs[offset] = Blob(blob.dtype, key, _loader(weights, weight, blob))
        return Part(name, specification, blobs)

    def whole_weights(self, function: Function) -> dict[int, str]:
        """Offset → the weight that stands there as it is, not transposed."""
        names = function.weight_names()
        return {
            offset: names[blob.index]
            for offset, blob in self.blobs.items()
            if isinstance(blob, _Weight) and not blob.transposed
        }

    def _weights(self) -> Iterable[_Weight]:
        return (blob for blob in self.blobs.values() if isinstance(blob, _Weight))


def make_template(
    function: Function,
    weights: LegalWeights,
    folder: Path,
    precision: Precision,
    half_io: Collection[str] = (),
    exact_outputs: Collection[str] = (),
) -> Template:
    """The template of the legalized `function`; `folder` holds the conversions meanwhile.

    Raises `NoTemplateError` with the reason where there is none, and `LoweringError` where
    coremltools cannot convert the function.
    """
    for name in function.weight_names():
        if is_free(weights, name) and weights.spec(name).elements < INLINE_ELEMENTS:
            raise NoTemplateError(
                f"weight '{name}' has {weights.spec(name).elements} elements: constants of fewer "
                f"than {INLINE_ELEMENTS} stand in the specification"
            )
    template: Template | None = None
    for seed in (0, 1):
        probes = _ProbeWeights(weights, function.weight_names(), seed)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as place:
            converted = convert(function, probes, Path(place), precision, half_io, exact_outputs)
            specification = converted.specification.SerializeToString(deterministic=True)
            if template is None:
                template = Template(specification, _matched(converted, probes))
                if _only_literals(template, function, weights):
                    return template
            elif specification != template.specification:
                raise NoTemplateError("the specification depends on the values of the weights")
            else:
                _confirm(converted, probes, template)
    assert template is not None
    return template


class _ProbeWeights:
    """Random values in place of a function's free weights, no two of them alike.

    Values lie between 0.4 and 1.8: they fit half precision, and roots and logarithms exist. All are
    cut from one pool and scaled each by a factor of its own: the first few are cheap to have.
    """

    def __init__(self, weights: LegalWeights, names: list[str], seed: int) -> None:
        self._weights = weights
        self._names = names
        self.free = {name: index for index, name in enumerate(names) if is_free(weights, name)}
        largest = max((weights.spec(name).elements for name in self.free), default=0)
        random = torch.Generator().manual_seed(seed)
        self._pool = torch.rand(largest + _OFFSETS, generator=random).add_(0.5)
        self._factor = torch.rand(len(names), generator=random).mul_(0.4).add_(0.8).tolist()

    def names(self) -> Iterable[str]:
        return self._weights.names()

    def spec(self, name: str) -> WeightSpec:
        return self._weights.spec(name)

    def load(self, name: str) -> torch.Tensor:
        if name not in self.free:
            return self._weights.load(name)
        spec = self.spec(name)
        return self.head(self.free[name], spec.elements).view(spec.shape)

    def encoding(self, name: str) -> LookupTable | None:
        return None

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of the weight of that number."""
        return self.spec(self._names[index]).shape

    def head(self, index: int, count: int) -> torch.Tensor:
        """The first `count` elements, in row-major order, of the free weight of that number."""
        offset = 61 * index % _OFFSETS
        return self._pool[offset : offset + count] * self._factor[index]


_OFFSETS = 4096


def _matched(converted: Conversion, probes: _ProbeWeights) -> dict[int, _Constant | _Weight]:
    """What the blobs of a conversion are."""
    if not converted.weights.exists():
        return {}
    file = BlobFile(converted.weights)
    shapes = _shapes(converted.specification)
    by_size: dict[int, list[int]] = {}
    for name, index in probes.free.items():
        by_size.setdefault(probes.spec(name).elements, []).append(index)
    blobs: dict[int, _Constant | _Weight] = {}
    for entry in file.entries():
        offset = entry.metadata_offset
        data = file.tensor(offset, shapes[offset])
        blobs[offset] = _find(entry.dtype, data, probes, by_size) or _Constant(
            entry.dtype, bytes(file.raw(offset))
        )
    return blobs


def _only_literals(template: Template, function: Function, weights: LegalWeights) -> bool:
    """Whether every constant of the template is one of the function, weights aside."""
    literals = set()
    for name in function.weight_names():
        if not is_free(weights, name):
            tensor = weights.load(name)
            literals.add(bytes(_bytes_of(tensor)))
            if tensor.is_floating_point():
                literals |= {bytes(_bytes_of(rounded(tensor))), bytes(_bytes_of(tensor.float()))}
            else:
                literals.add(bytes(_bytes_of(tensor.to(torch.int32))))
    return all(
        blob.data in literals for blob in template.blobs.values() if isinstance(blob, _Constant)
    )


def _find(
    dtype: BlobType, data: torch.Tensor, probes: _ProbeWeights, by_size: Mapping[int, list[int]]
) -> _Weight | None:
    """The weight a blob is, by its values."""
    if dtype not in (BlobType.FLOAT16, BlobType.FLOAT32):
        return None
    for index in by_size.get(data.numel(), ()):
        for way in (_Weight(dtype, index), _Weight(dtype, index, transposed=True)):
            if _is(data, way, probes):
                return way
    return None


def _is(data: torch.Tensor, way: _Weight, probes: _ProbeWeights) -> bool:
    """Whether a blob's elements are those of a weight; the first few decide mostly."""
    shape = probes.shape(way.index)
    if way.transposed:
        if len(shape) != 2:
            return False
        data = data.reshape(shape[1], shape[0]).t()
    first = data.reshape(-1)[:_HEAD] if not way.transposed else data[0, :_HEAD]
    if not torch.equal(first, probes.head(way.index, len(first)).to(data.dtype)):
        return False
    whole = probes.head(way.index, data.numel()).view(shape).to(data.dtype)
    return torch.equal(data.reshape(shape), whole)


_HEAD = 64


def _confirm(converted: Conversion, probes: _ProbeWeights, template: Template) -> None:
    """Check what the first probe taught on the second; raises `NoTemplateError`."""
    if not converted.weights.exists():
        return
    file = BlobFile(converted.weights)
    shapes = _shapes(converted.specification)
    for entry in file.entries():
        offset = entry.metadata_offset
        blob = template.blobs[offset]
        if isinstance(blob, _Constant):
            same = bytes(file.raw(offset)) == blob.data
        else:
            same = _is(file.tensor(offset, shapes[offset]), blob, probes)
        if not same:
            raise NoTemplateError(
                f"constant '{_holder(converted.specification, offset)}' is computed from weights"
            )


def _shapes(specification: Message) -> dict[int, tuple[int, ...]]:
    """Offset of a blob → the shape of the value that it holds."""
    shapes: dict[int, tuple[int, ...]] = {}
    for value in _values(specification):
        dimensions = value.type.tensorType.dimensions
        shapes[value.blobFileValue.offset] = tuple(d.constant.size for d in dimensions)
    return shapes


def _values(specification: Message) -> Iterable[Message]:
    for function in specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                for value in operation.attributes.values():
                    if value.WhichOneof("value") == "blobFileValue":
                        yield value


def _holder(specification: Message, offset: int) -> str:
    for function in specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                value = operation.attributes["val"] if operation.type == "const" else None
                if value is not None and value.blobFileValue.offset == offset:
                    return str(operation.outputs[0].name)
    return f"at {offset}"


# ------------------------------------------------------------------ real weights


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in half precision as coremltools rounds it.

    In tensors of fewer than 400 elements it keeps tiny numbers from becoming zero.
    """
    half = tensor.to(torch.float16)
    if tensor.numel() < _LIFTED_BELOW:
        exact = tensor.float()
        tiny = (half.abs() <= _SMALLEST) & (exact.abs() > _SMALLEST_SINGLE)
        half = torch.where(tiny, torch.copysign(torch.tensor(_SMALLEST), exact).half(), half)
    return half


_LIFTED_BELOW = 400
# The smallest numbers above zero, in half and single precision.
_SMALLEST = 2.0**-24
_SMALLEST_SINGLE = 2.0**-149


def _loader(weights: WeightStore, name: str, blob: _Weight) -> Any:
    def load() -> torch.Tensor:
        tensor = weights.load(name)
        tensor = rounded(tensor) if blob.dtype is BlobType.FLOAT16 else tensor.float()
        return tensor.t().contiguous() if blob.transposed else tensor

    return load


def _reader(data: bytes) -> Any:
    return lambda: memoryview(data)


def _check_ranges(weights: WeightStore, names: Iterable[str]) -> None:
    for name in sorted(names):
        tensor = weights.load(name)
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        if low < -65504 or high > 65504:
            raise NoTemplateError(f"weight '{name}' has values beyond half precision's range")


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype))
    return [_described(item) for item in value] if isinstance(value, (list, tuple)) else None
