"""lower_bound: no schedule is faster, as trying them all shows; nor is ours much slower."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from workloads import device, even

from odsora_compiler.planning.bound import lower_bound
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.simulate import Costs
from odsora_compiler.planning.workload import Chunk, Use, Workload


def fastest(workload: Workload, profile: DeviceProfile, budget: int) -> float:
    """The time of the best schedule there is, by Dijkstra over all states of a run.

    A state: uses done, seconds left of the running use and of the running load, chunks in memory.
    In every state a load of any chunk that fits may be begun, any idle chunk dropped, or time go on
    to the next event.
    """
    costs = Costs(workload, profile)
    sizes = [chunk.resident_bytes for chunk in workload.chunks]
    uses = workload.uses
    # Uses done, seconds left of the use (0: waiting), chunk being loaded (-1: none) and seconds.
    start = (0, 0.0, -1, 0.0, frozenset())
    queue = [(0.0, 0, start)]
    best = {start: 0.0}
    order = itertools.count(1)
    while queue:
        now, _, state = heapq.heappop(queue)
        if now > best[state]:
            continue
        done, left, loading, wait, held = state
        if done == len(uses):
            return now
        running = left > 0
        following = []
        use = uses[done]
        taken = sum(sizes[c] for c in held) + (sizes[loading] if loading >= 0 else 0)
        need = use.activation_bytes if running else use.boundary_bytes
        if not running and use.chunk in held and taken + use.activation_bytes <= budget:
            following.append((now, (done, costs.compute[done], loading, wait, held)))
        if loading < 0:
            for chunk, size in enumerate(sizes):
                if chunk not in held and taken + need + size <= budget:
                    following.append((now, (done, left, chunk, costs.load[chunk], held)))
        for chunk in held:
            if not (running and chunk == use.chunk):
                following.append((now, (done, left, loading, wait, held - {chunk})))
        steps = [seconds for seconds, on in ((left, running), (wait, loading >= 0)) if on]
        if steps:
            step = min(steps)
            after_left, after_wait = round(left - step, 9), round(wait - step, 9)
            finished = running and after_left <= 0
            arrived = loading >= 0 and after_wait <= 0
            state = (
                done + finished,
                after_left if running and not finished else 0.0,
                -1 if arrived or loading < 0 else loading,
                0.0 if arrived or loading < 0 else after_wait,
                held | {loading} if arrived else held,
            )
            following.append((now + step, state))
        for later, each in following:
            if later < best.get(each, float("inf")):
                best[each] = later
                heapq.heappush(queue, (later, next(order), each))
    raise AssertionError("no schedule exists")


def small(seed: int) -> tuple[Workload, DeviceProfile, int]:
    draw = random.Random(seed)
    count, calls = draw.choice(((2, 4), (3, 3), (4, 2)))
    chunks = tuple(
        Chunk(f"c{i}", "net", draw.randint(1, 6) * 20, draw.randint(1, 3) * 40)
        for i in range(count)
    )
    flops = [draw.randint(1, 4) * 1000 for _ in range(count)]
    activation = [draw.choice((0, 20, 60)) for _ in range(count)]
    uses = tuple(
        Use(i, "base", k, flops[i], activation[i], draw.choice((0, activation[i])))
        for k in range(calls)
        for i in range(count)
    )
    workload = Workload(chunks, uses)
    most = workload.weight_bytes + max(activation)
    return workload, device(draw.choice((0.5, 1, 2))), draw.randint(workload.least_budget, most)


@pytest.mark.parametrize("seed", range(40))
def test_no_schedule_beats_the_bound(seed: int) -> None:
    workload, profile, budget = small(seed)
    best = fastest(workload, profile, budget)
    assert lower_bound(workload, profile, budget).seconds <= best * (1 + 1e-9), f"seed {seed}"


def test_the_bound_is_the_best_schedule_where_nothing_is_in_the_way() -> None:
    # One after the other but for the overlap that two chunks' memory allows.
    assert lower_bound(even(4, 1), device(0.5), 400).seconds == pytest.approx(4.5)
    assert lower_bound(even(4, 1), device(2), 400).seconds == pytest.approx(9)
    # All stay: the first loading, then computing alone.
    assert lower_bound(even(4, 5), device(2), 400).seconds == pytest.approx(8 + 1 + 16)
    # Nothing can be kept or read ahead: one chunk fits.
    bound = lower_bound(even(4, 5), device(1), 100)
    assert bound.compute == 20 and bound.load == 20


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_is_near_the_best_schedule_there_is(seed: int) -> None:
    workload, profile, budget = small(seed)
    plan = make_plan(workload, profile, budget)
    best = fastest(workload, profile, budget)
    assert best * (1 - 1e-9) <= plan.predicted_seconds <= 1.35 * best, f"seed {seed}"
