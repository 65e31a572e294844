"""Writing packages: functions and their weights linked into one `.mlpackage` folder.

Functions of a package share one copy of equal weights. The same functions and weights give the same
bytes: nothing in a package tells when or where it was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from odsora_compiler.errors import LoweringError
from odsora_compiler.lowering.convert import WEIGHTS_FILE
from odsora_compiler.lowering.interface import Message
from odsora_compiler.mil.blobs import BlobFile, BlobType, BlobWriter


@dataclass(frozen=True)
class Blob:
    """The data of one constant. Blobs of equal `key` are equal; `load` reads one when asked."""

    dtype: BlobType
    key: Hashable
    load: Callable[[], torch.Tensor | memoryview]
    padding_bits: int = 0


@dataclass(frozen=True)
class Part:
    """One function to link: a specification with the single function "main".

    `blobs` maps each offset that stands in the specification to what it means.
    """

    name: str
    specification: Message
    blobs: Mapping[int, Blob]

    @classmethod
    def of_file(cls, name: str, specification: Message, weights: Path) -> Part:
        """A part whose weights are those of a weight.bin."""
        file = BlobFile(weights) if weights.exists() else None
        blobs = {
            entry.metadata_offset: _blob_of_entry(file, entry)
            for entry in (file.entries() if file else ())
        }
        return cls(name, specification, blobs)


def write_package(path: Path, parts: Sequence[Part], default: str) -> int:
    """Write `parts` as the functions of the package `path`, which must not exist.

    `default` names the function that runs when none is named. Returns the size of the weights file
    in bytes. At most one weight is held in memory.
    """
    from coremltools.proto import MIL_pb2, Model_pb2

    if default not in [part.name for part in parts]:
        raise LoweringError(f"package {path}: its default function '{default}' is not among it")
    data = path / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    weights = data / "weights" / WEIGHTS_FILE
    model = Model_pb2.Model(
        specificationVersion=max(part.specification.specificationVersion for part in parts)
    )
    model.description.defaultFunctionName = default
    model.mlProgram.version = 1
    with BlobWriter(weights) as writer:
        shared = _SharedBlobs(writer)
        for part in parts:
            (source,) = part.specification.mlProgram.functions.values()
            if part.specification.description.state:
                raise LoweringError(f"function '{part.name}' of package {path} keeps state")
            function = MIL_pb2.Function()
            function.CopyFrom(source)
            for reference in blob_references(function):
                reference.offset = shared.place(part.blobs[reference.offset])
            model.mlProgram.functions[part.name].CopyFrom(function)
            model.description.functions.add(
                name=part.name,
                input=part.specification.description.input,
                output=part.specification.description.output,
            )
    specification = data / "model.mlmodel"
    specification.write_bytes(model.SerializeToString(deterministic=True))
    manifest = path / "Manifest.json"
    manifest.write_text(_manifest(path.stem), encoding="utf-8")
    for file in (weights, specification, manifest):
        os.chmod(file, 0o644)
    return weights.stat().st_size


def blob_references(function: Message) -> Iterator[Message]:
    """Every reference to a blob in a function's message, in the order of its operations."""
    for block in function.block_specializations.values():
        for operation in _operations(block):
            yield from blob_references_of(operation)


def blob_references_of(operation: Message) -> Iterator[Message]:
    """Every reference to a blob in an operation, but for those in its nested blocks."""
    for value in operation.attributes.values():
        if value.WhichOneof("value") == "blobFileValue":
            yield value.blobFileValue
    for name in sorted(operation.inputs):
        for binding in operation.inputs[name].arguments:
            if binding.value.WhichOneof("value") == "blobFileValue":
                yield binding.value.blobFileValue


def _operations(block: Message) -> Iterator[Message]:
    for operation in block.operations:
        yield operation
        for nested in operation.blocks:
            yield from _operations(nested)


class _SharedBlobs:
    """Places blobs in a weights file, each content once."""

    def __init__(self, writer: BlobWriter) -> None:
        self._writer = writer
        self._by_key: dict[Hashable, int] = {}
        self._by_content: dict[tuple[BlobType, bytes], int] = {}

    def place(self, blob: Blob) -> int:
        """The offset of the blob in the file; written if its content is new."""
        if blob.key not in self._by_key:
            data = blob.load()
            content = (blob.dtype, _digest(data))
            if content not in self._by_content:
                self._by_content[content] = self._writer.append(blob.dtype, data, blob.padding_bits)
            self._by_key[blob.key] = self._by_content[content]
        return self._by_key[blob.key]


def _digest(data: torch.Tensor | memoryview) -> bytes:
    if isinstance(data, torch.Tensor):
        view: Any = data.contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        view = data
    digest = hashlib.sha256(view)
    digest.update(len(view).to_bytes(8, "little"))
    return digest.digest()


def _blob_of_entry(file: BlobFile | None, entry: Any) -> Blob:
    assert file is not None
    return Blob(
        entry.dtype,
        (str(file.path), entry.metadata_offset),
        lambda: file.raw(entry.metadata_offset),
        entry.padding_bits,
    )


def _manifest(name: str) -> str:
    """Manifest.json as Core ML's own library writes it, with identifiers made from the name."""
    items = {}
    for item, description, path in (
        (WEIGHTS_ITEM, "CoreML Model Weights", "com.apple.CoreML/weights"),
        ("model.mlmodel", "CoreML Model Specification", "com.apple.CoreML/model.mlmodel"),
    ):
        identifier = str(uuid.uuid5(uuid.NAMESPACE_OID, f"odsora/{name}/{item}")).upper()
        items[identifier] = {
            "author": "com.apple.CoreML",
            "description": description,
            "name": item,
            "path": path,
        }
    content = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": identifier,
    }
    return json.dumps(content, indent=4) + "\n"


WEIGHTS_ITEM = "weights"
