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

# Core ML's number of a type in a specification → its name.
_NAMES: dict[int, str] = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    13: "bf16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}


def mil_dtype(number: int) -> str:
    """MIL's name of the element type with that number in a specification."""
    return _NAMES.get(number, f"type {number}")


def is_half(dtype: torch.dtype) -> bool:
    """Whether the type is a 16-bit float, stored so but accumulated wider."""
    return dtype in (torch.float16, torch.bfloat16)
