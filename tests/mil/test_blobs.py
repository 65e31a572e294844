"""weight.bin: written files equal those of coremltools, read values equal the written ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from odsora_compiler.errors import PackageError
from odsora_compiler.mil.blobs import BlobFile, BlobType, BlobWriter

# Element type, name of coremltools' write method, lowest and highest value.
TYPES = [
    (BlobType.FLOAT16, "fp16", -8, 8),
    (BlobType.FLOAT32, "float", -8, 8),
    (BlobType.UINT8, "uint8", 0, 255),
    (BlobType.INT8, "int8", -128, 127),
    (BlobType.INT16, "int16", -(2**15), 2**15 - 1),
    (BlobType.UINT16, "uint16", 0, 2**16 - 1),
    (BlobType.INT32, "int32", -(2**31), 2**31 - 1),
    (BlobType.UINT32, "uint32", 0, 2**32 - 1),
    (BlobType.INT4, "int4", -8, 7),
    (BlobType.UINT1, "uint1", 0, 1),
    (BlobType.UINT2, "uint2", 0, 3),
    (BlobType.UINT3, "uint3", 0, 7),
    (BlobType.UINT4, "uint4", 0, 15),
    (BlobType.UINT6, "uint6", 0, 63),
]


def values(dtype: BlobType, low: int, high: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    if dtype.torch_dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype.torch_dtype)
    whole = torch.randint(low, high + 1, (count,), generator=generator, dtype=torch.int64)
    return whole.to(dtype.torch_dtype)


def coremltools_file(path: Path, count: int) -> list[int]:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    writer = _BlobStorageWriter(str(path))
    offsets = []
    for dtype, name, low, high in TYPES:
        array = values(dtype, low, high, count).numpy()
        array = array.view(np.uint16) if dtype is BlobType.FLOAT16 else array
        offsets.append(getattr(writer, f"write_{name}_data")(array))
    del writer
    return offsets


@pytest.mark.parametrize("count", [1, 7, 24, 37, 64, 1001])
def test_written_file_equals_coremltools(tmp_path: Path, count: int) -> None:
    expected = coremltools_file(tmp_path / "theirs.bin", count)
    with BlobWriter(tmp_path / "ours.bin") as writer:
        offsets = [writer.append(t, values(t, low, high, count)) for t, _, low, high in TYPES]
    assert offsets == expected
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


@pytest.mark.parametrize("count", [1, 7, 24, 37, 1001])
def test_reads_every_type_coremltools_writes(tmp_path: Path, count: int) -> None:
    offsets = coremltools_file(tmp_path / "weight.bin", count)
    blobs = BlobFile(tmp_path / "weight.bin")
    assert [entry.metadata_offset for entry in blobs.entries()] == offsets
    for entry, (dtype, _, low, high) in zip(blobs.entries(), TYPES, strict=True):
        assert (entry.dtype, entry.elements) == (dtype, count)
        read = blobs.tensor(entry.metadata_offset, (1, count))
        assert torch.equal(read, values(dtype, low, high, count)[None])
        assert read.dtype == dtype.torch_dtype


def test_bf16_and_empty_blobs_round_trip(tmp_path: Path) -> None:
    bf16 = torch.linspace(-3, 3, 10).bfloat16()
    with BlobWriter(tmp_path / "weight.bin") as writer:
        first = writer.append(BlobType.BFLOAT16, bf16)
        empty = writer.append(BlobType.FLOAT32, torch.empty(0, 3))
        last = writer.append(BlobType.UINT8, torch.arange(5, dtype=torch.uint8))
    blobs = BlobFile(tmp_path / "weight.bin")
    assert torch.equal(blobs.tensor(first, (2, 5)), bf16.view(2, 5))
    assert blobs.tensor(empty, (0, 3)).shape == (0, 3)
    assert blobs.tensor(last, (5,)).tolist() == [0, 1, 2, 3, 4]
    assert len(blobs.entries()) == 3


def test_pieces_and_raw_copies_equal_one_append(tmp_path: Path) -> None:
    whole = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).half()
    nibbles = torch.arange(7, dtype=torch.uint8)
    with BlobWriter(tmp_path / "a.bin") as writer:
        writer.append(BlobType.FLOAT16, whole)
        writer.append(BlobType.FLOAT16, whole.T)
        writer.append(BlobType.UINT4, nibbles)
    source = BlobFile(tmp_path / "a.bin")
    _, second, third = source.entries()
    with BlobWriter(tmp_path / "b.bin") as writer:
        writer.append(BlobType.FLOAT16, (row for row in whole))
        writer.append(BlobType.FLOAT16, source.raw(second.metadata_offset))
        writer.append(third.dtype, source.raw(third.metadata_offset), third.padding_bits)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    with BlobWriter(tmp_path / "c.bin") as writer, pytest.raises(ValueError, match="last piece"):
        writer.append(BlobType.UINT4, [nibbles, nibbles])


def test_tensor_is_mapped_not_copied_and_survives_eviction(tmp_path: Path) -> None:
    with BlobWriter(tmp_path / "weight.bin") as writer:
        offset = writer.append(BlobType.FLOAT32, torch.arange(20000.0))
        later = writer.append(BlobType.FLOAT32, torch.ones(20000))
    blobs = BlobFile(tmp_path / "weight.bin")
    one, two = blobs.tensor(offset, (20000,)), blobs.tensor(offset, (100, 200))
    assert one.data_ptr() == two.data_ptr()
    blobs.evict(offset)
    blobs.evict()
    del blobs
    assert torch.equal(one, torch.arange(20000.0))
    assert torch.equal(two.reshape(-1), one)
    assert later > offset


def test_a_wrong_element_type_is_refused_not_cast(tmp_path: Path) -> None:
    with BlobWriter(tmp_path / "weight.bin") as writer, pytest.raises(TypeError, match="float32"):
        writer.append(BlobType.FLOAT16, torch.ones(3))


def written(path: Path) -> bytes:
    with BlobWriter(path) as writer:
        writer.append(BlobType.FLOAT16, torch.ones(100).half())
        writer.append(BlobType.FLOAT16, torch.ones(100).half())
    return path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[:40], "shorter than its header"),
        (lambda data: struct.pack("<II", 2, 9) + data[8:], "version 9"),
        (lambda data: data[:-1], "ends inside the blob"),
        (lambda data: data[:400], "no blob at offset 384"),
        (lambda data: data[:64] + b"garbage." + data[72:], "no blob at offset 64"),
        (lambda data: data[:68] + b"\x63" + data[69:], "unknown type 99"),
        (lambda data: struct.pack("<I", 5) + data[4:], "no blob at offset"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(damage(written(path)))
    with pytest.raises(PackageError, match=message) as caught:
        BlobFile(path).entries()
    assert str(path) in str(caught.value)


def test_missing_file_wrong_offset_and_wrong_shape_are_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is missing"):
        BlobFile(tmp_path / "none.bin")
    path = tmp_path / "weight.bin"
    written(path)
    with pytest.raises(PackageError, match="no blob at offset 65"):
        BlobFile(path).tensor(65, (100,))
    with pytest.raises(PackageError, match=r"100 elements in .* expected 99"):
        BlobFile(path).tensor(64, (99,))
