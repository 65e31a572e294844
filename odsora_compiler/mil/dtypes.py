"""The element types of MIL: their names, and the torch types the interpreter holds them in."""

from __future__ import annotations

import torch

# MIL's name (as the `cast` operation spells it) → the torch type values are held in. Integer types
# that torch has no arithmetic for are held in the next wider one; sub-byte types unpacked.
TORCH_DTYPE: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
}

# The name in the protobuf enumeration → MIL's name, where they differ by more than case.
_RENAMED = {"FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64", "BFLOAT16": "bf16"}


def mil_dtype(protobuf_name: str) -> str:
    """MIL's name of an element type that the protobuf enumeration calls `protobuf_name`."""
    return _RENAMED.get(protobuf_name, protobuf_name.lower())


def is_half(dtype: torch.dtype) -> bool:
    """Whether the type is a 16-bit float, stored so but accumulated wider."""
    return dtype in (torch.float16, torch.bfloat16)
