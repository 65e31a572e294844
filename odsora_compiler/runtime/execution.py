"""One run of a workload: its plan followed use by use, and made anew when memory is not as planned.

Who calls whom with which tensors is the runner's; what is loaded when, `residency`'s.
"""

from __future__ import annotations

import ctypes
import errno
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import torch

from odsora_compiler.errors import RunError
from odsora_compiler.mil.memory import Buffers
from odsora_compiler.planning.plan import Load, SchedulePlan, occupancy, place_loads
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Workload
from odsora_compiler.runtime.residency import ChunkSource, Residency
from odsora_compiler.runtime.storage import Storage
from odsora_compiler.runtime.trace import Trace

Tensors = Mapping[str, torch.Tensor]

# What a process that runs a bundle takes besides what a plan counts, in bytes of resident memory:
# Python, PyTorch, this package, programs without weights, blocks that are being read, buffers that
# PyTorch's products keep. Measured on Linux with PyTorch 2.13 on 2 cores: 306 MB when nothing has
# run yet, 322 to 330 MB in runs that read 800 MB of weights.
PROGRAM_BYTES = 350_000_000

_MMAP_THRESHOLD = -3  # of glibc's mallopt: blocks from this size on are mappings of their own
_LARGE_BLOCK = 4 << 20


def plan_within(workload: Workload, profile: DeviceProfile, budget: int | None) -> SchedulePlan:
    """A plan within `budget` bytes, or within as many as bring something; see `make_plan`."""
    return make_plan(workload, profile, ample_budget(workload) if budget is None else budget)


def ample_budget(workload: Workload) -> int:
    """Bytes with which every chunk stays from its first use to its last, and two come ahead."""
    loads = place_loads(workload, [True] * len(workload.uses), sys.maxsize) or ()
    just_in_time = [
        Load(each.chunk, each.first_use, each.last_use, each.first_use) for each in loads
    ]
    largest = sorted(workload.chunks[load.chunk].resident_bytes for load in loads)[-2:]
    return max(occupancy(workload, just_in_time), default=0) + sum(largest)


class Execution:
    """Runs the uses of `workload`, in order; an early exit leaves some out.

    `plan`: what is followed, made for the memory budget `planned_for`. `sources`: per chunk; None
    for one that is not used. `budget` is asked before every use: when it says something new, the
    rest is planned anew, and what is in memory and still wanted stays. Below what the rest needs at
    least, it goes on with that and warns. When memory runs out all the same, what was loaded ahead
    is given up. `close` must be called.
    """

    def __init__(
        self,
        workload: Workload,
        plan: SchedulePlan,
        planned_for: int | None,
        sources: Sequence[ChunkSource | None],
        profile: DeviceProfile,
        budget: Callable[[], int | None],
        storage: Storage,
        trace: Trace,
    ) -> None:
        self.plan = plan
        self.most_bytes = plan.budget  # of all plans that were followed
        self.executed: list[int] = []
        self._workload = workload
        self._sources = sources
        self._profile = profile
        self._budget = budget
        self._asked = planned_for
        self._storage = storage
        self._buffers = Buffers()
        self._trace = trace
        self._start = 0  # the use that is the plan's first
        self._residency = self._resident(())

    def start(self) -> None:
        """Begin to load."""
        # A thread has as many threads for torch as were set when it first asked, by whomever: this
        # one asks before the loader sets its own to one.
        torch.get_num_threads()
        if self._asked is not None:
            _return_freed_memory()
        self._residency.start()

    def run(self, use: int, function: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run the chunk of use number `use` on inputs of its declared dtypes."""
        budget = self._budget()
        if budget != self._asked:
            self._asked = budget
            self._plan_rest(use, budget)
        chunk = self._workload.chunks[self._workload.uses[use].chunk]
        while True:
            place = use - self._start
            self._residency.skip(place)
            try:
                package = self._residency.acquire(place)
                with self._trace.span("compute", chunk.name, function=function):
                    results = package.run(function, inputs)
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                self._shrink(use, error)
                continue
            self._residency.finished(place)
            self.executed.append(use)
            return results

    def close(self) -> None:
        """Stop loading and give all memory back. May be called at any time and again."""
        try:
            self._residency.close()
        finally:
            self._buffers.clear()

    def _resident(self, present: Collection[int]) -> Residency:
        rest = self._workload.rest(self._start)
        return Residency(
            rest, self.plan, self._sources, self._storage, self._buffers, self._trace, present
        )

    def _plan_rest(self, use: int, budget: int | None) -> None:
        """Follow a plan for the uses from `use` on within `budget`, or as little as possible."""
        rest = self._workload.rest(use)
        if budget is not None and budget < rest.least_budget:
            warnings.warn(
                f"the memory budget is {budget} bytes now, the rest of the run takes at least "
                f"{rest.least_budget}: it goes on with these",
                RuntimeWarning,
                stacklevel=2,
            )
            budget = rest.least_budget
        if budget is not None:
            _return_freed_memory()
        present = self._residency.stop()
        self.plan = plan_within(rest, self._profile, budget)
        self.most_bytes = max(self.most_bytes, self.plan.budget)
        self._start = use
        self._residency = self._resident(present)
        self._residency.start()

    def _shrink(self, use: int, error: Exception) -> None:
        """Memory ran out: follow a plan that takes what is in memory now, or the least."""
        least = self._workload.rest(use).least_budget
        if self.plan.budget <= least:
            raise RunError(
                f"no memory for the {least} bytes that the run needs at least",
                "Free some memory, or compile with a smaller cidl budget.",
            ) from error
        chunks = self._residency.stop()
        held = sum(self._workload.chunks[chunk].resident_bytes for chunk in chunks)
        held += self._workload.uses[use].activation_bytes
        budget = max(held, least) if held < self.plan.budget else least
        warnings.warn(
            f"memory ran out within a budget of {self.plan.budget} bytes: the run goes on with "
            f"{budget}",
            RuntimeWarning,
            stacklevel=2,
        )
        self._plan_rest(use, budget)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        # PyTorch has no error of its own for the CPU's memory.
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def _return_freed_memory() -> None:
    """Have freed memory return to the system, now and as soon as large blocks are freed.

    Else glibc keeps blocks of up to 32 MB for later, in holes that others do not fit into: a chunk
    that was counted with 154 MB of activations, and never had more, took 224 MB. What is computed
    with large tensors and few products takes longer so. Stays so for the rest of the process.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        with suppress(AttributeError):  # Other C libraries do not have these.
            library.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
            library.malloc_trim(0)
