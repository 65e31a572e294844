"""Putting the weights of some functions of a package into memory, all at once and in one reading.

A function reads each of its weights in the types that its operations compute in. Here every weight
gets, for each of these types, its place in one buffer; the weights file is read from front to back,
and each block is converted right into the places it belongs to. Afterwards running a function reads
nothing, converts nothing and holds no mapping of a file. Where blocks come from is the caller's.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch

from odsora_compiler.errors import PackageError
from odsora_compiler.mil.blobs import ALIGNMENT, BlobEntry, unpack
from odsora_compiler.mil.constants import Compressed, Constant, Inline, Weight
from odsora_compiler.mil.memory import Buffer, Buffers, return_freed_memory
from odsora_compiler.mil.package import Package

# Gives all bytes of a file in order, as (offset, bytes that are valid until the next step). Offsets
# are multiples of 64, so that no element is in two blocks.
Blocks: TypeAlias = Callable[[Path], Iterator[tuple[int, memoryview]]]

# Unpacking or spelling something out takes at most this many times the bytes of what comes out:
# itself, and less than that for what lies in between. Measured; see `ops.compression`.
_IN_BETWEEN = 2


class Loading:
    """The constants that some functions of one package read (`requests` of their interpreters).

    `resident_bytes`: what `load` takes: the weights in the types that are computed with, each once,
    and where some are compressed, what spelling them out needs for a while besides.

    Raises PackageError where the package is damaged.
    """

    def __init__(self, package: Package, requests: Iterable[tuple[Constant, torch.dtype]]) -> None:
        self._inline: list[tuple[Constant, torch.dtype]] = []
        self._places: dict[tuple[Hashable, torch.dtype], _Place] = {}
        self._spellings: dict[Hashable, _Spelling] = {}
        found: dict[Hashable, _Blob] = {}
        for constant, dtype in requests:
            if isinstance(constant, Inline):
                self._inline.append((constant, dtype))
            else:
                self._request(constant, dtype, package, found)
        self._blobs = sorted(found.values(), key=lambda blob: (blob.path, blob.start))
        self._refuse_overlaps()
        self._order()
        taken = self._lay_out() + self._scratch_bytes()
        self.resident_bytes = -(-taken // mmap.PAGESIZE) * mmap.PAGESIZE
        self._held: tuple[Buffer, Buffers] | None = None

    def load(self, blocks: Blocks, buffers: Buffers, cancelled: Callable[[], bool]) -> bool:
        """Read the weights into a buffer, from which the constants have their values then.

        False, and nothing is loaded, where `cancelled` said so between two blocks. Nothing is
        loaded either where anything raises; PackageError where a file has another size than when
        this object was made.
        """
        self.release()
        buffer = buffers.take(self.resident_bytes)
        done = False
        try:
            with _one_thread():
                done = self._fill(buffer, blocks, cancelled)
        finally:
            for blob in self._blobs:
                blob.let_go()
            if self._spellings:
                return_freed_memory()
            if not done:
                # An error that is kept keeps the buffer, by the frames it came through.
                buffer.discard()
                buffers.give_back(buffer)
        if done:
            self._held = buffer, buffers
            for place in self._places.values():
                for constant in place.constants:
                    constant.preset(place.within(buffer).view(constant.shape))
            for constant, dtype in self._inline:
                constant.tensor(dtype)
        return done

    def release(self) -> None:
        """Let go of what was loaded and give its buffer back; nothing where nothing was loaded."""
        if self._held is None:
            return
        for place in self._places.values():
            for constant in place.constants:
                constant.release()
        buffer, buffers = self._held
        self._held = None
        buffers.give_back(buffer)

    # ------------------------------------------------------------------ what lies where

    def _request(
        self,
        constant: Constant,
        dtype: torch.dtype,
        package: Package,
        found: dict[Hashable, _Blob],
    ) -> None:
        key = constant.key
        place = self._places.get((key, dtype))
        if place is not None:
            # Functions of a package share what they have in common.
            if all(constant is not known for known in place.constants):
                place.constants.append(constant)
            return
        self._places[key, dtype] = place = _Place(dtype, prod(constant.shape), [constant])
        if isinstance(constant, Weight):
            _blob_of(constant, package, found).places.append(place)
        elif isinstance(constant, Compressed):
            if key not in self._spellings:
                blobs = []
                for part in constant.stored():
                    blobs.append(_blob_of(part, package, found))
                    blobs[-1].parts.append(part)
                self._spellings[key] = _Spelling(constant, blobs)
            self._spellings[key].places.append(place)

    def _refuse_overlaps(self) -> None:
        for blob, following in pairwise(self._blobs):
            if blob.path == following.path and blob.stop > following.start:
                raise PackageError(
                    f"weights file {blob.path} has weights that overlap, at offsets {blob.start} "
                    f"and {following.start}",
                    "The package is damaged; compile it again.",
                )

    def _order(self) -> None:
        """Note after which blob what can be spelled out, and what is not needed any more then."""
        order = {id(blob): index for index, blob in enumerate(self._blobs)}
        last_use: dict[int, int] = {}
        for spelling in self._spellings.values():
            last = max((order[id(blob)] for blob in spelling.blobs), default=None)
            if last is None:
                continue
            self._blobs[last].completes.append(spelling)
            for blob in spelling.blobs:
                last_use[id(blob)] = max(last, last_use.get(id(blob), 0))
        for blob in self._blobs:
            if id(blob) in last_use:
                self._blobs[last_use[id(blob)]].frees.append(blob)

    def _lay_out(self) -> int:
        """Give every place its offset, in the order in which they are written; bytes of all."""
        size = 0
        sources: list[_Blob | _Spelling] = [*self._blobs, *self._spellings.values()]
        for source in sources:
            for place in source.places:
                place.offset = size
                size += -(-place.elements * place.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return size

    def _scratch_bytes(self) -> int:
        """Most bytes that weights on their way to being spelled out take at once."""
        held = most = 0
        for blob in self._blobs:
            if blob.staged:
                most = max(most, held + blob.entry.size + _IN_BETWEEN * blob.unpacked_bytes)
                held += blob.unpacked_bytes if blob.parts else 0
            for spelling in blob.completes:
                most = max(most, held + _IN_BETWEEN * _spelled_bytes(spelling.constant))
            held -= sum(other.unpacked_bytes for other in blob.frees)
        return most

    # ------------------------------------------------------------------ how it gets there

    def _fill(self, buffer: Buffer, blocks: Blocks, cancelled: Callable[[], bool]) -> bool:
        """Read everything into `buffer`; False where it was cancelled."""
        for spelling in self._spellings.values():
            if not spelling.blobs:
                spelling.spell_out(buffer)
        for path, group in groupby(self._blobs, key=lambda blob: blob.path):
            pending = deque(group)
            size, end = pending[0].file_size, 0
            for start, block in blocks(path):
                if cancelled():
                    return False
                end = start + len(block)
                while pending and pending[0].start < end:
                    pending[0].receive(block, start, buffer)
                    if pending[0].stop > end:
                        break
                    pending.popleft().complete(buffer)
            if end != size:
                raise PackageError(
                    f"weights file {path} has {end} bytes, and had {size} when it was opened",
                    "Run again when nothing writes to the bundle, or compile it again.",
                )
            # Blobs without bytes may stand at the very end.
            for blob in pending:
                blob.complete(buffer)
        return not cancelled()


@dataclass(eq=False, slots=True)
class _Place:
    """Where elements lie in the buffer, in one type, and the constants that have them."""

    dtype: torch.dtype
    elements: int
    constants: list[Constant]
    offset: int = 0

    def within(self, buffer: Buffer) -> torch.Tensor:
        return buffer.tensor(self.offset, self.dtype, (self.elements,))


@dataclass(eq=False, slots=True)
class _Spelling:
    """A compressed constant, the blobs it is spelled out from, and the places it goes to."""

    constant: Compressed
    blobs: list[_Blob]
    places: list[_Place] = field(default_factory=list)

    def spell_out(self, buffer: Buffer) -> None:
        dense = self.constant.peek().reshape(-1)
        for place in self.places:
            place.within(buffer).copy_(dense)


@dataclass(eq=False, slots=True)
class _Blob:
    """A blob of a weights file: the places it goes to as it is, and the parts of compressed weights
    that it is. When it is there, some `completes` can be spelled out, and `frees` are not needed
    any more."""

    path: Path
    file_size: int
    entry: BlobEntry
    places: list[_Place] = field(default_factory=list)
    parts: list[Weight] = field(default_factory=list)
    completes: list[_Spelling] = field(default_factory=list)
    frees: list[_Blob] = field(default_factory=list)
    stage: torch.Tensor | None = None

    @property
    def start(self) -> int:
        return self.entry.data_offset

    @property
    def stop(self) -> int:
        return self.entry.data_offset + self.entry.size

    @property
    def staged(self) -> bool:
        """Whether it has to be there as a whole before anything is made of it."""
        return bool(self.parts) or self.entry.dtype.packed

    @property
    def unpacked_bytes(self) -> int:
        return self.entry.elements * self.entry.dtype.torch_dtype.itemsize

    def receive(self, block: memoryview, start: int, buffer: Buffer) -> None:
        """Take what is this blob's of a block that begins at `start` in the file."""
        begin, end = max(self.start, start), min(self.stop, start + len(block))
        if begin == end:
            return
        piece, at = block[begin - start : end - start], begin - self.start
        if self.staged:
            if self.stage is None:
                self.stage = torch.empty(self.entry.size, dtype=torch.uint8)
            raw = torch.frombuffer(piece, dtype=torch.uint8)
            self.stage[at : at + len(piece)].copy_(raw)
        if not self.entry.dtype.packed and self.places:
            source = torch.frombuffer(piece, dtype=self.entry.dtype.torch_dtype)
            first = at // source.itemsize
            for place in self.places:
                place.within(buffer)[first : first + source.numel()].copy_(source)

    def complete(self, buffer: Buffer) -> None:
        """All of it was received."""
        if self.staged:
            values = self._values()
            if self.entry.dtype.packed:
                for place in self.places:
                    place.within(buffer).copy_(values)
            for part in self.parts:
                part.preset(values.to(part.dtype).view(part.shape))
            self.stage = None
        for spelling in self.completes:
            spelling.spell_out(buffer)
        for blob in self.frees:
            blob.let_go()

    def let_go(self) -> None:
        """Forget what was received."""
        self.stage = None
        for part in self.parts:
            part.release()

    def _values(self) -> torch.Tensor:
        dtype = self.entry.dtype
        if self.stage is None:
            return torch.empty(0, dtype=dtype.torch_dtype)
        if dtype.packed:
            return unpack(self.stage, dtype, self.entry.elements)
        return self.stage.view(dtype.torch_dtype)


def _spelled_bytes(constant: Compressed) -> int:
    """Bytes of a constant in its own type, and of the compressed parts that are made for it."""
    assert constant.dtype is not None, "what is compressed is a tensor"
    parts = (part for part in constant.parts.values() if isinstance(part, Compressed))
    return prod(constant.shape) * constant.dtype.itemsize + sum(map(_spelled_bytes, parts))


def _blob_of(weight: Weight, package: Package, found: dict[Hashable, _Blob]) -> _Blob:
    if weight.key not in found:
        file = package.blobs(weight.reference.file)
        found[weight.key] = _Blob(file.path, len(file), file.entry(weight.reference.offset))
    return found[weight.key]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use this thread alone for what this thread does.

    Every thread in which torch has much to do gets a team of threads of its own. For a loader's it
    is not worth it: copying a block of 1 MB takes 0.1 ms on one thread and on two, and loading
    while another thread multiplies matrices takes as long on one (on 2 cores, medians of 11), with
    1 % less of the processors' time and without a team that comes and goes with every loader.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # This thread has its number now, but threads in which torch is used for the first time from now
    # on would start with it too. What another thread sets is again theirs, and not this one's.
    other = threading.Thread(target=torch.set_num_threads, args=(threads,))
    other.start()
    other.join()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
