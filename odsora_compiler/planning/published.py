"""The schedule of the On-device Sora paper, as something to compare with."""

from __future__ import annotations

from collections import Counter

from odsora_compiler.planning.plan import Load, SchedulePlan, place_loads, plan_of
from odsora_compiler.planning.workload import Workload


def published_plan(workload: Workload, budget: int) -> SchedulePlan:
    """The first chunks stay, the next one is read while one computes, in the first call none is.

    As many of the first chunks of each segment stay as leave room for the two largest others.
    Source: arXiv 2502.04363, section 3.3 (its prefetch starts in the second step). Raises
    `UsageError` where `budget` is below the workload's least.
    """
    workload.check_budget(budget)
    keep = [False] * len(workload.uses)
    for segment in workload.segments:
        uses = workload.uses[segment.start : segment.stop]
        count = Counter(use.chunk for use in uses)
        chunks = list(count)
        sizes = [workload.chunks[chunk].resident_bytes for chunk in chunks]
        room = budget - max(use.activation_bytes for use in uses)
        residents: set[int] = set()
        for index, chunk in enumerate(chunks):
            others = sorted(sizes[index + 1 :])[-2:]
            if sum(sizes[: index + 1]) + sum(others) > room:
                break
            residents.add(chunk)
        for place in segment:
            keep[place] = workload.uses[place].chunk in residents
    earliest = place_loads(workload, keep, budget)
    assert earliest is not None, "the residents leave room for every other chunk"
    firsts = {workload.chunks[use.chunk].component: use.call for use in reversed(workload.uses)}
    loads: list[Load] = []
    for load in earliest:
        use = workload.uses[load.first_use]
        first = firsts[workload.chunks[load.chunk].component] == use.call
        after = load.first_use if first else max(load.after, load.first_use - 1)
        loads.append(Load(load.chunk, load.first_use, load.last_use, after))
    return plan_of(workload, loads, budget)
