"""What a planner must know of a run: chunks with their bytes, and the order in which they are used.

Pure data, without a device and without a budget. `planning.from_bundle` makes one of a bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from odsora_compiler.errors import UsageError


@dataclass(frozen=True)
class Chunk:
    """A package that is loaded as a whole.

    `read_bytes`: what a load reads. `resident_bytes`: what its weights take once in memory, more
    where an executor widens them. `compute_units`: what of a device computes it.
    """

    name: str
    component: str
    read_bytes: int
    resident_bytes: int
    compute_units: str = "cpu_and_gpu"


@dataclass(frozen=True)
class Use:
    """One execution of a chunk: `chunk` is its index in the workload, `call` the host's call.

    `activation_bytes`: most bytes of all tensors but weights while it runs: its inputs, outputs and
    what it computes between them, values that pass by, and what the host holds. `boundary_bytes`:
    those of them that are there before it starts.
    """

    chunk: int
    function: str
    call: int
    flops: int
    activation_bytes: int
    boundary_bytes: int = 0


@dataclass(frozen=True)
class Workload:
    """Chunks, and their uses in order; an early exit leaves a stretch of the uses out."""

    chunks: tuple[Chunk, ...]
    uses: tuple[Use, ...]

    def __post_init__(self) -> None:
        for use in self.uses:
            if not 0 <= use.chunk < len(self.chunks):
                raise ValueError(f"a use names chunk {use.chunk} of {len(self.chunks)}")
            if use.boundary_bytes > use.activation_bytes:
                raise ValueError(
                    f"a use of '{self.chunks[use.chunk].name}' starts with {use.boundary_bytes} "
                    f"bytes, more than its most of {use.activation_bytes}"
                )

    @cached_property
    def next_uses(self) -> tuple[int | None, ...]:
        """Per use, the next use of the same chunk."""
        coming: dict[int, int] = {}
        found: list[int | None] = []
        for index in range(len(self.uses) - 1, -1, -1):
            chunk = self.uses[index].chunk
            found.append(coming.get(chunk))
            coming[chunk] = index
        return tuple(reversed(found))

    @cached_property
    def call_starts(self) -> dict[int, int]:
        """Call of the host → its first use."""
        starts: dict[int, int] = {}
        for index, use in enumerate(self.uses):
            starts.setdefault(use.call, index)
        return starts

    @cached_property
    def segments(self) -> tuple[range, ...]:
        """The uses in stretches that share no chunk: what is loaded in one is of no use in others.

        Components that are called one after another are segments, those that take turns are one.
        """
        found: list[range] = []
        start, last = 0, -1
        for index, later in enumerate(self.next_uses):
            last = max(last, index, later or 0)
            if last == index:
                found.append(range(start, index + 1))
                start = index + 1
        return tuple(found)

    @property
    def weight_bytes(self) -> int:
        """Bytes that all chunks that are used take together."""
        return sum(self.chunks[index].resident_bytes for index in {u.chunk for u in self.uses})

    @property
    def least_budget(self) -> int:
        """The least bytes of memory any schedule needs: a chunk and what its run holds."""
        return max((self._needed(use) for use in self.uses), default=0)

    def most_needed(self) -> Use:
        """The use that needs most memory."""
        return max(self.uses, key=self._needed)

    def check_budget(self, budget: int) -> None:
        """Raise `UsageError` naming the least budget where `budget` is below it."""
        if self.uses and budget < self.least_budget:
            use = self.most_needed()
            chunk = self.chunks[use.chunk]
            raise UsageError(
                f"the memory budget is {int(budget)} bytes; chunk '{chunk.name}' takes "
                f"{chunk.resident_bytes} and running its function '{use.function}' "
                f"{use.activation_bytes}",
                f"Give at least {self.least_budget} bytes, or compile with a smaller cidl budget.",
            )

    def rest(self, start: int) -> Workload:
        """The workload from use `start` on, to plan anew in the middle of a run."""
        return Workload(self.chunks, self.uses[start:])

    def with_calls(self, calls: Sequence[int]) -> Workload:
        """Only the uses of these calls."""
        wanted = set(calls)
        return Workload(self.chunks, tuple(use for use in self.uses if use.call in wanted))

    def _needed(self, use: Use) -> int:
        return self.chunks[use.chunk].resident_bytes + use.activation_bytes
