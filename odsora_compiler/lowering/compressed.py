"""Writing weights as look-up tables: a constant becomes a `constexpr_lut_to_dense`.

    const(val=weight)     →     constexpr_lut_to_dense(indices=…, lut=…)

The operation keeps the constant's name, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.weights import LookupTable, WeightStore
from odsora_compiler.lowering.convert import WEIGHTS_FILE
from odsora_compiler.lowering.interface import Message
from odsora_compiler.lowering.link import Blob, Part
from odsora_compiler.lowering.template import INLINE_ELEMENTS, rounded
from odsora_compiler.mil.blobs import BlobType

# Bits of an index → the element type that holds it, from Core ML's iOS 18 operation.
_INDEX_TYPES = {
    1: BlobType.UINT1,
    2: BlobType.UINT2,
    3: BlobType.UINT3,
    4: BlobType.UINT4,
    5: BlobType.UINT6,
    6: BlobType.UINT6,
    7: BlobType.UINT8,
    8: BlobType.UINT8,
}


def compress(part: Part, whole: Mapping[int, str], weights: WeightStore) -> tuple[Part, set[str]]:
    """`part` with compressed weights as look-up tables.

    `whole` maps offsets in the part's specification to weights that stand there as they are.
    Returns the new part, whose specification is the old one edited, and the names of the weights
    that it holds compressed.
    """
    blobs = dict(part.blobs)
    done: set[str] = set()
    for function in part.specification.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if operation.type != "const":
                    continue
                value = operation.attributes["val"]
                if value.WhichOneof("value") != "blobFileValue":
                    continue
                name = whole.get(value.blobFileValue.offset)
                table = weights.encoding(name) if name is not None else None
                if name is not None and table is not None:
                    dtype = blobs[value.blobFileValue.offset].dtype
                    _rewrite(operation, blobs, name, table, dtype)
                    done.add(name)
    return Part(part.name, part.specification, blobs), done


def _rewrite(
    operation: Message,
    blobs: dict[int, Blob],
    name: str,
    table: LookupTable,
    dtype: BlobType,
) -> None:
    if table.bits not in _INDEX_TYPES:
        raise LoweringError(
            f"weight '{name}' has a look-up table of {table.bits} bits",
            f"Core ML has tables of {min(_INDEX_TYPES)} to {max(_INDEX_TYPES)} bits.",
        )
    index_type = _INDEX_TYPES[table.bits]
    lut = _lut(table, index_type.bits, dtype)
    del operation.attributes["val"]
    operation.type = "constexpr_lut_to_dense"
    indices = operation.inputs["indices"].arguments.add().value
    _refer(indices, blobs, index_type, table.indices, (name, "indices"))
    values = operation.inputs["lut"].arguments.add().value
    if lut.numel() < INLINE_ELEMENTS:
        _describe(values, dtype, lut.shape)
        _inline(values.immediateValue.tensor, lut)
    else:
        _refer(values, blobs, dtype, lut, (name, "lut"))


def _lut(table: LookupTable, bits: int, dtype: BlobType) -> torch.Tensor:
    """The tables as Core ML has them: [groups along each axis…, 2**bits, 1]."""
    groups, size = table.table.shape
    values = table.table.float() if dtype is BlobType.FLOAT32 else rounded(table.table)
    padded = torch.zeros(groups, 1 << bits, dtype=values.dtype)
    padded[:, :size] = values
    shape = [1] * table.indices.dim()
    shape[table.axis] = groups
    return padded.reshape(*shape, 1 << bits, 1)


def _refer(
    value: Message,
    blobs: dict[int, Blob],
    dtype: BlobType,
    tensor: torch.Tensor,
    key: tuple[str, str],
) -> None:
    # Any number that is no offset yet will do: the linker gives blobs their places.
    offset = max(blobs, default=0) + 64
    blobs[offset] = Blob(dtype, (*key, dtype), lambda: tensor)
    _describe(value, dtype, tensor.shape)
    value.blobFileValue.fileName = f"@model_path/weights/{WEIGHTS_FILE}"
    value.blobFileValue.offset = offset


def _describe(value: Message, dtype: BlobType, shape: Any) -> None:
    from coremltools.proto import MIL_pb2

    tensor_type = value.type.tensorType
    tensor_type.dataType = MIL_pb2.DataType.Value(dtype.name)
    tensor_type.rank = len(shape)
    for size in shape:
        tensor_type.dimensions.add().constant.size = size


def _inline(message: Message, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float16:
        message.bytes.values = tensor.reshape(-1).numpy().tobytes()
    else:
        message.floats.values.extend(tensor.reshape(-1).tolist())
