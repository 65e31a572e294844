"""Reading the files of packages from front to back: the only place where weights are read in a run.

What the bytes mean is left to `mil.loading`. Tests make slow, failing and truncated storages by
overriding `blocks`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from odsora_compiler.errors import PackageError

# Blocks are multiples of 64, the alignment of weights, so that no element is in two of them.
_BLOCK = 1 << 20
_THROTTLED_BLOCK = 1 << 18
# Longest sleep of a throttled storage, seconds: who cancels a load waits no longer than that.
_LONGEST_SLEEP = 0.1


class Storage:
    """Reads files, one thread at a time each.

    `checksums`: the SHA-256 of files, in hexadecimal. A file is compared with it while it is read
    whole for the first time. `bandwidth`: most bytes a second that are read of a file, what its
    reader does with a block in between included; None: as fast as it goes.
    """

    def __init__(
        self,
        checksums: Mapping[Path, str] = MappingProxyType({}),
        bandwidth: float | None = None,
    ) -> None:
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"a bandwidth is above 0 bytes a second, not {bandwidth}")
        self._unverified = {path.resolve(): digest for path, digest in checksums.items()}
        self._bandwidth = bandwidth

    def blocks(self, path: Path) -> Iterator[tuple[int, memoryview]]:
        """All bytes of a file in order: their offset in it, and a view that is valid until the next
        step and may be written to.

        Raises PackageError where the file cannot be read, its size changes meanwhile, or (after the
        last block) it has another checksum.
        """
        key = path.resolve()
        expected = self._unverified.get(key)
        digest = hashlib.sha256()
        for start, block in self._read(path):
            if expected is not None:
                digest.update(block)
            yield start, block
        if expected is not None:
            if digest.hexdigest() != expected:
                raise PackageError(
                    f"{path}: its checksum is not the one in the manifest",
                    "The file was changed or damaged: copy the bundle again or recompile it.",
                )
            self._unverified.pop(key, None)

    def verify(self, path: Path) -> None:
        """Read a file whose checksum is known and was not compared yet; raises as `blocks`."""
        if path.resolve() in self._unverified:
            for _ in self.blocks(path):
                pass

    def _read(self, path: Path) -> Iterator[tuple[int, memoryview]]:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            size = os.fstat(file).st_size
            buffer = memoryview(bytearray(min(self._step(), size)))
            begin = time.perf_counter()
            for start in range(0, size, self._step()):
                block = buffer[: size - start]
                count = _fill(path, file, block, start)
                if count < len(block):
                    raise _changed(path, f"ends after {start + count} of {size} bytes")
                self._wait(begin, start + count)
                yield start, block
            if os.fstat(file).st_size != size:
                raise _changed(path, f"had {size} bytes and has {os.fstat(file).st_size} now")
        finally:
            os.close(file)

    def _step(self) -> int:
        if self._bandwidth is None:
            return _BLOCK
        wanted = int(self._bandwidth * _LONGEST_SLEEP) // 64 * 64
        return max(64, min(wanted, _THROTTLED_BLOCK))

    def _wait(self, begin: float, done: int) -> None:
        if self._bandwidth is not None:
            time.sleep(max(0.0, begin + done / self._bandwidth - time.perf_counter()))


def _fill(path: Path, file: int, block: memoryview, start: int) -> int:
    """Read until the block is full or the file at its end; bytes that were read."""
    count = 0
    while count < len(block):
        try:
            read = os.preadv(file, [block[count:]], start + count)
        except OSError as error:
            raise _unreadable(path, error) from error
        if read == 0:
            break
        count += read
    return count


def _unreadable(path: Path, error: OSError) -> PackageError:
    return PackageError(
        f"{path} cannot be read: {error.strerror or error}",
        "Is it there, and its disk? Else copy the bundle again or recompile it.",
    )


def _changed(path: Path, how: str) -> PackageError:
    return PackageError(
        f"{path} changed while it was read: it {how}",
        "Run again when nothing writes to the bundle, or recompile it.",
    )
