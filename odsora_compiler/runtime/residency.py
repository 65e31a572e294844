"""Which chunks are in memory: executes one schedule, by the rule that `planning.plan` states.

One thread loads, the caller's computes. What is loaded when, and where its numbers are from, is the
plan's; how a package reads its weights is the executor's.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from odsora_compiler.errors import OdsoraError, RunError
from odsora_compiler.planning.plan import SchedulePlan, occupancy
from odsora_compiler.planning.workload import Workload
from odsora_compiler.runtime.trace import Trace

if TYPE_CHECKING:
    from odsora_compiler.mil.memory import Buffers
    from odsora_compiler.runtime.executors import OpenPackage
    from odsora_compiler.runtime.storage import Storage


@dataclass(frozen=True)
class ChunkSource:
    """A chunk of a workload: its package, and the functions that it is loaded for."""

    package: OpenPackage
    functions: frozenset[str]


class Residency:
    """The memory of one run of `plan`, a plan of `workload`.

    `sources`: per chunk of the workload; None for one that is not used. `present`: chunks that are
    in memory already; those that the plan has room for until they are used stay, the others are
    given back. Uses are executed in order: `acquire`, `finished`; `skip` for those left out. All
    methods are for one thread, the computing one. `close` must be called in the end.
    """

    def __init__(
        self,
        workload: Workload,
        plan: SchedulePlan,
        sources: Sequence[ChunkSource | None],
        storage: Storage,
        buffers: Buffers,
        trace: Trace,
        present: Collection[int] = (),
    ) -> None:
        plan.check(workload)
        self._workload = workload
        self._plan = plan
        self._sources = sources
        self._storage = storage
        self._buffers = buffers
        self._trace = trace
        # All that follows is shared with the loader, and changed with this lock held.
        self._changed = threading.Condition()
        self._done = 0  # uses that are done or left out
        self._next = 0  # the load that is up next
        self._under_way: int | None = None
        self._stopping = False
        # A load that failed (None: all of them) and what it raised.
        self._failure: tuple[int | None, BaseException] | None = None
        # Loads that are done. Chunk → the loads for which it is, or is coming, into memory: a plan
        # may load a chunk again before it has given it back, which takes no reading.
        self._loaded = _kept(workload, plan, present)
        self._holders: dict[int, set[int]] = {chunk: set() for chunk in present}
        for index in self._loaded:
            self._holders[plan.loads[index].chunk].add(index)
        self._loader = threading.Thread(target=self._run_loader, name="odsora-loader", daemon=True)

    def start(self) -> None:
        """Give back what has no room, and begin to load."""
        with self._changed:
            self._buffers.keep([self._size(index) for index in self._coming(0)])
            for chunk in [chunk for chunk, loads in self._holders.items() if not loads]:
                self._give_back(chunk)
            self._record()
        self._loader.start()

    def acquire(self, use: int) -> OpenPackage:
        """The package for use number `use`, as soon as it is loaded.

        Raises what the load raised, if it is one of this project's errors or `MemoryError`, else
        `RunError`.
        """
        index = self._plan.serving[use]
        with self._changed:
            assert use == self._done, "uses are executed in order"
            if index not in self._loaded:
                with self._trace.span("stall", self._name(index)):
                    self._changed.wait_for(lambda: index in self._loaded or self._error())
            error = self._error()
            if index not in self._loaded and error is not None:
                raise error
        return self._source(index).package

    def finished(self, use: int) -> None:
        """Use number `use` is done: what is needed no longer is given back."""
        self._advance(use + 1)

    def skip(self, use: int) -> None:
        """Uses before number `use` that are not done are left out, and what is loaded for them."""
        if use > self._done:
            self._advance(use)

    def stop(self) -> frozenset[int]:
        """End the loader, and what it is loading; the chunks that are in memory and stay there."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._loader.ident is not None:
            self._loader.join()
        return frozenset(chunk for chunk, loads in self._holders.items() if loads)

    def close(self) -> None:
        """End the loader and give everything back. May be called at any time and again."""
        self.stop()
        with self._changed:
            for chunk in list(self._holders):
                self._give_back(chunk)
            self._buffers.keep([])
            self._record()

    # ------------------------------------------------------------------ both threads

    def _advance(self, done: int) -> None:
        """`done` uses are done. What only they needed is given back before they count as done."""
        loads = self._plan.loads
        with self._changed:
            over = [index for index in self._loaded if loads[index].last_use < done]
            for index in over:
                self._holders[loads[index].chunk].discard(index)
            self._buffers.keep([self._size(index) for index in self._coming(done)])
            for index in over:
                self._drop(index)
            self._done = done
            self._record()
            self._changed.notify_all()
            # A load that is of no use any more makes room before anything else runs.
            self._changed.wait_for(
                lambda: self._under_way is None or loads[self._under_way].last_use >= done
            )

    def _coming(self, done: int) -> Iterator[int]:
        """Loads that may start when `done` uses are done, and read something."""
        for index in range(self._next, len(self._plan.loads)):
            load = self._plan.loads[index]
            if load.after > done:
                break
            if load.last_use >= done and not self._holders.get(load.chunk):
                yield index

    def _drop(self, index: int) -> None:
        self._loaded.discard(index)
        chunk = self._plan.loads[index].chunk
        self._holders[chunk].discard(index)
        if not self._holders[chunk]:
            self._give_back(chunk)

    def _give_back(self, chunk: int) -> None:
        """The memory of a chunk."""
        source = self._sources[chunk]
        assert source is not None, "only chunks that are used are in memory"
        with self._trace.span("evict", self._plan.chunks[chunk]):
            source.package.release()
        self._holders.pop(chunk, None)

    def _record(self) -> None:
        """Bytes in memory as the plan counts them."""
        weights = sum(self._workload.chunks[chunk].resident_bytes for chunk in self._holders)
        uses = self._workload.uses
        running = not self._stopping and self._done < len(uses)
        self._trace.memory(weights, uses[self._done].activation_bytes if running else 0)

    def _error(self) -> BaseException | None:
        """What keeps loads from being done, unless only loads that nobody needs any more."""
        if self._failure is None:
            return None
        index, error = self._failure
        return None if index is not None and self._unneeded(index) else error

    def _unneeded(self, index: int) -> bool:
        """Whether nobody waits for a load, now and ever."""
        return self._stopping or self._plan.loads[index].last_use < self._done

    def _source(self, index: int) -> ChunkSource:
        source = self._sources[self._plan.loads[index].chunk]
        assert source is not None, "only chunks that are used are loaded"
        return source

    def _name(self, index: int) -> str:
        return self._plan.chunks[self._plan.loads[index].chunk]

    def _size(self, index: int) -> int:
        return self._workload.chunks[self._plan.loads[index].chunk].resident_bytes

    # ------------------------------------------------------------------ the loader's thread

    def _run_loader(self) -> None:
        try:
            for index in range(len(self._plan.loads)):
                if self._allowed(index):
                    self._load(index)
        except BaseException as error:
            failure = RunError(f"the thread that loads chunks ended: {error!r}")
            failure.__cause__ = error
            with self._changed:
                self._under_way = None
                self._failure = None, failure
                self._changed.notify_all()

    def _allowed(self, index: int) -> bool:
        """Wait until a load may start; False where there is nothing to read."""
        load = self._plan.loads[index]
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._done >= load.after)
            self._next = index + 1
            if self._unneeded(index) or index in self._loaded:
                return False
            holders = self._holders.setdefault(load.chunk, set())
            holders.add(index)
            if len(holders) > 1:
                self._loaded.add(index)
                self._changed.notify_all()
                return False
            self._under_way = index
            self._record()
            return True

    def _load(self, index: int) -> None:
        """Load; a failure is there until nobody needs that load any more, or for ever."""
        source = self._source(index)
        failure: BaseException | None = None
        try:
            with self._trace.span("load", self._name(index)) as details:
                source.package.load(
                    source.functions, self._storage, self._buffers, lambda: self._unneeded(index)
                )
                if self._unneeded(index):
                    details["given up"] = True
        except BaseException as error:
            failure = _told(error, self._name(index))
        with self._changed:
            if failure is None and not self._unneeded(index):
                self._loaded.add(index)
            else:
                self._drop(index)
                self._record()
            self._under_way = None
            if failure is not None:
                self._failure = index, failure
            self._changed.notify_all()
            if failure is not None:
                self._changed.wait_for(lambda: self._unneeded(index))
                self._failure = None


def _told(error: BaseException, chunk: str) -> BaseException:
    """The error of a load, such that it names the chunk."""
    if isinstance(error, OdsoraError):
        if chunk not in error.message:
            error.message = f"chunk '{chunk}': {error.message}"
        return error
    if isinstance(error, MemoryError):
        told: Exception = MemoryError(f"no memory for chunk '{chunk}'")
    else:
        told = RunError(f"chunk '{chunk}' could not be loaded: {error!r}")
    told.__cause__ = error
    return told


def _kept(workload: Workload, plan: SchedulePlan, present: Collection[int]) -> set[int]:
    """Loads for which a chunk that is `present` can stay from the beginning within the budget."""
    loads = list(plan.loads)
    found: set[int] = set()
    left = set(present)
    for index, load in enumerate(plan.loads):
        if load.chunk in left:
            left.remove(load.chunk)
            longer = [*loads[:index], replace(load, after=0), *loads[index + 1 :]]
            if max(occupancy(workload, longer)) <= plan.budget:
                loads = longer
                found.add(index)
    return found
