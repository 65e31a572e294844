"""Leaving a sampler early: parity with the published implementation and with leaps made by hand."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import video_models as models
from odsora_passes.lpl import LPL, Scope
from safetensors import safe_open
from torch import Tensor, nn

from odsora_compiler.errors import UsageError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec, PipelineSpec
from odsora_compiler.ir.host import early_exit
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import fingerprint, load_program, save_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.pipeline.base import Context
from odsora_compiler.pipeline.manager import run_passes

ROOT = Path(__file__).parents[2]


def leaped(program: Program, **options: Any) -> tuple[Program, Context]:
    """A copy that the pass ran on, its structure checked."""
    made, context = program.copy(), Context("lpl")
    LPL(**options).run(made, context)
    verify_program(made)
    return made, context


def run(program: Program, component: str = "net") -> tuple[dict[str, Tensor], list[float]]:
    """The outputs, and the times of the calls that were really made."""
    called: list[float] = []

    def on_call(name: str, function: str, inputs: Any, outputs: Any) -> None:
        if name == component:
            called.append(float(inputs["t"].flatten()[0]))

    return evaluate_program(program, program.examples, on_call), called


def output(program: Program) -> Tensor:
    return next(iter(run(program)[0].values()))


def times(steps: int, shift: float = 1.0) -> list[float]:
    """1000 … 0, one more than there are steps."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [1000 * shift * t / (1 + (shift - 1) * t) for t in even]


# ------------------------------------------------------------------ the published implementation


class Toy(nn.Module):
    """The drift of the golden files."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        mixed = torch.einsum("bcthw,cd->bdthw", x, self.weight)
        timed = self.bias.view(1, -1, 1, 1, 1) * (t.view(-1, 1, 1, 1, 1) / 1000)
        return torch.tanh(mixed) + timed + y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1)


@functools.cache
def golden(name: str) -> tuple[Program, dict[str, Any], dict[str, Tensor]]:
    with safe_open(ROOT / f"tests/golden/{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    groups = math.sqrt(config["num_frames"] // 17 * 5)
    shift = math.sqrt(config["height"] * config["width"] / 512**2) * groups

    def sample(c: Any, noise: Tensor, y: Tensor, null: Tensor) -> Tensor:
        film, strength = noise, config["cfg_scale"]
        for now, then in itertools.pairwise(times(config["num_sampling_steps"], shift)):
            both = torch.cat([film, film]), torch.full((2,), now), torch.cat([y, null])
            wanted, free = c.net(x=both[0], t=both[1], y=both[2]).chunk(2)
            film = film + (free + strength * (wanted - free)) * ((now - then) / 1000)
        return film

    z, y, null = tensors["in.z"], tensors["in.y"], tensors["in.y_null"]
    inputs = {"x": torch.cat([z, z]), "t": torch.zeros(2), "y": torch.cat([y, null])}
    net = ModelSpec(Toy(tensors["in.W"], tensors["in.b"]), inputs)
    spec = PipelineSpec({"net": net}, sample, {"noise": z, "y": y, "null": null})
    return capture(spec), config, tensors


@pytest.mark.parametrize("name", ["rflow_a", "rflow_b"])
def test_leaps_where_the_published_code_does(name: str) -> None:
    program, config, tensors = golden(name)
    made, context = leaped(
        program,
        min_steps=config["minimum_steps"],
        patience=config["patience"],
        tolerance=config["tolerance"],
    )
    assert not context.declined
    outputs, called = run(made)
    expected = tensors["out.lpl_timesteps"].tolist()
    assert called == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(outputs["output"], tensors["out.z_lpl"], rtol=0, atol=1e-5)
    assert (outputs["output"] - tensors["out.z_full"]).abs().max() > 0.05

    made, _ = leaped(program, at=len(expected) - 1)
    assert len(made.calls()) == len(expected)
    torch.testing.assert_close(output(made), tensors["out.z_lpl"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["rflow_a", "rflow_b"])
def test_the_last_step_is_no_leap(name: str) -> None:
    program, config, tensors = golden(name)
    made, context = leaped(program, at=config["num_sampling_steps"] - 1)

    assert fingerprint(made) == fingerprint(program)
    assert "is the last step itself" in context.notes[0]
    assert torch.equal(output(made), output(program))
    torch.testing.assert_close(output(made), tensors["out.z_full"], rtol=0, atol=1e-5)


def test_by_default_drifts_are_compared_after_a_quarter_of_the_steps() -> None:
    program, _, _ = golden("rflow_a")
    made, context = leaped(program)
    explicit, _ = leaped(program, min_steps=8, patience=3, tolerance=1e-3)
    assert context.notes == ["net: leaps once its drift no longer turns, at step 10 to 28 of 30"]
    assert fingerprint(made) == fingerprint(explicit)
    assert 11 <= len(run(made)[1]) < 30


# ------------------------------------------------------------------ when to leap, in plain Python


Nested = Any
Measure = Callable[[Nested, Nested], float]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def flat(nested: Nested) -> list[float]:
    return [v for part in nested for v in flat(part)] if isinstance(nested, list) else [nested]


def row_by_row(a: Nested, b: Nested) -> float:
    pairs = list(zip(a[0][0][0], b[0][0][0], strict=True))
    return sum(cosine(*pair) for pair in pairs) / len(pairs)


def column_by_column(a: Nested, b: Nested) -> float:
    columns = [list(zip(*each[0][0][0], strict=True)) for each in (a, b)]
    pairs = list(zip(*columns, strict=True))
    return sum(cosine(*pair) for pair in pairs) / len(pairs)


def slice_at_once(a: Nested, b: Nested) -> float:
    return cosine(flat(a[0][0][0]), flat(b[0][0][0]))


def all_at_once(a: Nested, b: Nested) -> float:
    return cosine(flat(a), flat(b))


def leaping_step(
    drifts: Nested, measure: Measure, first: int, patience: int, tolerance: float
) -> int:
    best, left = 0.0, patience
    for index in range(first, len(drifts) - 1):
        now = measure(drifts[index], drifts[index - 1])
        if now > best + tolerance:
            best, left = now, patience
        else:
            left -= 1
        if left == 0:
            return index
    return len(drifts) - 1


class Table(nn.Module):
    """Drifts [K, C, T, H, W], whatever the state, by the time from 1000 to 0."""

    def __init__(self, drifts: Tensor) -> None:
        super().__init__()
        self.register_buffer("drifts", drifts)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        count = self.drifts.shape[0]
        row = ((1000 - t) * (count / 1000)).round().long()
        return self.drifts.index_select(0, row) + 0 * x


def table_program(drifts: Tensor, then: Callable[..., Any] = lambda c, film: film) -> Program:
    def sample(c: Any, noise: Tensor) -> Any:
        film = noise
        for now, later in itertools.pairwise(times(len(drifts))):
            push = c.net(x=film, t=torch.full((1,), now))
            film = film + push * ((now - later) / 1000)
        return then(c, film)

    start = torch.randn(1, *drifts.shape[1:], generator=torch.Generator().manual_seed(1))
    net = ModelSpec(Table(drifts), {"x": start, "t": torch.zeros(1)})
    return capture(PipelineSpec({"net": net}, sample, {"noise": start}))


def settling(seed: int, steps: int = 24) -> Tensor:
    """Drifts that come to rest, so that their cosines grow by less and less: [K, C, T, H, W]."""
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    rest = torch.randn(1, 2, 2, 3, 4, generator=random)
    restless = torch.randn(steps, 1, 2, 2, 3, 4, generator=random)[:, 0]
    fading = 0.5 * 0.8 ** torch.arange(steps)
    return rest + restless * fading.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("seed", [19, 84, 93, 98])
def test_what_is_compared_and_how(seed: int) -> None:
    """Each variant leaps at another step, so that none can pass for another."""
    drifts = settling(seed)
    nested = [[each] for each in drifts.tolist()]
    expected = {
        (measure, patience, tolerance): leaping_step(nested, measure, 6, patience, tolerance)
        for measure, patience, tolerance in (
            (row_by_row, 3, 1e-3),
            (row_by_row, 3, 1e-4),
            (row_by_row, 2, 1e-3),
            (column_by_column, 3, 1e-3),
            (slice_at_once, 3, 1e-3),
            (all_at_once, 3, 1e-3),
        )
    }
    assert len(set(expected.values())) == len(expected)
    program = table_program(drifts)
    for (measure, patience, tolerance), step in expected.items():
        if measure in (row_by_row, all_at_once):
            scope = Scope.SLICE if measure is row_by_row else Scope.TENSOR
            options = {"patience": patience, "tolerance": tolerance, "scope": scope}
            made, context = leaped(program, min_steps=6, **options)
            assert not context.declined
            outputs, called = run(made)
            assert len(called) == step + 1
            by_hand = program.examples["noise"] + drifts[:step].sum(0) / 24
            by_hand = by_hand + drifts[step] * (24 - step) / 24
            torch.testing.assert_close(outputs["output"], by_hand, rtol=0, atol=1e-5)


def test_drifts_that_keep_turning_are_followed_to_the_end() -> None:
    """Each cosine is better than all before it: no exit is taken, the result is the sampler's."""
    turns = 0.5 * 0.8 ** torch.arange(12).cumsum(0).clamp(max=60).float().sqrt()
    angles = turns.cumsum(0)
    drifts = torch.stack([angles.cos(), angles.sin()], dim=1).view(12, 1, 1, 1, 2)
    program = table_program(drifts)
    made, _ = leaped(program, min_steps=1, patience=2, tolerance=0.0)
    outputs, called = run(made)
    assert len(called) == 12
    assert torch.equal(outputs["output"], output(program))


# ------------------------------------------------------------------ what a leap does


@pytest.mark.parametrize("options", [{"at": 0}, {"at": 4}, {}, {"scope": Scope.TENSOR}], ids=str)
def test_straight_flows_are_not_changed(options: dict[str, Any]) -> None:
    drift = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    program = table_program(drift.expand(10, -1, -1, -1, -1))
    made, _ = leaped(program, **options)
    outputs, called = run(made)
    assert len(called) < 10
    torch.testing.assert_close(outputs["output"], output(program), rtol=0, atol=1e-6)


class Show(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, latent: Tensor) -> Tensor:
        return torch.tanh(latent * self.scale.view(1, 2, 1, 1, 1))


def film_program() -> Program:
    """A sampler, constants and random numbers used in it and after it, and a decoder."""
    scale = torch.tensor([1.0, 0.9]).view(1, 2, 1, 1, 1)
    drifts = settling(3, steps=10)

    def sample(c: Any, strength: Tensor) -> dict[str, Tensor]:
        latent = torch.randn(1, 2, 2, 3, 4)
        for index, (now, then) in enumerate(itertools.pairwise(times(10))):
            told = strength * scale * (index + 1)
            push = c.net(x=latent, t=torch.full((1,), now), y=told)
            latent = latent + push * ((now - then) / 1000)
        grain = torch.randn(1, 2, 2, 3, 4)
        film = c.decoder(latent=latent * scale + 0.1 * grain + 0.01 * told)
        return {"film": film, "latent": latent, "grain": grain}

    class Told(Table):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, t) * y

    latent = torch.randn(1, 2, 2, 3, 4)
    net = ModelSpec(
        Told(drifts), {"x": latent, "t": torch.zeros(1), "y": torch.ones(1, 2, 1, 1, 1)}
    )
    parts = {"net": net, "decoder": ModelSpec(Show(), {"latent": latent})}
    return capture(PipelineSpec(parts, sample, {"strength": torch.tensor([1.5])}))


def test_steps_that_are_left_out_are_gone_and_the_rest_goes_on() -> None:
    program = film_program()
    made, context = leaped(program, at=3)
    assert context.notes == ["net: leaps at step 3, 6 steps fewer"]
    assert [node.args[0] for node in made.calls()] == ["net"] * 4 + ["decoder"]
    assert set(made.constants) == set(made.host.weight_names())
    assert len(made.host.graph.nodes) < 0.6 * len(program.host.graph.nodes)

    before, after = evaluate(program), evaluate(made)
    assert (after["film"] - before["film"]).abs().max() > 1e-3
    assert torch.equal(after["grain"], before["grain"])
    scale = torch.tensor([1.0, 0.9]).view(1, 2, 1, 1, 1)
    latent = after["latent"] * scale + 0.1 * after["grain"] + 0.15 * scale
    expected = torch.tanh(latent * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1, 1))
    torch.testing.assert_close(after["film"], expected, rtol=0, atol=1e-5)


def test_what_is_made_within_the_steps_and_needed_after_them_is_made_in_any_case() -> None:
    """The host is verified: nothing that an exit skips is used after it."""
    program = film_program()
    made, _ = leaped(program, min_steps=2, tolerance=1.5)
    outputs, called = run(made)
    assert len(called) == 5
    expected = evaluate(leaped(program, at=4)[0])
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=1e-6)


def evaluate(program: Program) -> dict[str, Tensor]:
    return evaluate_program(program, program.examples)


def test_leaps_survive_saving(tmp_path: Path) -> None:
    made, _ = leaped(film_program(), min_steps=2, tolerance=1.5)
    loaded = load_program(save_program(made, tmp_path / "saved"))
    verify_program(loaded)
    assert fingerprint(loaded) == fingerprint(made)
    assert len(run(loaded)[1]) == 5
    assert "it leaps already" in leaped(loaded)[1].declined[0].reason


def test_exits_stand_before_the_steps_they_save() -> None:
    made, _ = leaped(film_program(), min_steps=2, patience=2)
    order = {node: index for index, node in enumerate(made.host.graph.nodes)}
    calls = [order[node] for node in made.calls("net")]
    exits = made.host.graph.find_nodes(op="call_function", target=early_exit)
    # With patience 2 the first leap can be at step 3; one at the last step would save nothing.
    assert len(exits) == 6
    for step, node in enumerate(exits, 3):
        assert calls[step] < order[node] < calls[step + 1]


@pytest.mark.parametrize("options", [{"at": 2}, {"min_steps": 1, "tolerance": 1.0}], ids=str)
def test_a_drift_that_the_author_never_forms(options: dict[str, Any]) -> None:
    """Two terms, one after the other, added in place to a state of half precision."""
    drifts = settling(5, steps=6)

    def sample(c: Any, noise: Tensor) -> Tensor:
        film = noise.clone()
        for now, then in itertools.pairwise(times(6, shift=2.0)):
            push = c.net(x=film.float(), t=torch.full((1,), float(round((now - 0) * 6)) / 6))
            film[0] += (push[0] * (4 * (now - then) / 1000)).half()
            film[0] -= (push[0] * (3 * (now - then) / 1000)).half()
        return film

    class Anywhere(Table):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.sin(x) + t.view(-1, 1, 1, 1, 1) / 1000 + 0 * self.drifts[:1]

    start = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    net = ModelSpec(Anywhere(drifts), {"x": start, "t": torch.zeros(1)})
    program = capture(PipelineSpec({"net": net}, sample, {"noise": start.half()}))
    made, context = leaped(program, **options)
    assert not context.declined
    outputs, called = run(made)

    film, ts = start.half().float(), times(6, shift=2.0)
    last = len(called) - 1
    assert last == (options.get("at") or 3)
    for index in range(last + 1):
        then = 0.0 if index == last else ts[index + 1]
        film = film + (torch.sin(film) + ts[index] / 1000) * (ts[index] - then) / 1000
    assert outputs["output"].dtype == torch.float16
    torch.testing.assert_close(outputs["output"].float(), film, rtol=0, atol=1e-2)


def test_drifts_are_compared_in_one_direction() -> None:
    """Every other step forms the negative of its guided drift and subtracts it."""

    def sample(c: Any, noise: Tensor) -> Tensor:
        film = noise
        for index, (now, then) in enumerate(itertools.pairwise(times(12))):
            wanted, free = c.net(x=film.repeat(2, 1, 1, 1, 1), t=torch.full((2,), now)).chunk(2)
            if index % 2:
                film = film - (6 * free - 7 * wanted) * ((now - then) / 1000)
            else:
                film = film + (7 * wanted - 6 * free) * ((now - then) / 1000)
        return film

    drift = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    start = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    table = Table(drift.expand(12, -1, -1, -1, -1))
    net = ModelSpec(table, {"x": start.repeat(2, 1, 1, 1, 1), "t": torch.zeros(2)})
    program = capture(PipelineSpec({"net": net}, sample, {"noise": start}))
    made, _ = leaped(program, min_steps=2)
    outputs, called = run(made)
    # All cosines are 1: the first is better than none, the next three are not better.
    assert len(called) == 6
    torch.testing.assert_close(outputs["output"], output(program), rtol=0, atol=1e-5)


def test_flow_matching_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)

    def sample(c: Any, noise: Tensor) -> Tensor:
        film = noise
        for t in scheduler.timesteps:
            push = c.net(x=film, t=t.expand(1))
            film = scheduler.step(push, t, film, return_dict=False)[0]
        return film

    class Field(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.sin(x) + t.view(-1, 1, 1, 1, 1) / 1000

    start = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    net = ModelSpec(Field(), {"x": start, "t": torch.zeros(1)})
    program = capture(PipelineSpec({"net": net}, sample, {"noise": start}))
    made, _ = leaped(program, at=5)
    sigmas = [*scheduler.sigmas.tolist()[:6], 0.0]
    film = start
    for now, then in itertools.pairwise(sigmas):
        film = film + (torch.sin(film) + now) * (then - now)
    torch.testing.assert_close(output(made), film, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ hosts left alone


def test_other_samplers_are_declined_with_the_reason() -> None:
    program = table_program(settling(0, steps=4), lambda c, film: film)
    one = table_program(settling(0, steps=1))

    def shrinking(c: Any, noise: Tensor) -> Tensor:
        film = noise
        for now, then in itertools.pairwise(times(4)):
            film = 0.9 * film + c.net(x=film, t=torch.full((1,), now)) * ((now - then) / 1000)
        return film

    start = program.examples["noise"]
    net = ModelSpec(Table(settling(0, steps=4)), {"x": start, "t": torch.zeros(1)})
    other = capture(PipelineSpec({"net": net}, shrinking, {"noise": start}))
    for host, place, reason in (
        (one, "host", "it calls no component step after step"),
        (other, "net", "in step 0 the state is scaled by 0.9 before the drift is added"),
    ):
        made, context = leaped(host)
        (declined,) = context.declined
        assert (declined.place, fingerprint(made)) == (place, fingerprint(host))
        assert reason in declined.reason
    made, context = leaped(one, component="net")
    assert (
        context.declined[0].reason
        == "it is called in one step only; leaving out steps needs at least 2"
    )


@pytest.mark.parametrize("hidden", ["in another component", "by the numbers of the steps"])
def test_steps_of_unknown_length_are_declined(hidden: str) -> None:
    """A leap by lengths that are not those of the flow would end far from the sampler's film."""
    lengths = [0.02, 0.02, 0.1, 0.36, 0.5]

    class Scaled(nn.Module):
        def forward(self, push: Tensor, length: Tensor) -> Tensor:
            return push * length.view(-1, 1, 1, 1, 1)

    def sample(c: Any, noise: Tensor) -> Tensor:
        film = noise
        for index, length in enumerate(lengths):
            if hidden == "in another component":
                push = c.net(x=film, t=torch.full((1,), 1000 - 200 * index))
                film = film + c.scaled(push=push, length=torch.full((1,), length))
            else:
                film = film + c.net(x=film, t=torch.full((1,), 5 - index)) * length
        return film

    start = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    inputs = {"x": start, "t": torch.zeros(1, dtype=torch.int64)}
    scaled = ModelSpec(Scaled(), {"push": start, "length": torch.ones(1)})
    parts = {"net": ModelSpec(Table(settling(0, steps=5)), inputs)}
    if hidden == "in another component":
        parts["scaled"] = scaled
    program = capture(PipelineSpec(parts, sample, {"noise": start}))
    made, context = leaped(program, at=1)
    reasons = {each.place: each.reason for each in context.declined}
    expected = "is computed otherwise" if hidden == "in another component" else "goes from 5 to 4"
    assert expected in reasons["net"]
    assert fingerprint(made) == fingerprint(program)


def test_a_host_that_leaps_is_left_alone() -> None:
    once, _ = leaped(table_program(settling(0)), at=9)
    twice, context = leaped(once, at=3)
    assert context.declined[0].reason == "it leaps already"
    assert fingerprint(twice) == fingerprint(once)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((8,), {}, "have no picture whose rows could be compared"),
        ((4, 1), {}, "have no picture whose rows could be compared"),
        ((2, 2, 3, 4), {"min_steps": 5}, "comparing from step 5 with patience 3 leaves none of"),
        ((2, 2, 3, 4), {"patience": 9}, "leaves none of its 8 steps out"),
    ],
)
def test_comparisons_that_mean_nothing(
    shape: tuple[int, ...], options: dict[str, Any], reason: str
) -> None:
    random = torch.Generator().manual_seed(0)
    program = table_program(torch.randn(8, *shape, generator=random))
    made, context = leaped(program, **options)
    assert reason in context.declined[0].reason
    assert fingerprint(made) == fingerprint(program)
    if "picture" in reason:
        assert not leaped(program, scope=Scope.TENSOR)[1].declined


def test_pictures_of_other_ranks_are_compared_in_their_last_dimensions() -> None:
    random = torch.Generator().manual_seed(0)
    drifts = torch.randn(1, 5, 6, generator=random) + torch.randn(12, 5, 6, generator=random) / 9
    made, _ = leaped(table_program(drifts), min_steps=2)
    wrapped = [[[[each]]] for each in drifts.tolist()]
    assert len(run(made)[1]) == leaping_step(wrapped, row_by_row, 2, 3, 1e-3) + 1


def test_several_sampled_components_need_a_name() -> None:
    def sample(c: Any, noise: Tensor) -> Tensor:
        film = noise
        for part in (c.small, c.large):
            for now, then in itertools.pairwise(times(6)):
                film = film + part(x=film, t=torch.full((1,), now)) * ((now - then) / 1000)
        return film

    start = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    inputs = {"x": start, "t": torch.zeros(1)}
    parts = {name: ModelSpec(Table(settling(7, 6)), inputs) for name in ("small", "large")}
    program = capture(PipelineSpec(parts, sample, {"noise": start}))

    _, context = leaped(program, at=2)
    assert "several components are sampled (small, large)" in context.declined[0].reason
    for name, calls in (("small", [3, 6]), ("large", [6, 3])):
        made, _ = leaped(program, at=2, component=name)
        assert [len(made.calls(each)) for each in ("small", "large")] == calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 10}, "at=10, but 'net' is sampled in 10 steps"),
        ({"component": "nut"}, "the program has no component 'nut'"),
    ],
)
def test_steps_and_components_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        leaped(film_program(), **options)
    assert caught.value.hint in ("Steps to leap at are 0 to 9.", "Did you mean 'net'?")


@pytest.mark.parametrize(
    "options",
    [
        {"at": -1},
        {"at": 3, "min_steps": 3},
        {"min_steps": 0},
        {"patience": 0},
        {"tolerance": -1.0},
        {"tolerance": 2.0},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LPL(**options)


# ------------------------------------------------------------------ with token merging


@functools.cache
def video_program() -> Program:
    class Timed(models.Video):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return super().forward(x, text) * (0.5 + t.view(-1, 1, 1, 1, 1) / 1000)

    def sample(c: Any, noise: Tensor, text: Tensor) -> Tensor:
        film = noise
        for now, then in itertools.pairwise(times(6)):
            wanted = c.net(x=film, t=torch.full((1,), now), text=text)
            free = c.net(x=film, t=torch.full((1,), now), text=torch.zeros_like(text))
            film = film + (free + 2 * (wanted - free)) * ((now - then) / 1000)
        return film

    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(1, 4, 2, 3, models.WIDTH),
        "t": torch.zeros(1),
        "text": torch.randn(1, 5, models.WIDTH),
    }
    axes = {"x": "b t h w c", "text": "b l c"}
    net = ModelSpec(Timed(models.Spatial, models.Temporal).eval(), inputs, axes)
    given = {"noise": inputs["x"], "text": inputs["text"]}
    return capture(PipelineSpec({"net": net}, sample, given, {"noise": "b t h w c"}))


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("leap", ["at=3", "min_steps=1 patience=1 tolerance=1.5"])
def test_the_order_of_merging_and_leaping_is_no_matter(leap: str, steps: int) -> None:
    tdtm, lpl = f"tdtm{{steps={steps}}}", f"lpl{{{leap}}}"
    told: list[str] = []
    one, other = (
        run_passes(video_program(), text, verify="structure", tell=told.append)
        for text in (f"{tdtm},{lpl}", f"{lpl},{tdtm}")
    )
    assert fingerprint(one) == fingerprint(other)
    functions = [node.args[1] for node in one.calls()]
    count = 4 if leap == "at=3" else 6
    assert functions == (["tdtm"] * 2 * steps + ["base"] * 12)[: 2 * count]
    assert torch.equal(output(one), output(other))
    reached = one.steps("net")
    assert any(f"all {len(reached)} of the host" in line for line in told) == (
        steps >= len(reached)
    )
