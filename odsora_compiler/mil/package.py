"""Reading a saved Core ML package (.mlpackage) straight from its protobuf, with no Core ML at hand.

A package is a folder with a Manifest.json, a specification (model.mlmodel) and a weights file. This
module turns the specification into a few plain classes; weights stay on disk until a tensor is
asked for. What the operations compute is left to `interpreter`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch

from odsora_compiler.errors import PackageError, nearest
from odsora_compiler.mil.blobs import BlobFile, BlobType, unpack
from odsora_compiler.mil.dtypes import TORCH_DTYPE, mil_dtype
from odsora_compiler.mil.memory import converted
from odsora_compiler.mil.schema import parse_model

# Generated protobuf classes carry no types.
Message: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class TensorType:
    """A named value: its MIL element type ("fp16", "int32", "string", …) and its shape.

    A dimension that the package leaves open is None.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type that holds it; a KeyError for "string"."""
        return TORCH_DTYPE[self.dtype]


@dataclass(frozen=True, slots=True)
class Literal:
    """A value written into the specification: a scalar, string or tensor, or a list of literals."""

    dtype: str
    shape: tuple[int, ...]
    data: Any  # bytes as stored, or a sequence of Python values in row-major order

    def python(self) -> Any:
        """A Python scalar, or nested lists; strings and booleans too."""
        if self.dtype == "list":
            return [item.python() for item in self.data]
        if self.dtype == "string":
            return self.data[0] if not self.shape else list(self.data)
        return self.tensor().tolist()

    def tensor(self) -> torch.Tensor:
        """The value as a tensor; TypeError for strings and lists."""
        if self.dtype not in TORCH_DTYPE:
            raise TypeError(f"a {self.dtype} is no tensor")
        dtype, count = TORCH_DTYPE[self.dtype], prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=dtype)
        if not isinstance(self.data, bytes):
            return torch.tensor(list(self.data), dtype=dtype).reshape(self.shape)
        packed = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        blob = _BLOB_TYPES[self.dtype]
        flat = unpack(packed, blob, count) if blob.packed else packed.view(blob.torch_dtype)
        return flat.to(dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class BlobReference:
    """A value kept in a weights file: the file's name in the package and its metadata's offset."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


Value: TypeAlias = Literal | BlobReference


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. An argument is the name of another value (str) or a value of its own."""

    type: str
    inputs: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[TensorType, ...]
    attributes: Mapping[str, Value]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Operations in the order they run; `outputs` names the values that leave the block."""

    inputs: tuple[TensorType, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


class Function:
    """One function of a package; its operations are parsed when first asked for."""

    def __init__(self, name: str, message: Message, package: Path) -> None:
        self.name = name
        self.opset: str = message.opset
        self._message = message
        self._package = package

    @cached_property
    def inputs(self) -> tuple[TensorType, ...]:
        """Inputs in the order of the specification. Raises PackageError for stateful models."""
        for item in self._message.inputs:
            if item.type.WhichOneof("type") == "stateType":
                raise PackageError(
                    f"function {self.name} of package {self._package} keeps state in {item.name}",
                    "Stateful packages cannot be interpreted; make the state an input and output.",
                )
        return tuple(map(_tensor_type, self._message.inputs))

    @cached_property
    def outputs(self) -> tuple[TensorType, ...]:
        """Outputs in the order of the specification."""
        types = {value.name: value for value in self.inputs}
        for operation in self.block.operations:
            types.update((value.name, value) for value in operation.outputs)
        missing = [name for name in self.block.outputs if name not in types]
        if missing:
            raise _damaged(self._package, f"function {self.name} never computes {missing[0]}")
        return tuple(types[name] for name in self.block.outputs)

    @cached_property
    def block(self) -> Block:
        """The body."""
        if self.opset not in self._message.block_specializations:
            raise _damaged(self._package, f"function {self.name} has no body for {self.opset}")
        return _block(self._message.block_specializations[self.opset])

    def blob_references(self) -> Iterator[tuple[str, BlobReference]]:
        """Every value in a weights file, with its name (the input's name where it has none)."""
        return _blob_references(self.block)


class Package:
    """A saved package, opened for reading."""

    def __init__(self, path: Path, specification: Message, root: Path) -> None:
        self.path = path
        self.specification = specification
        self._root = root
        self._blobs: dict[str, BlobFile] = {}
        self._converted: WeakValueDictionary[tuple[BlobReference, torch.dtype], torch.Tensor] = (
            WeakValueDictionary()
        )
        program = specification.mlProgram
        self.functions: dict[str, Function] = {
            name: Function(name, program.functions[name], path)
            for name in sorted(program.functions)
        }
        named = specification.description.defaultFunctionName
        self.default_function: str = named or ("main" if "main" in self.functions else "")

    @classmethod
    def open(cls, path: str | Path) -> Package:
        """Read the manifest and the specification. Raises PackageError where they are damaged."""
        path = Path(path)
        if not path.is_dir():
            raise PackageError(
                f"package {path} is missing", "Give the path of an .mlpackage folder."
            )
        model = _model_path(path)
        try:
            specification = parse_model(model.read_bytes())
        except (OSError, ValueError) as error:
            raise _damaged(path, f"its specification {model.name} cannot be parsed") from error
        if specification.WhichOneof("Type") != "mlProgram":
            raise PackageError(
                f"package {path} holds no ML program",
                "Convert with convert_to='mlprogram' (the default from iOS 15 on).",
            )
        if not specification.mlProgram.functions:
            raise _damaged(path, "it has no functions")
        return cls(path, specification, model.parent)

    @property
    def specification_version(self) -> int:
        """Core ML's specification version; 9 is iOS 18."""
        return int(self.specification.specificationVersion)

    def function(self, name: str | None = None) -> Function:
        """A function by name, or the default one."""
        chosen = name or self.default_function or next(iter(self.functions))
        if chosen not in self.functions:
            raise PackageError(
                f"package {self.path} has no function {chosen!r}", nearest(chosen, self.functions)
            )
        return self.functions[chosen]

    def blobs(self, file: str) -> BlobFile:
        """A weights file by the name the specification gives it, mapped once until `unmap`."""
        if file not in self._blobs:
            relative = file.removeprefix("@model_path/")
            target = (self._root / relative).resolve()
            if not target.is_relative_to(self._root.resolve()):
                raise _damaged(self.path, f"it names a weights file outside of itself: {file}")
            self._blobs[file] = BlobFile(target)
        return self._blobs[file]

    def unmap(self) -> None:
        """Let go of the weights files; whatever reads them maps them again. Tensors over a mapping
        keep it."""
        self._blobs.clear()

    def check(self, reference: BlobReference) -> None:
        """Raise PackageError where a weight is not what the specification says, without reading it.

        Only the 64 bytes of metadata before it are looked at.
        """
        entry = self.blobs(reference.file).entry(reference.offset)
        count = prod(reference.shape)
        if entry.dtype != _BLOB_TYPES.get(reference.dtype) or entry.elements != count:
            raise _damaged(
                self.path,
                f"the weight at offset {reference.offset} is {entry.elements} elements of type "
                f"{entry.dtype.name.lower()}, the specification says {count} of {reference.dtype}",
            )

    def tensor(self, reference: BlobReference, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A weight: over the mapping, or converted to `dtype`.

        A converted weight is shared by all who hold it, and gone when none does.
        """
        blobs = self.blobs(reference.file)
        mapped = blobs.tensor(reference.offset, reference.shape)
        if dtype is None or mapped.dtype == dtype:
            return mapped
        key = (reference, dtype)
        shared = self._converted.get(key)
        if shared is None:
            self._converted[key] = shared = converted(mapped, dtype)
            # The pages read for the conversion are not needed a second time.
            blobs.evict(reference.offset)
        return shared


# MIL's name → the type in a weights file.
_RENAMED = {"fp16": "FLOAT16", "fp32": "FLOAT32", "bf16": "BFLOAT16"}
_BLOB_TYPES = {
    name: BlobType[stored]
    for name in TORCH_DTYPE
    if (stored := _RENAMED.get(name, name.upper())) in BlobType.__members__
}


def _damaged(path: Path, what: str) -> PackageError:
    return PackageError(
        f"package {path} is damaged: {what}", "It is incomplete or damaged; compile it again."
    )


def _model_path(path: Path) -> Path:
    manifest = path / "Manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        relative = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        model = path / "Data" / relative
    except FileNotFoundError:
        raise _damaged(path, "Manifest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"Manifest.json cannot be read ({error!r})") from error
    if not model.resolve().is_relative_to(path.resolve()) or not model.is_file():
        raise _damaged(path, f"its specification {relative} is missing")
    return model


def _shape(tensor_type: Message) -> tuple[int | None, ...]:
    return tuple(
        dimension.constant.size if dimension.WhichOneof("dimension") == "constant" else None
        for dimension in tensor_type.dimensions
    )


def _tensor_type(named: Message) -> TensorType:
    kind = named.type.WhichOneof("type")
    if kind != "tensorType":
        return TensorType(named.name, (kind or "").removesuffix("Type"), ())
    tensor_type = named.type.tensorType
    return TensorType(named.name, mil_dtype(tensor_type.dataType), _shape(tensor_type))


def _value(message: Message) -> Value:
    if message.type.WhichOneof("type") in ("listType", "tupleType"):
        immediate = message.immediateValue
        items = getattr(immediate, immediate.WhichOneof("value")).values
        return Literal("list", (len(items),), tuple(map(_value, items)))
    tensor_type = message.type.tensorType
    dtype = mil_dtype(tensor_type.dataType)
    shape = tuple(size or 0 for size in _shape(tensor_type))
    if message.WhichOneof("value") == "blobFileValue":
        blob = message.blobFileValue
        return BlobReference(blob.fileName, blob.offset, dtype, shape)
    tensor = message.immediateValue.tensor
    field = tensor.WhichOneof("value")
    data = getattr(tensor, field).values if field else ()
    return Literal(dtype, shape, data if isinstance(data, bytes) else tuple(data))


def _operation(message: Message) -> Operation:
    return Operation(
        message.type,
        {
            name: tuple(
                binding.name if binding.WhichOneof("binding") == "name" else _value(binding.value)
                for binding in argument.arguments
            )
            for name, argument in message.inputs.items()
        },
        tuple(map(_tensor_type, message.outputs)),
        {
            name: _value(value)
            for name, value in message.attributes.items()
            # The operation's own name says nothing that its outputs' names do not.
            if name != "name"
        },
        tuple(map(_block, message.blocks)),
    )


def _block(message: Message) -> Block:
    return Block(
        tuple(map(_tensor_type, message.inputs)),
        tuple(map(_operation, message.operations)),
        tuple(message.outputs),
    )


def _blob_references(block: Block) -> Iterator[tuple[str, BlobReference]]:
    for operation in block.operations:
        for value in operation.attributes.values():
            if isinstance(value, BlobReference):
                yield operation.outputs[0].name, value
        for name, arguments in operation.inputs.items():
            for argument in arguments:
                if isinstance(argument, BlobReference):
                    yield f"{operation.outputs[0].name}.{name}", argument
        for nested in operation.blocks:
            yield from _blob_references(nested)
