"""Choosing among cuts by the time that a run takes: pure, on made-up cuts."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import fx
from workloads import device

from odsora_compiler.errors import UsageError
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.manifest import (
    ChunkCall,
    ComponentEntry,
    Feature,
    FunctionEntry,
    PackageEntry,
)
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.weights import TensorWeights
from odsora_compiler.planning.chunk_sizes import ChosenCuts, CutSearch
from odsora_compiler.planning.from_program import ProgramWorkloads
from odsora_compiler.planning.planner import make_plan
from odsora_compiler.planning.profile import DeviceProfile

VALUE = Feature("x", "float32", (1,))
WHOLE = 1200  # bytes of a network, on a device that reads 100 a second
WORK = 12_000  # FLOP of a call: 12 seconds


def entry(sizes: Sequence[int], activation: int = 8) -> ComponentEntry:
    """A network cut so: chunks take the part of the work that they have of the bytes."""
    names = [f"c{index}" for index in range(len(sizes))]
    packages = {
        name: PackageEntry(f"{name}.mlpackage", ("base",), size, "", "", {"weights": (size, "")})
        for name, size in zip(names, sizes, strict=True)
    }
    calls = tuple(
        ChunkCall(name, (VALUE,), (VALUE,), WORK * size // sum(sizes), activation)
        for name, size in zip(names, sizes, strict=True)
    )
    function = FunctionEntry((VALUE,), (VALUE,), calls, {"x": "x"})
    return ComponentEntry({"base": function}, packages)


@dataclass
class MadeUp:
    """Cuts that are given. `exact`: what turns out to be otherwise than estimated."""

    estimates: list[ComponentEntry]
    exact: Mapping[int, ComponentEntry] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.estimates)

    def estimate(self, number: int) -> ComponentEntry:
        self.asked.append(number)
        return self.estimates[number]

    def entry(self, number: int) -> ComponentEntry:
        return self.exact.get(number, self.estimates[number])


def even(*counts: int, activation: int = 8) -> MadeUp:
    return MadeUp([entry([WHOLE // count] * count, activation) for count in counts])


def program(*calls: str) -> Program:
    """A host that calls networks one after another, each on what the one before gave."""

    def value(graph: fx.Graph, node: fx.Node) -> fx.Node:
        node.meta["val"] = fake_tensor((1,), torch.float32)
        return node

    components = {}
    for name in dict.fromkeys(calls):
        base = Function("base")
        x = value(base.graph, base.graph.placeholder("x"))
        base.graph.output((x,)).meta["names"] = ("x",)
        components[name] = Component(name, {"base": base}, TensorWeights({}))
    host = Function("host")
    x = value(host.graph, host.graph.placeholder("x"))
    for name in calls:
        call = host.graph.call_function(call_component, (name, "base"), {"x": x})
        x = value(host.graph, host.graph.call_function(operator.getitem, (call, "x")))
    host.graph.output((x,)).meta["names"] = ("x",)
    return Program("made up", components, host)


def search(
    cuts: Mapping[str, MadeUp], memory: int, *calls: str, profile: DeviceProfile | None = None
) -> CutSearch:
    profile = profile or device()
    runs = ProgramWorkloads(program(*calls), "fp16", profile)
    return CutSearch(runs, cuts, profile, memory)


def chosen(cuts: MadeUp, memory: int, calls: int, overhead: float = 0.0) -> ChosenCuts:
    return search({"net": cuts}, memory, *["net"] * calls, profile=device(overhead=overhead)).run()


def test_where_all_fits_one_chunk_is_enough() -> None:
    """Finer ones would save a few seconds of the first loading, of 1200: less than the tie."""
    found = chosen(even(1, 2, 4, 8), 2 * WHOLE, calls=400)
    assert found.numbers == {"net": 0}


def test_where_little_fits_chunks_are_finer() -> None:
    """Two halves leave no room to read ahead; a twelfth of the network is computed meanwhile."""
    found = chosen(even(2, 12, 12), WHOLE // 2 + 50, calls=4)
    assert found.numbers == {"net": 1}
    assert found.plan.peak_bytes <= WHOLE // 2 + 50


def test_chunks_are_not_finer_than_reading_them_is_worth() -> None:
    counts = (2, 4, 12, 24, 60, 60)
    dear = chosen(even(*counts), WHOLE // 2, calls=4, overhead=0.5)
    cheap = chosen(even(*counts), WHOLE // 2, calls=4, overhead=0.0)
    assert dear.numbers["net"] < cheap.numbers["net"]
    # Nothing that was offered is better by more than the tie.
    runs = ProgramWorkloads(program(*["net"] * 4), "fp16", device(overhead=0.5))
    for each in even(*counts).estimates[:-1]:
        workload = runs.workload({"net": each})
        if workload.least_budget <= WHOLE // 2:
            plan = make_plan(workload, device(overhead=0.5), WHOLE // 2)
            assert dear.plan.predicted_seconds <= plan.predicted_seconds * 1.005


def test_uneven_chunks_lose_against_even_ones() -> None:
    uneven = entry([600, 100, 100, 100, 300])
    cuts = MadeUp([uneven, entry([240] * 5), entry([100] * 12)])
    assert chosen(cuts, 700, calls=3).numbers == {"net": 1}


def test_the_narrowest_is_for_where_nothing_else_fits() -> None:
    cuts = even(4, 12, 60)
    assert chosen(cuts, 60, calls=2).numbers == {"net": 2}
    assert chosen(cuts, 320, calls=2).numbers != {"net": 2}


def test_a_cut_that_turns_out_not_to_fit_is_left() -> None:
    """By its estimate one cut is best; really it needs more than there is."""
    cuts = even(2, 12, 24, 60)
    best = chosen(cuts, 650, calls=4).numbers["net"]
    assert best in (1, 2)
    count = len(cuts.estimates[best].packages)
    cuts.exact = {best: entry([WHOLE // count] * count, activation=640)}
    found = chosen(cuts, 650, calls=4)
    assert found.numbers["net"] != best
    assert found.plan.peak_bytes <= 650


def test_too_little_memory_is_told_by_the_narrowest() -> None:
    least = WHOLE // 60 + 12  # three values: the host's, the chunk's input and its output
    assert search({"net": even(4, 60)}, least, "net").run().plan.peak_bytes <= least
    refused = search({"net": even(4, 60)}, least - 1, "net")
    assert refused.narrowest.least_budget == least
    with pytest.raises(UsageError, match=f"Give at least {least} bytes"):
        refused.run()


def test_networks_that_take_turns_are_chosen_together() -> None:
    calls = ["one", "two"] * 4
    cuts = {"one": even(1, 2, 8, 24), "two": even(1, 2, 8, 24)}
    slow = device(2.0)
    roomy = search(cuts, 3 * WHOLE, *calls, profile=slow).run()
    assert roomy.plan.peak_bytes <= 3 * WHOLE
    # Both fit at once and stay: as many loads as chunks.
    assert len(roomy.plan.loads) == len(roomy.workload.chunks)
    tight = search(cuts, WHOLE, *calls, profile=slow).run()
    assert tight.plan.peak_bytes <= WHOLE
    assert len(tight.plan.loads) > len(tight.workload.chunks)
    assert tight.plan.predicted_seconds > roomy.plan.predicted_seconds
    for number in range(3):
        workload = ProgramWorkloads(program(*calls), "fp16", slow).workload(
            {name: cuts[name].estimates[number] for name in cuts}
        )
        if workload.least_budget <= WHOLE:
            plan = make_plan(workload, slow, WHOLE)
            assert tight.plan.predicted_seconds <= plan.predicted_seconds * 1.005


def test_finer_cuts_are_given_up_where_they_bring_nothing() -> None:
    cuts = even(1, 2, 3, 4, 6, 8, 10, 12, 24, 60, 120, 240, 300)
    found = search({"net": cuts}, 700, *["net"] * 6, profile=device(overhead=1.0)).run()
    assert found.numbers["net"] < 9
    assert 10 not in cuts.asked


def test_measured_seconds_of_other_chunks_do_not_count() -> None:
    measured = {f"c{index}.base": 1000.0 for index in range(24)}
    profile = DeviceProfile(
        "test", "made up", 10**6, 100.0, 0.0, {"any": 1000.0}, chunk_seconds=measured
    )
    cuts = {"net": even(2, 12, 24)}
    found = search(cuts, 700, *["net"] * 3, profile=profile).run()
    assert found.plan.predicted_seconds < 100
