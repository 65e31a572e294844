"""weight.bin, the weights of a Core ML package: a memory-mapped reader and a streaming writer.

The layout, little endian: a header of 64 bytes (blob count, version 2, zeros); then for every blob
64 bytes of metadata (sentinel, element type, size in bytes, absolute offset of the data, padding
bits, zeros), its data, and zeros up to the next multiple of 64, but none after the last blob.
A package's specification names a blob by the offset of its metadata.

Element types narrower than a byte are packed from the least significant bit up, without gaps; the
bits that fill the last byte are the padding bits.

What the blobs mean (which constant, which shape) stands in the specification: see `package`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from math import lcm, prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

import torch

from odsora_compiler.errors import PackageError

ALIGNMENT = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
# Groups of bytes that are unpacked at a time.
_ROWS = 1 << 15

_HEADER = struct.Struct("<II7Q")
_METADATA = struct.Struct("<IIQQQ4Q")

# Anything with the buffer protocol (typing.Buffer needs Python 3.12).
Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap


class BlobType(IntEnum):
    """Element types by their code in the file."""

    FLOAT16 = 1
    FLOAT32 = 2
    UINT8 = 3
    INT8 = 4
    BFLOAT16 = 5
    INT16 = 6
    UINT16 = 7
    INT4 = 8
    UINT1 = 9
    UINT2 = 10
    UINT4 = 11
    UINT3 = 12
    UINT6 = 13
    INT32 = 14
    UINT32 = 15

    @property
    def bits(self) -> int:
        """Bits of one element in the file."""
        return _BITS.get(self, self.torch_dtype.itemsize * 8)

    @property
    def packed(self) -> bool:
        """Whether elements are narrower than a byte."""
        return self in _BITS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of the unpacked elements (int8 or uint8 for packed ones)."""
        return _TORCH[self]


_TORCH = {
    BlobType.FLOAT16: torch.float16,
    BlobType.FLOAT32: torch.float32,
    BlobType.UINT8: torch.uint8,
    BlobType.INT8: torch.int8,
    BlobType.BFLOAT16: torch.bfloat16,
    BlobType.INT16: torch.int16,
    BlobType.UINT16: torch.uint16,
    BlobType.INT4: torch.int8,
    BlobType.UINT1: torch.uint8,
    BlobType.UINT2: torch.uint8,
    BlobType.UINT4: torch.uint8,
    BlobType.UINT3: torch.uint8,
    BlobType.UINT6: torch.uint8,
    BlobType.INT32: torch.int32,
    BlobType.UINT32: torch.uint32,
}
_BITS = {
    BlobType.INT4: 4,
    BlobType.UINT1: 1,
    BlobType.UINT2: 2,
    BlobType.UINT3: 3,
    BlobType.UINT4: 4,
    BlobType.UINT6: 6,
}


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """Where one blob lies: its metadata's offset, its data's offset and size in bytes."""

    metadata_offset: int
    dtype: BlobType
    data_offset: int
    size: int
    padding_bits: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return (self.size * 8 - self.padding_bits) // self.dtype.bits


class BlobFile:
    """A weight.bin mapped into memory; a blob is read from disk when its tensor is used.

    Tensors keep the mapping alive: no closing is needed, and a tensor may outlive this object.
    Raises PackageError where the file is missing, truncated or not a weight.bin.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                # A private writable mapping: torch takes a buffer without copying, and without a
                # warning, only when it is writable. Nothing written would reach the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise PackageError(f"weights file {self.path} is missing", _REMAKE) from None
        except (OSError, ValueError) as error:
            raise PackageError(
                f"weights file {self.path} cannot be read: {error}", _REMAKE
            ) from error
        if len(self._map) < ALIGNMENT:
            raise self._damaged("is shorter than its header of 64 bytes")
        self.count, version, *_ = _HEADER.unpack_from(self._map, 0)
        if version != VERSION:
            raise self._damaged(f"has version {version}, expected {VERSION}")
        self._entries: list[BlobEntry] | None = None

    def __len__(self) -> int:
        """Size of the file in bytes."""
        return len(self._map)

    def entries(self) -> list[BlobEntry]:
        """All blobs in the order of the file; reads only the metadata."""
        if self._entries is None:
            entries, offset = [], ALIGNMENT
            for _ in range(self.count):
                entries.append(self.entry(offset))
                offset = _aligned(entries[-1].data_offset + entries[-1].size)
            self._entries = entries
        return self._entries

    def entry(self, metadata_offset: int) -> BlobEntry:
        """The blob whose metadata stands at `metadata_offset`."""
        if metadata_offset % ALIGNMENT or not (
            ALIGNMENT <= metadata_offset <= len(self._map) - ALIGNMENT
        ):
            raise self._damaged(f"has no blob at offset {metadata_offset}")
        sentinel, code, size, start, padding, *_ = _METADATA.unpack_from(self._map, metadata_offset)
        if sentinel != SENTINEL:
            raise self._damaged(f"has no blob at offset {metadata_offset}")
        if code not in _TORCH:
            raise self._damaged(f"has a blob of unknown type {code} at offset {metadata_offset}")
        if start != metadata_offset + ALIGNMENT or start + size > len(self._map):
            raise self._damaged(f"ends inside the blob at offset {metadata_offset}")
        return BlobEntry(metadata_offset, BlobType(code), start, size, padding)

    def raw(self, metadata_offset: int) -> memoryview:
        """The blob's bytes as they are in the file, not copied."""
        entry = self.entry(metadata_offset)
        return memoryview(self._map)[entry.data_offset : entry.data_offset + entry.size]

    def tensor(self, metadata_offset: int, shape: Iterable[int]) -> torch.Tensor:
        """The blob as a tensor over the mapping, not copied (packed types are unpacked to 8 bits).

        Do not write to it. Raises PackageError where the blob does not have this many elements.
        """
        shape = tuple(shape)
        entry = self.entry(metadata_offset)
        if prod(shape) != entry.elements:
            raise self._damaged(
                f"has {entry.elements} elements in the blob at offset {metadata_offset}, "
                f"expected {prod(shape)} for shape {list(shape)}"
            )
        dtype = torch.uint8 if entry.dtype.packed else entry.dtype.torch_dtype
        if not entry.size:
            return torch.empty(shape, dtype=entry.dtype.torch_dtype)
        flat = torch.frombuffer(
            self._map, dtype=dtype, count=entry.size // dtype.itemsize, offset=entry.data_offset
        )
        return unpack(flat, entry.dtype, prod(shape)).reshape(shape)

    def evict(self, metadata_offset: int | None = None) -> None:
        """Give the memory of one blob, or of all, back to the system; later use reads it again."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # pragma: no cover - not on every system
            return
        start, size = 0, len(self._map)
        if metadata_offset is not None:
            entry = self.entry(metadata_offset)
            start = -(-entry.data_offset // mmap.PAGESIZE) * mmap.PAGESIZE
            size = entry.data_offset + entry.size - start
        if size > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, size)

    def _damaged(self, what: str) -> PackageError:
        return PackageError(f"weights file {self.path} {what}", _REMAKE)


class BlobWriter:
    """Writes a weight.bin from front to back, byte for byte as coremltools does.

    `with BlobWriter(path) as writer: offset = writer.append(BlobType.FLOAT16, tensor)`. The file is
    valid after `close`. At most one piece of data is held in memory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO = self.path.open("wb")
        self._file.write(bytes(ALIGNMENT))
        self._count = 0

    def append(
        self,
        dtype: int,
        data: torch.Tensor | Buffer | Iterable[torch.Tensor | Buffer],
        padding_bits: int = 0,
    ) -> int:
        """Append one blob and return its metadata offset, the number a specification refers to.

        `dtype` is a BlobType or its code. `data` is a tensor of exactly that type (unpacked
        elements for the packed types), or bytes as they shall stand in the file, or several such
        pieces that follow each other; `padding_bits` counts for bytes of a packed type.
        """
        dtype = BlobType(dtype)
        metadata_offset = _aligned(self._file.tell())
        self._file.write(bytes(metadata_offset - self._file.tell() + ALIGNMENT))
        start = self._file.tell()
        pieces = [data] if isinstance(data, torch.Tensor | Buffer) else data
        spare = 0
        for piece in pieces:
            if spare:
                raise ValueError("only the last piece of a packed blob may end inside a byte")
            if isinstance(piece, torch.Tensor):
                self._file.write(_bytes_of(piece, dtype))
                spare = -piece.numel() * dtype.bits % 8
            else:
                self._file.write(piece)
        end = self._file.tell()
        self._file.seek(metadata_offset)
        fields = (SENTINEL, dtype, end - start, start, spare or padding_bits, 0, 0, 0, 0)
        self._file.write(_METADATA.pack(*fields))
        self._file.seek(end)
        self._count += 1
        return metadata_offset

    def close(self) -> None:
        """Write the header and close the file; a second call does nothing."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(_HEADER.pack(self._count, VERSION, *[0] * 7))
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def unpack(packed: torch.Tensor, dtype: BlobType, elements: int) -> torch.Tensor:
    """The `elements` values of a flat uint8 tensor of packed bits, as uint8 or int8.

    A tensor of a type that is not packed is returned as it is.
    """
    if not dtype.packed:
        return packed
    bits = dtype.bits
    group, per_group = _group(bits)
    rows = -(-packed.numel() // group)
    if packed.numel() % group:
        packed = torch.nn.functional.pad(packed, (0, rows * group - packed.numel()))
    whole = torch.empty(rows, per_group, dtype=torch.uint8)
    # Some rows at a time, so that what lies in between stays in the processor's cache.
    pieces = zip(packed.view(rows, group).split(_ROWS), whole.split(_ROWS), strict=True)
    for rows_of_bytes, out in pieces:
        for k in range(per_group):
            byte, shift = divmod(k * bits, 8)
            value = rows_of_bytes[:, byte] >> shift
            if shift + bits > 8:
                value |= rows_of_bytes[:, byte + 1] << (8 - shift)
            torch.bitwise_and(value, (1 << bits) - 1, out=out[:, k])
    out = whole.view(-1)[:elements]
    if dtype.torch_dtype == torch.int8:
        sign = 1 << (bits - 1)
        out ^= sign
        out -= sign
        return out.view(torch.int8)
    return out


def pack(values: torch.Tensor, dtype: BlobType) -> torch.Tensor:
    """The inverse of `unpack`: a flat uint8 tensor; bits above the type's width are cut off."""
    bits = dtype.bits
    group, per_group = _group(bits)
    flat = values.reshape(-1).view(torch.uint8) & ((1 << bits) - 1)
    size = -(-flat.numel() * bits // 8)
    rows = -(-flat.numel() // per_group)
    flat = torch.nn.functional.pad(flat, (0, rows * per_group - flat.numel()))
    elements = flat.view(rows, per_group)
    out = torch.zeros(rows, group, dtype=torch.uint8)
    for k in range(per_group):
        byte, shift = divmod(k * bits, 8)
        out[:, byte] |= elements[:, k] << shift
        if shift + bits > 8:
            out[:, byte + 1] |= elements[:, k] >> (8 - shift)
    return out.view(-1)[:size]


_REMAKE = "The package is incomplete or damaged; compile it again."


def _group(bits: int) -> tuple[int, int]:
    """The smallest run of whole bytes that holds whole elements: its bytes and its elements."""
    total = lcm(8, bits)
    return total // 8, total // bits


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _bytes_of(tensor: torch.Tensor, dtype: BlobType) -> Any:
    """The tensor's elements as they stand in the file: an object with the buffer protocol."""
    if tensor.dtype != dtype.torch_dtype:
        raise TypeError(
            f"a {dtype.name} blob takes {dtype.torch_dtype} elements, got {tensor.dtype}"
        )
    flat = tensor.detach().reshape(-1)
    flat = pack(flat, dtype) if dtype.packed else flat.view(torch.uint8)
    # numpy lends its buffer; torch tensors have none of their own.
    return flat.numpy()
