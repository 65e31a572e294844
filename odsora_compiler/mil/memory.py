"""Memory for weights that are held as long as a chunk is loaded, and given back when it is not.

Every buffer is an anonymous mapping of its own, because malloc keeps freed blocks of up to 32 MB
for itself, which for a chunk's weights would add up to all of them. A mapping is gone when the last
tensor over it is. Which weights lie where is left to `loading`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from math import prod
from weakref import WeakSet

import torch

# Below this many bytes a mapping of its own is not worth its pages.
_LARGE = 1 << 20


class Buffer:
    """`size` bytes of memory of their own that start on a page, zeros at first."""

    def __init__(self, size: int) -> None:
        self.size = size
        # A mapping has one byte at least.
        self.memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Filling 64 MB for the first time takes 8 ms in pages of 2 MB and 28 ms in pages of
            # 4 KB (which MAP_POPULATE makes 27); a system without huge pages says so and goes on.
            with suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)

    def discard(self) -> None:
        """Make all bytes zeros that take no memory until they are written."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)

    def tensor(self, offset: int, dtype: torch.dtype, shape: Iterable[int]) -> torch.Tensor:
        """A tensor over the bytes from `offset` on, not copied. It keeps the memory alive."""
        shape = tuple(shape)
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self.memory, dtype=dtype, count=prod(shape), offset=offset)
        return flat.view(shape)


class Buffers:
    """Buffers that are handed from one chunk to the next. Threads may share one.

    The system fills new memory with zeros, which takes longer than copying a chunk's weights into
    it: a buffer of the same size that was given back is used again where `keep` allows it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[Buffer]] = {}
        self._kept: Counter[int] = Counter()
        self._mapped: WeakSet[mmap.mmap] = WeakSet()

    def take(self, size: int) -> Buffer:
        """A buffer of exactly `size` bytes; what stands in it is undefined."""
        with self._lock:
            if self._free.get(size):
                return self._free[size].pop()
            buffer = Buffer(size)
            self._mapped.add(buffer.memory)
            return buffer

    def give_back(self, buffer: Buffer) -> None:
        """The buffer is not needed any more: nothing may read or write tensors over it."""
        with self._lock:
            self._free.setdefault(buffer.size, []).append(buffer)
            self._trim()

    def keep(self, sizes: Collection[int]) -> None:
        """Say which buffers that are given back may stay mapped, now and from now on: one for each
        size in `sizes`, where a size may stand several times. All others are unmapped at once."""
        with self._lock:
            self._kept = Counter(sizes)
            self._trim()

    def clear(self) -> None:
        """Unmap all that was given back, and what will be, until `keep` is called again."""
        self.keep(())

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all buffers that are mapped, whether taken, free, or given back and unmapped but
        for a tensor that someone still holds."""
        with self._lock:
            return sum(len(memory) for memory in self._mapped)

    def _trim(self) -> None:
        for size, free in self._free.items():
            del free[self._kept[size] :]
        self._free = {size: free for size, free in self._free.items() if free}


def return_freed_memory() -> None:
    """Give what the C library keeps of freed memory back to the system, where it can be told to."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in another type whose memory returns to the system as soon as it is let go."""
    size = tensor.numel() * dtype.itemsize
    if size < _LARGE:
        return tensor.to(dtype)
    return Buffer(size).tensor(0, dtype, tensor.shape).copy_(tensor)
