"""The runner of a pipeline's bundle: what is in memory when, and what an early exit leaves out."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_pipeline import STEPS, Gate, WatchedStorage, small_program

import odsora_compiler as odsora
from odsora_compiler.errors import RunError, UsageError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package
from odsora_compiler.planning.plan import SchedulePlan
from odsora_compiler.planning.profile import find_profile
from odsora_compiler.planning.simulate import simulate
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.executors import CoreMLExecutor
from odsora_compiler.runtime.runner import Progress, Runner

pytestmark = pytest.mark.timeout(60, func_only=True)

Tensors = dict[str, torch.Tensor]
DENOISER = [f"denoiser-0{index}" for index in range(4)]


def least_budget(bundle: Bundle) -> int:
    return Runner(bundle).workload().least_budget


def same(found: Tensors, expected: Tensors) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_bundle_does_what_the_program_does(program: odsora.Program, expected: Tensors) -> None:
    reference = evaluate_program(program, program.examples)
    assert (expected["decoded"] - reference["decoded"]).abs().max() < 5e-3


def test_without_a_budget_every_chunk_is_read_once_and_stays_until_its_last_use(
    program: odsora.Program, bundle: Bundle
) -> None:
    storage = WatchedStorage()
    runner = Runner(bundle, storage=storage)
    runner.run(program.examples)
    assert storage.read == ["encoder-00", "encoder-01", *DENOISER, "decoder-00"]
    events = runner.summary.timeline.events
    evicted = {event.name: event.start for event in events if event.lane == "evict"}
    used = {event.name: event.end for event in events if event.lane == "compute"}
    assert evicted.keys() == used.keys() == set(storage.read)
    assert all(used[name] <= evicted[name] for name in used)
    # The encoder is gone before the denoiser is called a second time.
    steps = [event for event in events if event.lane == "compute" and event.name == DENOISER[0]]
    assert max(evicted["encoder-00"], evicted["encoder-01"]) < steps[1].start


def test_what_comes_next_is_read_while_a_chunk_is_waited_for(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    """Also over the border between components."""
    read_ahead = threading.Event()
    last_encoder_chunk: list[Progress] = []

    def before(package: str) -> None:
        if package == "denoiser-01":
            read_ahead.set()

    def watch(done: Progress) -> None:
        if done.component == "encoder" and done.chunk == 1:
            assert read_ahead.wait(20)
            last_encoder_chunk.append(done)

    runner = Runner(bundle, progress=watch, storage=WatchedStorage(before))
    assert same(runner.run(program.examples), expected)
    assert len(last_encoder_chunk) == 1


def test_an_early_exit_leaves_calls_out_and_everyone_is_told(
    program: odsora.Program, bundle: Bundle
) -> None:
    told: list[Progress] = []
    runner = Runner(bundle, progress=told.append)
    assert runner.calls == {"encoder": 1, "denoiser": STEPS, "decoder": 1}
    runner.run(program.examples)
    calls = [(item.component, item.call, item.calls) for item in told]
    made: list[str] = []
    evaluate_program(program, program.examples, lambda name, *_: made.append(name))
    steps = made.count("denoiser")
    assert 2 <= steps < STEPS
    assert list(dict.fromkeys(calls)) == [
        ("encoder", 1, 1),
        *(("denoiser", index + 1, STEPS) for index in range(steps)),
        ("decoder", 1, 1),
    ]
    assert Counter(calls)["denoiser", 1, STEPS] == 4


def test_the_least_budget_is_enough_and_is_kept(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    least = least_budget(bundle)
    storage = WatchedStorage()
    runner = Runner(bundle, memory_budget=least, storage=storage)
    assert same(runner.run(program.examples), expected)
    assert runner.summary.peak_bytes <= runner.plan.peak_bytes <= least
    workload = runner.summary.workload
    largest = sorted(chunk.resident_bytes for chunk in workload.chunks)[-2:]
    assert least <= sum(largest) + max(use.activation_bytes for use in workload.uses)
    # Nothing can stay: each step reads all of the denoiser again, and one chunk was on its way
    # when the sampler was left.
    counts = [storage.read.count(name) for name in DENOISER]
    assert 1 < min(counts) <= max(counts) <= min(counts) + 1


def test_less_than_the_least_budget_is_refused_before_anything_is_read(
    program: odsora.Program, bundle: Bundle
) -> None:
    least = least_budget(bundle)
    storage = WatchedStorage()
    runner = Runner(bundle, memory_budget=least - 1, storage=storage)
    with pytest.raises(UsageError, match=f"Give at least {least} bytes"):
        runner.run(program.examples)
    assert not storage.read


def test_one_plan_serves_all_runs_of_a_function(program: odsora.Program, bundle: Bundle) -> None:
    runner = Runner(bundle)
    plan = runner.plan
    assert runner.run(program.examples).keys() == {"decoded"}
    runner.run(program.examples)
    assert runner.plan is plan is runner.plan_run()
    runner.memory_budget = plan.budget - 1
    assert runner.plan_run().budget == plan.budget - 1
    assert runner.plan is plan, "nothing was run since"


def test_a_plan_from_a_file_is_followed(
    program: odsora.Program, bundle: Bundle, expected: Tensors, tmp_path: Path
) -> None:
    budget = 2 * least_budget(bundle)
    Runner(bundle, memory_budget=budget).plan_run().save(tmp_path / "plan.json")
    storage = WatchedStorage()
    runner = Runner(bundle, storage=storage)
    runner.follow(SchedulePlan.load(tmp_path / "plan.json"))
    assert runner.plan_run().budget == budget
    assert same(runner.run(program.examples), expected)
    assert len(storage.read) > len(set(storage.read)), "less than all of the denoiser stays"
    assert runner.summary.peak_bytes <= budget


def test_a_plan_that_does_not_fit_is_refused(bundle: Bundle) -> None:
    runner = Runner(bundle)
    plan = runner.plan_run()
    with pytest.raises(RunError, match="other chunks or another order"):
        runner.follow(replace(plan, chunks=plan.chunks[::-1]))
    with pytest.raises(RunError, match=r"its budget is 1000.*\n.*--executor"):
        runner.follow(replace(plan, budget=1000))


def test_one_function_alone_keeps_a_budget_too(program: odsora.Program, bundle: Bundle) -> None:
    entry = bundle.component("denoiser").function("base")
    torch.manual_seed(1)
    inputs = {item.name: torch.randn(item.shape) for item in entry.inputs}
    runner = Runner(bundle)
    expected = runner.run_function("denoiser", "base", inputs)
    plan = runner.plan
    assert {plan.chunks[load.chunk] for load in plan.loads} == set(DENOISER)
    largest = max(runner.summary.workload.chunks, key=lambda chunk: chunk.resident_bytes)
    tight = Runner(bundle, memory_budget=plan.peak_bytes - largest.resident_bytes)
    assert same(tight.run_function("denoiser", "base", inputs), expected)
    assert tight.summary.peak_bytes <= plan.peak_bytes - largest.resident_bytes


def test_a_runner_does_one_thing_at_a_time(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    gate = Gate("encoder-01")
    runner = Runner(bundle, storage=WatchedStorage(gate))
    found: list[Tensors] = []
    other = threading.Thread(target=lambda: found.append(runner.run(program.examples)))
    other.start()
    assert gate.reached.wait(20)
    with pytest.raises(RunError, match="running already"):
        runner.run(program.examples)
    gate.opened.set()
    other.join(20)
    assert same(found[0], expected)


def in_this_thread(change: Callable[[], None]) -> None:
    change()


def in_another_thread(change: Callable[[], None]) -> None:
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


def in_a_signal_handler(change: Callable[[], None]) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: change())
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("where", [in_this_thread, in_another_thread, in_a_signal_handler])
@pytest.mark.parametrize("after", range(1, 10, 2))
def test_the_budget_can_be_lowered_on_the_way(
    program: odsora.Program,
    bundle: Bundle,
    expected: Tensors,
    after: int,
    where: Callable[[Callable[[], None]], None],
) -> None:
    least = least_budget(bundle)
    ran: list[Progress] = []
    lowered: list[float] = []

    def watch(done: Progress) -> None:
        ran.append(done)
        if len(ran) == after:
            where(lambda: setattr(runner, "memory_budget", least + 100))
        elif len(ran) == after + 1:
            lowered.append(runner.trace.timeline().seconds)

    runner = Runner(bundle, progress=watch)
    assert same(runner.run(program.examples), expected)
    memory = runner.summary.timeline.memory
    before = max(size for time, size in memory if time < lowered[0])
    assert max(size for time, size in memory if time > lowered[0]) <= least + 100 < before
    assert runner.plan.budget == least + 100
    assert runner.summary.budget > least + 100


def test_what_is_in_memory_and_still_wanted_is_not_read_again(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    """A budget for all but one chunk of the denoiser, after its first step."""
    storage = WatchedStorage()
    runner = Runner(bundle, storage=storage)
    most = runner.plan_run().peak_bytes

    def watch(done: Progress) -> None:
        if done.component == "denoiser" and done.call == 1 and done.chunk == 4:
            storage.read.clear()
            runner.memory_budget = most - 1

    runner.progress = watch
    assert same(runner.run(program.examples), expected)
    # Two take turns, or one comes and goes; the others were there and stayed.
    assert len(set(storage.read) - {"decoder-00"}) <= 2


def test_a_budget_that_cannot_be_kept_is_told_and_the_run_goes_on(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    def watch(done: Progress) -> None:
        runner.memory_budget = 1

    runner = Runner(bundle, progress=watch)
    with pytest.warns(RuntimeWarning, match=r"budget is 1 bytes now, the rest .* at least \d+"):
        assert same(runner.run(program.examples), expected)


def test_a_budget_can_be_raised_on_the_way(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    def watch(done: Progress) -> None:
        if done.component == "denoiser" and done.call == 1:
            runner.memory_budget = None
            if done.chunk == 1:
                storage.read.clear()

    storage = WatchedStorage()
    runner = Runner(bundle, None, least_budget(bundle), progress=watch, storage=storage)
    assert same(runner.run(program.examples), expected)
    # A load that was under way when the budget changed is begun again, no other.
    assert len(storage.read) - len(set(storage.read)) <= 1


def test_the_summary_compares_with_a_bound(program: odsora.Program, bundle: Bundle) -> None:
    runner = Runner(bundle)
    with pytest.raises(RunError, match="nothing was run"):
        _ = runner.summary
    runner.run(program.examples)
    summary = runner.summary
    computing = summary.timeline.total("compute")
    # A bound of mean times: where they vary, it may be missed by a little.
    assert computing <= summary.bound_seconds <= 1.2 * summary.seconds
    assert summary.ratio == summary.seconds / summary.bound_seconds
    assert 0 <= summary.stall_seconds < summary.seconds
    assert len(summary.workload.uses) < len(runner.plan.uses), "the early exit counts"
    given = Runner(bundle, profile=find_profile("iphone15pro"))
    given.run(program.examples)
    assert given.summary.profile is not None and given.summary.bound_seconds != computing


def test_what_is_measured_has_the_form_of_what_is_predicted(
    program: odsora.Program, bundle: Bundle
) -> None:
    """Of a run without an exit, so that both have the same events."""
    entry = bundle.component("denoiser").function("base")
    inputs = {item.name: torch.randn(item.shape) for item in entry.inputs}
    runner = Runner(bundle)
    runner.run_function("denoiser", "base", inputs)
    measured, summary = runner.summary.timeline, runner.summary
    predicted = simulate(summary.workload, runner.plan, summary.measured)
    for lane in ("load", "compute", "evict"):
        names = [
            [event.name for event in timeline.events if event.lane == lane]
            for timeline in (measured, predicted)
        ]
        assert names[0] == names[1] == DENOISER
    assert measured.peak_bytes <= runner.plan.peak_bytes


class StandIn:
    """For coremltools' MLModel, which only macOS has; counts those that are alive."""

    alive: ClassVar[set[int]] = set()
    most: ClassVar[int] = 0

    def __init__(self, path: str, function_name: str) -> None:
        self._interpreter = Interpreter(Package.open(path), function_name)
        StandIn.alive.add(id(self))
        StandIn.most = max(StandIn.most, len(StandIn.alive))

    def __del__(self) -> None:
        StandIn.alive.discard(id(self))

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return {name: value.numpy() for name, value in self._interpreter.run(given).items()}


def test_core_ml_follows_a_plan_too(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    runner = Runner(bundle, CoreMLExecutor(StandIn))
    assert same(runner.run(program.examples), expected)
    assert StandIn.most > 1 and not StandIn.alive
    StandIn.most = 0
    runner.memory_budget = runner.workload().least_budget
    assert same(runner.run(program.examples), expected)
    assert StandIn.most == 1 and not StandIn.alive


def test_a_function_is_called_of_the_components_that_have_it(tmp_path: Path) -> None:
    program = small_program("lpl")
    faster = program.component("denoiser").derive("negative")
    editor = Editor(faster, "test")
    (result,) = faster.results.values()
    negated = editor.call(torch.ops.aten.neg.default, result)
    editor.replace(result, negated)
    bundle = odsora.lower(program, tmp_path / "b.odsora", precision="fp32")
    told: list[Progress] = []
    runner = Runner(Bundle(bundle), progress=told.append)
    base = runner.run(program.examples)["decoded"]
    assert {(item.component, item.function) for item in told} == {
        (name, "base") for name in ("encoder", "denoiser", "decoder")
    }
    told.clear()
    assert not torch.allclose(runner.run(program.examples, "negative")["decoded"], base)
    assert {(item.component, item.function) for item in told} == {
        ("encoder", "base"),
        ("denoiser", "negative"),
        ("decoder", "base"),
    }


def test_an_unknown_function_is_refused(program: odsora.Program, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no function 'tdtm'"):
        Runner(bundle).run(program.examples, "tdtm")
