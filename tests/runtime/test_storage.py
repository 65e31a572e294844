"""Reading files: every byte once and in order, and what is said where that cannot be."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odsora_compiler.errors import PackageError
from odsora_compiler.runtime.storage import Storage

MEGABYTE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weight.bin"
    path.write_bytes(random.Random(0).randbytes(2 * MEGABYTE + 100))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, MEGABYTE, MEGABYTE + 1, 3 * MEGABYTE + 17])
@pytest.mark.parametrize("bandwidth", [None, 1e9])
def test_blocks_are_the_file(tmp_path: Path, size: int, bandwidth: float | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(size).randbytes(size))
    read = bytearray()
    for start, block in Storage(bandwidth=bandwidth).blocks(path):
        assert start == len(read)
        assert start % 64 == 0
        assert 0 < len(block) <= MEGABYTE
        read += block
        block[:] = bytes(len(block))
    assert read == path.read_bytes()


def test_a_checksum_is_compared_in_the_first_whole_reading(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage({file: sha256(file)})
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    # Half a reading is no comparison.
    next(storage.blocks(file))
    monkeypatch.chdir(file.parent)
    for path in (file, Path(file.name)):
        seen = 0
        with pytest.raises(PackageError, match=r"weight\.bin: its checksum"):
            for _, block in storage.blocks(path):
                seen += len(block)
        assert seen == len(good)
    file.write_bytes(good)
    assert sum(len(block) for _, block in storage.blocks(file)) == len(good)
    file.write_bytes(bytes(len(good)))
    assert sum(len(block) for _, block in storage.blocks(file)) == len(good)


def test_verify_reads_once_and_only_where_a_checksum_is_known(file: Path, tmp_path: Path) -> None:
    class Counting(Storage):
        count = 0

        def blocks(self, path: Path) -> Iterator[tuple[int, memoryview]]:
            self.count += 1
            return super().blocks(path)

    storage = Counting({file: sha256(file)})
    storage.verify(file)
    storage.verify(file)
    storage.verify(tmp_path / "other")
    assert storage.count == 1
    with pytest.raises(PackageError, match="its checksum is not"):
        Storage({file: "0" * 64}).verify(file)


def cut(path: Path) -> None:
    os.truncate(path, MEGABYTE + 10)


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, f"ends after {MEGABYTE + 10} of {2 * MEGABYTE + 100} bytes"),
        (grow, f"had {2 * MEGABYTE + 100} bytes and has {2 * MEGABYTE + 104} now"),
    ],
)
def test_a_file_that_changes_its_size_is_named(
    file: Path, change: Callable[[Path], None], message: str
) -> None:
    def read() -> None:
        for start, _ in Storage().blocks(file):
            if start == 0:
                change(file)

    with pytest.raises(PackageError, match=message) as caught:
        read()
    assert str(file) in caught.value.message
    assert "recompile" in caught.value.hint


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"missing\.bin cannot be read: No such file"):
        next(Storage().blocks(tmp_path / "missing.bin"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(PackageError, match="folder cannot be read: Is a directory") as caught:
        next(Storage().blocks(tmp_path / "folder"))
    assert "copy the bundle again" in caught.value.hint


def test_files_are_closed(file: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    storage = Storage({file: "0" * 64})
    with pytest.raises(PackageError):
        list(storage.blocks(file))
    blocks = storage.blocks(file)
    next(blocks)
    assert opened() == before + 1
    del blocks
    assert opened() == before


def test_a_bandwidth_is_kept(file: Path) -> None:
    bandwidth = 8e6
    begin = time.perf_counter()
    for _ in Storage(bandwidth=bandwidth).blocks(file):
        time.sleep(0.01)  # less than reading takes, so it costs no time
    spent = time.perf_counter() - begin
    expected = file.stat().st_size / bandwidth
    assert expected <= spent < 2 * expected


def test_a_slow_storage_gives_blocks_often_enough_to_be_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MEGABYTE))
    begin = time.perf_counter()
    blocks = Storage(bandwidth=20_000).blocks(path)
    assert next(blocks)[0] == 0
    assert len(next(blocks)[1]) < 4096
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_bandwidth_is_above_zero(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="above 0 bytes a second"):
        Storage(bandwidth=bandwidth)
