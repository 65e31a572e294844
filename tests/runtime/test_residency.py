"""The rule of plans as threads follow it: order, memory, early exits, failures, endings.

Packages here are made up, so that a test says when a load goes on. Nothing sleeps: a test waits for
what it expects, and a time-out says that it did not come.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch

from odsora_compiler.errors import OdsoraError, PackageError, RunError
from odsora_compiler.mil.memory import Buffer, Buffers
from odsora_compiler.planning.plan import Load, SchedulePlan, plan_of
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Chunk, Use, Workload
from odsora_compiler.runtime.residency import ChunkSource, Residency
from odsora_compiler.runtime.storage import Storage
from odsora_compiler.runtime.trace import Trace

pytestmark = pytest.mark.timeout(30, func_only=True)

SIZE = 100
PATIENCE = 10.0  # seconds until something that should happen is given up


class Memory:
    """What packages hold together, as it happens."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: set[str] = set()
        self.held = self.peak = 0
        self.log: list[tuple[str, str]] = []

    def add(self, size: int) -> None:
        with self.lock:
            self.held += size
            self.peak = max(self.peak, self.held)


class MadeUpPackage:
    """Holds a buffer of its size once `gate` lets its load through, unless that is cancelled."""

    def __init__(self, name: str, size: int, memory: Memory, open_gate: bool = True) -> None:
        self.name, self.size, self.memory = name, size, memory
        self.gate = threading.Event()
        if open_gate:
            self.gate.set()
        self.started = threading.Event()
        self.error: BaseException | None = None
        self.buffer: Buffer | None = None
        self.buffers: Buffers | None = None

    def resident_bytes(self, functions: Collection[str]) -> int:
        return self.size

    def load(
        self,
        functions: Collection[str],
        storage: Storage,
        buffers: Buffers,
        cancelled: Callable[[], bool],
    ) -> None:
        assert self.buffer is None and self.name not in self.memory.loaded
        self.memory.log.append(("load", self.name))
        self.memory.add(self.size)
        self.started.set()
        while not self.gate.wait(0.001) and not cancelled():
            pass
        if self.error is not None or cancelled():
            self.memory.add(-self.size)
            if self.error is not None:
                raise self.error
            return
        self.buffers, self.buffer = buffers, buffers.take(self.size)
        self.memory.loaded.add(self.name)

    def run(self, function: str, inputs: Any) -> dict[str, torch.Tensor]:
        assert self.buffer is not None
        return {}

    def release(self) -> None:
        if self.buffer is not None and self.buffers is not None:
            self.buffers.give_back(self.buffer)
            self.buffer = None
            self.memory.add(-self.size)
            self.memory.loaded.discard(self.name)
            self.memory.log.append(("evict", self.name))


class Bench:
    """A workload with its packages; `residency` of a plan is closed when the test is over."""

    def __init__(self, workload: Workload, shut: Collection[int] = ()) -> None:
        self.workload = workload
        self.memory = Memory()
        self.packages = [
            MadeUpPackage(chunk.name, chunk.resident_bytes, self.memory, index not in shut)
            for index, chunk in enumerate(workload.chunks)
        ]
        self.sources = [ChunkSource(package, frozenset({"base"})) for package in self.packages]
        self.buffers = Buffers()
        self.trace = Trace()
        self.opened: list[Residency] = []

    def residency(
        self, plan: SchedulePlan, present: Collection[int] = (), start: int = 0
    ) -> Residency:
        rest = self.workload.rest(start)
        made = Residency(rest, plan, self.sources, Storage(), self.buffers, self.trace, present)
        self.opened.append(made)
        made.start()
        return made

    def close(self) -> None:
        for residency in self.opened:
            residency.close()
        assert not [t for t in threading.enumerate() if t.name == "odsora-loader"]
        assert self.memory.held == 0 and not self.memory.loaded
        assert self.buffers.mapped_bytes == 0


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*arguments: Any, **options: Any) -> Bench:
        made.append(Bench(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def network(chunks: int, calls: int, activation: int = 0) -> Workload:
    made = tuple(Chunk(f"net-{index:02d}", "net", SIZE, SIZE) for index in range(chunks))
    uses = [Use(c, "base", call, 1, activation) for call in range(calls) for c in range(chunks)]
    return Workload(made, tuple(uses))


def jit(workload: Workload, ahead: int = 1) -> SchedulePlan:
    """Every use is loaded for, `ahead` of them before it."""
    loads = [Load(use.chunk, i, i, max(0, i - ahead)) for i, use in enumerate(workload.uses)]
    return plan_of(workload, loads, (1 + ahead) * SIZE)


def soon(happens: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    event = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if happens():
            return
        event.wait(0.001)
    raise AssertionError("it did not happen")


def test_loads_go_ahead_as_far_as_the_plan_says(bench: Callable[..., Bench]) -> None:
    table = bench(network(4, 1))
    residency = table.residency(jit(table.workload))
    for use in range(4):
        package = residency.acquire(use)
        assert package is table.packages[use]
        if use < 3:
            assert table.packages[use + 1].started.wait(PATIENCE)
        # The one after next waits until this use is done.
        assert not any(later.started.is_set() for later in table.packages[use + 2 :])
        residency.finished(use)
        assert table.packages[use].buffer is None
    assert table.memory.peak <= 2 * SIZE


def test_memory_is_given_back_before_the_next_load_starts(bench: Callable[..., Bench]) -> None:
    table = bench(network(3, 2))
    residency = table.residency(jit(table.workload, ahead=0))
    for use in range(6):
        residency.acquire(use)
        residency.finished(use)
    names = [f"net-{use % 3:02d}" for use in range(6)]
    assert table.memory.log == [(do, name) for name in names for do in ("load", "evict")]
    assert table.memory.peak == SIZE


def test_a_chunk_stays_as_long_as_its_load_says(bench: Callable[..., Bench]) -> None:
    table = bench(network(2, 3))
    loads = [Load(0, 0, 4, 0), Load(1, 1, 1, 0), Load(1, 3, 3, 2), Load(1, 5, 5, 4)]
    residency = table.residency(plan_of(table.workload, loads, 200))
    for use in range(6):
        residency.acquire(use)
        residency.finished(use)
        assert ("net-00" in table.memory.loaded) == (use < 4)
    assert [name for do, name in table.memory.log if do == "load"].count("net-00") == 1


def test_a_buffer_is_handed_to_the_load_that_comes(bench: Callable[..., Bench]) -> None:
    table = bench(network(3, 1))
    residency = table.residency(jit(table.workload, ahead=0))
    residency.acquire(0)
    first = table.packages[0].buffer
    residency.finished(0)
    residency.acquire(1)
    assert table.packages[1].buffer is first
    del first
    residency.finished(1)
    residency.acquire(2)
    residency.finished(2)
    assert table.buffers.mapped_bytes == 0


def test_a_chunk_that_is_still_there_is_not_read_again(bench: Callable[..., Bench]) -> None:
    """A plan may have room for two copies; one is enough."""
    table = bench(network(1, 2))
    plan = plan_of(table.workload, [Load(0, 0, 0, 0), Load(0, 1, 1, 0)], 200)
    residency = table.residency(plan)
    residency.acquire(0)
    soon(lambda: len(residency._loaded) == 2)
    residency.finished(0)
    assert table.memory.loaded == {"net-00"}
    residency.acquire(1)
    residency.finished(1)
    assert table.memory.log == [("load", "net-00"), ("evict", "net-00")]


def test_what_an_early_exit_leaves_out_is_not_loaded(bench: Callable[..., Bench]) -> None:
    """Calls 1 to 3 of 5 are left out while a load for call 1 is under way."""
    table = bench(network(3, 5), shut=[1])
    residency = table.residency(jit(table.workload))
    residency.acquire(0)
    assert table.packages[1].started.wait(PATIENCE)
    residency.skip(12)
    assert "net-01" not in table.memory.loaded
    assert residency.acquire(12) is table.packages[0]
    table.packages[1].gate.set()
    for use in range(12, 15):
        residency.acquire(use)
        residency.finished(use)
    loads = [name for do, name in table.memory.log if do == "load"]
    # One for use 0, the one that was cancelled, and those of the last call.
    assert loads == ["net-00", "net-01", "net-00", "net-01", "net-02"]
    assert table.memory.peak <= 2 * SIZE


def test_what_stays_over_an_early_exit_is_not_loaded_again(bench: Callable[..., Bench]) -> None:
    table = bench(network(2, 4))
    loads = [Load(0, 0, 6, 0), *(Load(1, use, use, use) for use in (1, 3, 5, 7))]
    residency = table.residency(plan_of(table.workload, loads, 200))
    residency.acquire(0)
    residency.finished(0)
    residency.skip(6)
    residency.acquire(6)
    residency.finished(6)
    residency.acquire(7)
    assert [name for do, name in table.memory.log if do == "load"].count("net-00") == 1


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (PackageError("x.bin is short"), PackageError, "chunk 'net-01': x.bin is short"),
        (PackageError("a/net-01/x is short"), PackageError, "^a/net-01/x is short"),
        (OSError(5, "broken disk"), RunError, "chunk 'net-01' could not be loaded: OSError.*disk"),
        (SystemExit(3), RunError, "chunk 'net-01' could not be loaded: SystemExit"),
    ],
)
def test_a_failing_load_is_told_to_the_use_that_needs_it(
    bench: Callable[..., Bench],
    raised: BaseException,
    expected: type[OdsoraError],
    message: str,
) -> None:
    table = bench(network(3, 1))
    table.packages[1].error = raised
    residency = table.residency(jit(table.workload, ahead=2))
    residency.acquire(0)
    soon(lambda: residency._failure is not None)
    residency.finished(0)
    with pytest.raises(expected, match=message) as caught:
        residency.acquire(1)
    assert raised in (caught.value, caught.value.__cause__)
    # It does not go away by asking again.
    with pytest.raises(expected, match=message):
        residency.acquire(1)


def test_a_failing_load_that_an_early_exit_leaves_out_does_no_harm(
    bench: Callable[..., Bench],
) -> None:
    table = bench(network(3, 1))
    table.packages[1].error = PackageError("damaged")
    residency = table.residency(jit(table.workload))
    residency.acquire(0)
    soon(lambda: residency._failure is not None)
    residency.finished(0)
    residency.skip(2)
    assert residency.acquire(2) is table.packages[2]


def test_a_loader_that_dies_is_an_error_and_no_hang(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bench(network(3, 1), shut=[0])
    residency = table.residency(jit(table.workload))

    def broken(index: int) -> bool:
        raise ZeroDivisionError("a bug")

    assert table.packages[0].started.wait(PATIENCE)
    monkeypatch.setattr(residency, "_allowed", broken)
    table.packages[0].gate.set()
    residency.acquire(0)
    residency.finished(0)
    with pytest.raises(RunError, match=r"the thread that loads chunks ended: .*a bug"):
        residency.acquire(1)


def test_stopping_cancels_what_is_under_way_and_keeps_what_is_there(
    bench: Callable[..., Bench],
) -> None:
    table = bench(network(3, 2), shut=[2])
    residency = table.residency(jit(table.workload, ahead=2))
    residency.acquire(0)
    assert table.packages[2].started.wait(PATIENCE)
    assert residency.stop() == {0, 1}
    assert table.memory.loaded == {"net-00", "net-01"} and table.memory.held == 2 * SIZE
    residency.close()
    residency.close()


def test_a_plan_for_the_rest_takes_over_what_it_has_room_for(bench: Callable[..., Bench]) -> None:
    table = bench(network(3, 2))
    first = table.residency(plan_of(table.workload, [Load(c, c, c + 3, 0) for c in range(3)], 300))
    for use in range(3):
        first.acquire(use)
        first.finished(use)
    present = first.stop()
    assert present == {0, 1, 2}
    # From use 3 on there is room for two chunks: 0 is used at once, 1 can stay, 2 cannot.
    rest = table.workload.rest(3)
    plan = plan_of(rest, [Load(0, 0, 0, 0), Load(1, 1, 1, 1), Load(2, 2, 2, 1)], 200)
    second = table.residency(plan, present, start=3)
    assert table.memory.loaded == {"net-00", "net-01"}
    for use in range(3):
        second.acquire(use)
        second.finished(use)
    loads = [name for do, name in table.memory.log if do == "load"]
    assert loads == ["net-00", "net-01", "net-02", "net-02"]


@pytest.mark.parametrize("seed", range(40))
def test_memory_never_exceeds_the_plan_whatever_the_timing(
    bench: Callable[..., Bench], seed: int
) -> None:
    """Random workloads, budgets and exits; loads take as long as chance has it."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 6))]
    chunks = tuple(Chunk(f"c{i}", "net", size, size) for i, size in enumerate(sizes))
    uses = [
        Use(chunk, "base", call, draw.randint(1, 9), draw.randint(0, 40))
        for call in range(draw.randint(1, 5))
        for chunk in range(len(chunks))
    ]
    workload = Workload(chunks, tuple(uses))
    budget = draw.randint(workload.least_budget, workload.least_budget + 150)
    device = DeviceProfile("test", "made up", 10**6, 100.0, 0.0, {"any": 10.0})
    plan = make_plan(workload, device, budget)
    table = bench(workload)
    residency = table.residency(plan)
    use = 0
    while use < len(uses):
        residency.acquire(use)
        held = uses[use].activation_bytes
        for _ in range(draw.randint(0, 3)):
            threading.Event().wait(draw.choice((0, 1e-4)))
            assert table.memory.held + held <= plan.peak_bytes <= budget
            assert table.buffers.mapped_bytes + held <= plan.peak_bytes
        residency.finished(use)
        use += 1
        if draw.random() < 0.2:
            use = draw.randint(use, len(uses))
            residency.skip(use)
    recorded = [size for _, size in table.trace.timeline().memory]
    assert max(recorded) <= plan.peak_bytes and recorded[-1] <= max(sizes) * len(sizes)
