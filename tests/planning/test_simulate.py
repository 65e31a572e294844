"""The rule of loads and uses, on schedules small enough to do by hand."""

from __future__ import annotations

import pytest
from workloads import device, even

from odsora_compiler.errors import PackageError, RunError
from odsora_compiler.planning.plan import Load, SchedulePlan, place_loads, plan_of
from odsora_compiler.planning.published import published_plan
from odsora_compiler.planning.simulate import Event, simulate
from odsora_compiler.planning.workload import Chunk, Use, Workload


def test_a_timeline_by_hand() -> None:
    workload = even(3, 1, activation=10)
    plan = plan_of(workload, [Load(0, 0, 0, 0), Load(1, 1, 1, 0), Load(2, 2, 2, 1)], 210)
    timeline = simulate(workload, plan, device(2))
    expected = [
        Event("stall", "net-00", 0, 2),
        Event("load", "net-00", 0, 2),
        Event("compute", "net-00", 2, 3),
        Event("load", "net-01", 2, 4),
        Event("evict", "net-00", 3, 3),
        Event("stall", "net-01", 3, 4),
        Event("compute", "net-01", 4, 5),
        Event("load", "net-02", 4, 6),
        Event("evict", "net-01", 5, 5),
        Event("stall", "net-02", 5, 6),
        Event("compute", "net-02", 6, 7),
        Event("evict", "net-02", 7, 7),
    ]
    assert [event.start for event in timeline.events] == [event.start for event in expected]
    assert set(timeline.events) == set(expected)
    assert timeline.seconds == 7 and timeline.total("stall") == 4
    assert timeline.peak_bytes == plan.peak_bytes == 210
    assert timeline.memory[-1] == (7, 0)


def test_a_chunk_stays_from_use_to_use_and_is_loaded_once() -> None:
    workload = even(3, 4)
    keep = [use.chunk == 1 for use in workload.uses]
    loads = place_loads(workload, keep, 300)
    assert loads is not None
    assert [(load.chunk, load.first_use, load.last_use) for load in loads][:3] == [
        (0, 0, 0),
        (1, 1, 10),
        (2, 2, 2),
    ]
    assert sum(load.chunk == 1 for load in loads) == 1
    # Beside the resident and the chunk in use there is room for one that comes.
    assert [load.after for load in loads] == [0, 0, 0, 1, 3, 4, 6, 7, 9]
    assert place_loads(workload, [True] * 12, 299) is None


def test_memory_limits_how_far_loads_go_ahead_not_a_count() -> None:
    chunks = tuple(
        Chunk(f"c{i}", "net", size, size) for i, size in enumerate((100, 10, 10, 10, 90))
    )
    uses = tuple(Use(i, "base", 0, 1000, 0) for i in range(5))
    workload = Workload(chunks, uses)
    loads = place_loads(workload, [False] * 5, 130)
    assert loads is not None
    assert [load.after for load in loads] == [0, 0, 0, 0, 1]
    assert plan_of(workload, loads, 130).prefetch_depth == 3


@pytest.mark.parametrize(
    "loads",
    [
        [Load(0, 0, 0, 0)],  # nothing for the second use
        [Load(0, 0, 0, 0), Load(0, 1, 1, 0)],  # the wrong chunk
        [Load(1, 1, 1, 0), Load(0, 0, 0, 0)],  # out of order
        [Load(0, 0, 0, 0), Load(1, 1, 1, 2)],  # waits for what waits for it
        [Load(0, 0, 0, 1), Load(1, 1, 1, 1)],
    ],
)
def test_schedules_that_cannot_work_are_refused(loads: list[Load]) -> None:
    workload = even(2, 1)
    with pytest.raises(RunError, match="does not load every chunk before it is used"):
        simulate(workload, plan_of(workload, loads, 10**6), device())


def test_a_damaged_plan_is_refused() -> None:
    workload = even(2, 1)
    plan = plan_of(workload, [Load(0, 0, 0, 0), Load(1, 1, 1, 0)], 200)
    data = plan.to_data()
    assert SchedulePlan.from_data(data) == plan
    for change in ({"schema": 99}, {"loads": [{"chunk": 0}]}, {"loads": []}, {"uses": None}):
        with pytest.raises(PackageError):
            SchedulePlan.from_data({**data, **change})


def test_the_published_schedule() -> None:
    """Prefix residents, one ahead, none in the first call."""
    workload = even(4, 3)
    plan = published_plan(workload, 300)
    plan.check(workload)
    assert [(load.chunk, load.first_use, load.last_use, load.after) for load in plan.loads] == [
        (0, 0, 8, 0),
        (1, 1, 1, 1),
        (2, 2, 2, 2),
        (3, 3, 3, 3),
        (1, 5, 5, 4),
        (2, 6, 6, 5),
        (3, 7, 7, 6),
        (1, 9, 9, 8),
        (2, 10, 10, 9),
        (3, 11, 11, 10),
    ]
    # In the first call loads and uses alternate; then three loads hide all but the last use.
    assert simulate(workload, plan, device(2)).seconds == 4 * 3 + 2 * 7
