"""Which samplers are proved to take Euler steps along a flow, and why the others are not.

Authors here call the state `picture` and the drift `push`: names play no part in the proof.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odsora_compiler.analysis.sampler import EulerSampler, euler_sampler
from odsora_compiler.analysis.sampler_states import NotEulerError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec, PipelineSpec
from odsora_compiler.ir.evaluate import run_operator
from odsora_compiler.ir.host import call_component, random_tensor
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_component

SHAPE = (1, 3, 2, 4, 5)
STEPS = 6


class Push(nn.Module):
    """A drift field; `hint` may have channels of its own beside the picture's."""

    def forward(self, picture: Tensor, when: Tensor, hint: Tensor) -> Tensor:
        """Shapes [B, C, T, H, W], [B], [B, L]; returns [B, 3, T, H, W]."""
        clock = when.float().view(-1, 1, 1, 1, 1) / 1000
        warm = hint.mean(dim=1).view(-1, 1, 1, 1, 1)
        return (torch.tanh(picture[:, :3].float() * warm) + clock).to(picture.dtype)


def examples(batch: int, channels: int = 3, **kinds: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "picture": torch.randn(batch, channels, *SHAPE[2:], generator=random).to(
            kinds.get("picture", torch.float32)
        ),
        "when": torch.full((batch,), 500).to(kinds.get("when", torch.float32)),
        "hint": torch.randn(batch, 4, generator=random),
    }


def times(steps: int = STEPS, shift: float = 1.0) -> list[float]:
    """1000 … 0, one more than there are steps."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [1000 * shift * t / (1 + (shift - 1) * t) for t in even]


def program(
    sample: Callable[..., Any],
    batch: int = 1,
    others: dict[str, ModelSpec] | None = None,
    channels: int = 3,
    kinds: dict[str, torch.dtype] | None = None,
    **inputs: Any,
) -> Program:
    kinds = kinds or {}
    components = {"mover": ModelSpec(Push(), examples(batch, channels, **kinds)), **(others or {})}
    start = examples(1, **kinds)
    given = {"start": start["picture"], "hint": torch.ones(batch, 4), **inputs}
    return capture(PipelineSpec(components, sample, given))


def at(t: float, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((batch,), t, dtype=dtype)


# ------------------------------------------------------------------ Euler, however it is written

Write = Callable[[Tensor, Tensor, float, float], Tensor]


def sum_of_products(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return picture + push * ((now - then) / 1000)


def difference(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return picture - (then - now) / 1000 * push


def in_place(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    picture += push * ((now - then) / 1000)
    return picture


def scaled_in_place(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return picture.add_(push, alpha=(now - then) / 1000)


def through_a_view(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    picture[:] = picture + push * ((now - then) / 1000)
    return picture


def sample_by_sample(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    picture[0] += push[0] * ((now - then) / 1000)
    return picture


def flattened(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    moved = picture.flatten() - push.flatten() * (then - now) / 1000
    return moved.view(picture.shape)


def by_addcmul(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return torch.addcmul(picture, push, torch.tensor((now - then) / 1000), value=1.0)


def by_lerp(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return torch.lerp(picture, picture + push, (now - then) / 1000)


def by_rsub(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return -(-picture - push / (1000 / (now - then)))


def by_the_end(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    """The prediction of the end, and from there back: the ratio of two sigmas."""
    sigma, following = torch.tensor(now) / 1000, torch.tensor(then) / 1000
    end = picture + sigma * push
    ratio = following / sigma
    return ratio * picture + (1 - ratio) * end


def in_double_precision(picture: Tensor, push: Tensor, now: float, then: float) -> Tensor:
    return (picture.double() + push.double() * ((now - then) / 1000)).float()


WAYS = [
    sum_of_products, difference, in_place, scaled_in_place, through_a_view, sample_by_sample,
    flattened, by_addcmul, by_lerp, by_rsub, by_the_end, in_double_precision,
]  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 0.3, 4.0], ids="shift {}".format)
@pytest.mark.parametrize("write", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_write_a_step(write: Write, shift: float) -> None:
    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start.clone(), times(shift=shift)
        for now, then in itertools.pairwise(ts):
            picture = write(picture, c.mover(picture=picture, when=at(now), hint=hint), now, then)
        return picture

    check(program(sample), times(shift=shift))


def check(made: Program, ts: list[float]) -> EulerSampler:
    """The steps are as `ts` says, and the drifts are really the differences of the states."""
    found = euler_sampler(made, "mover")
    assert [step.time for step in found.steps] == pytest.approx(ts[:-1], rel=1e-6)
    whole = found.remaining(0)
    wanted = [(now - then) / ts[0] for now, then in itertools.pairwise(ts)]
    assert [step.size / whole for step in found.steps] == pytest.approx(wanted, rel=1e-4)
    values = every_value(made)
    for index, step in enumerate(found.steps):
        part = found.drift_node(index)
        if part is None:
            terms = [
                coefficient * functools.reduce(torch.mul, (values[atom] for atom in product))
                for product, coefficient in step.drift.items()
            ]
            moved = functools.reduce(torch.add, terms)
        else:
            moved = values[part[0]] * part[1]
        before = values[step.state].view(values[step.following].shape)
        torch.testing.assert_close(
            (before + moved).float(), values[step.following].float(), rtol=1e-3, atol=1e-5
        )
    return found


def every_value(made: Program) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for node in made.host.graph.nodes:
        args = torch.fx.node.map_arg(node.args, values.__getitem__)
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = made.examples[str(node.target)]
        elif node.op == "get_attr":
            values[node] = made.constants[str(node.target)]
        elif node.target is call_component:
            values[node] = evaluate_component(made.component(args[0]), args[1], kwargs)
        elif node.target is random_tensor:
            values[node] = random_tensor(*args)
        elif node.op == "call_function":
            values[node] = run_operator(node.target, args, kwargs)
    return values


def test_time_may_rise_and_whole_numbers_be_given() -> None:
    def rising(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture = start
        for i in range(STEPS):
            push = c.mover(picture=picture, when=at(i / STEPS), hint=hint)
            picture = picture + push / STEPS
        return picture

    found = euler_sampler(program(rising), "mover")
    assert found.remaining(2) == pytest.approx(4 / 6)

    def rounded(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times(shift=2.0)
        for now, then in itertools.pairwise(ts):
            when = at(int(now), dtype=torch.int64)
            push = c.mover(picture=picture, when=when, hint=hint)
            picture = sum_of_products(picture, push, now, then)
        return picture

    found = euler_sampler(program(rounded, kinds={"when": torch.int64}), "mover")
    assert found.remaining(0) == pytest.approx(1)


def told_times(ts: list[float], told: Callable[[float], float], dtype: torch.dtype) -> Program:
    """Steps as `ts` says, while the component is told rounded times."""

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture = start
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(told(now), dtype=dtype), hint=hint)
            picture = picture + push * ((now - then) / ts[0])
        return picture

    return program(sample, kinds={"when": dtype})


@pytest.mark.parametrize(
    ("told", "dtype"),
    [(int, torch.int64), (round, torch.int64), (float, torch.bfloat16), (float, torch.float16)],
    ids=["cut", "rounded", "bfloat16", "float16"],
)
@pytest.mark.parametrize(("steps", "shift"), [(2, 12.0), (30, 1.0), (30, 8.0), (50, 3.0)])
def test_times_may_be_rounded_a_little(
    told: Callable[[float], float], dtype: torch.dtype, steps: int, shift: float
) -> None:
    """By up to 1 or 1/256 of 1000: more than half of a short step, little of the whole way."""
    found = euler_sampler(told_times(times(steps, shift), told, dtype), "mover")
    assert len(found.steps) == steps
    assert found.remaining(0) == pytest.approx(1)


def test_the_number_of_a_step_may_be_the_time() -> None:
    found = euler_sampler(told_times([5, 4, 3, 2, 1, 0], int, torch.int64), "mover")
    assert [step.size for step in found.steps] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("last", [1, 0])
def test_small_whole_numbers_are_no_excuse_for_sizes_that_do_not_fit(
    last: int, dtype: torch.dtype
) -> None:
    ends = [1000.0, 950.0, 600.0, 580.0, 200.0, 0.0]
    made = told_times(ends, lambda now: last + 4 - ends.index(now), dtype)
    assert f"goes from {last + 4} to {last + 3} and adds 0.05 times the drift" in refusal(made)


def test_roundings_do_not_add_up() -> None:
    """Every step is within one of what its times say, half of them together are 45 off."""
    ends = [*(1000 - 10.9 * i for i in range(50)), *(455 - 9.1 * i for i in range(50)), 0.0]
    made = told_times(ends, lambda now: 1000 - 10 * ends.index(now), torch.int64)
    assert "steps 0 to 1 go from 1000 to 980 and add 0.0218 times the drift" in refusal(made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times(shift=3.0)
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now, dtype=dtype), hint=hint)
            moved = picture.float() + push.float() * ((now - then) / 1000)
            picture = moved.to(dtype)
        return picture

    found = euler_sampler(program(sample, kinds={"picture": dtype, "when": dtype}), "mover")
    assert found.remaining(0) == pytest.approx(1)
    node, amount = found.drift_node(2) or (None, 0)
    assert node is not None and node.meta["val"].dtype == torch.float32
    assert amount == pytest.approx(found.steps[2].size)


# ------------------------------------------------------------------ guidance and conditions

Guide = Callable[..., Tensor]


def doubled(c: Any, picture: Tensor, when: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
    both = c.mover(picture=torch.cat([picture, picture]), when=when.repeat(2), hint=hint)
    wanted, free = both.chunk(2)
    return wanted, free


def separate(c: Any, picture: Tensor, when: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
    wanted = c.mover(picture=picture, when=when, hint=hint)
    return wanted, c.mover(picture=picture, when=when, hint=torch.zeros_like(hint))


def fixed(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    return free + 7.0 * (wanted - free)


def scheduled(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    return torch.lerp(free, wanted, 1.0 + index)


def in_the_first_half(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    return free + 7.0 * (wanted - free) if index < 3 else wanted


def given(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    return free + strength * (wanted - free)


def given_for_some(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    return (1 - strength) * free + wanted * strength if index % 2 else wanted


def rescaled(index: int, strength: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    guided = free + strength * (wanted - free)
    even = guided * (wanted.std() / guided.std())
    return 0.7 * even + 0.3 * guided


@pytest.mark.parametrize(
    "guide", [fixed, scheduled, in_the_first_half, given, given_for_some, rescaled]
)
@pytest.mark.parametrize("call", [doubled, separate])
@pytest.mark.parametrize("strength", [torch.tensor(3.0), torch.full((1, 1, 1, 1, 1), 3.0)])
def test_guidance(call: Any, guide: Guide, strength: Tensor) -> None:
    def sample(c: Any, start: Tensor, hint: Tensor, strength: Tensor) -> Tensor:
        picture, ts = start, times(shift=2.0)
        for index, (now, then) in enumerate(itertools.pairwise(ts)):
            push = guide(index, strength, *call(c, picture, at(now), hint))
            picture = sum_of_products(picture, push, now, then)
        return picture

    made = program(sample, batch=2 if call is doubled else 1, strength=strength)
    found = check(made, times(shift=2.0))
    assert [len(step.calls) for step in found.steps] == [1 if call is doubled else 2] * STEPS or (
        guide is not fixed
    )


def test_a_drift_that_is_never_formed_as_a_whole() -> None:
    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            wanted, free = separate(c, picture, at(now), hint)
            picture = picture + wanted * (7 * (now - then) / 1000)
            picture = picture - free * (6 * (now - then) / 1000)
        return picture

    found = check(program(sample), times())
    assert found.drift_node(0) is None
    assert found.remaining(0) == pytest.approx(1)


def test_a_picture_beside_the_state() -> None:
    """Channels of an image to start from, next to the state's."""

    def sample(c: Any, start: Tensor, hint: Tensor, image: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            both = torch.cat([picture, image], dim=1)
            push = c.mover(picture=both, when=at(now), hint=hint)
            picture = sum_of_products(picture, push, now, then)
        return picture

    check(program(sample, channels=5, image=torch.randn(1, 2, *SHAPE[2:])), times())


def test_components_called_within_the_steps() -> None:
    """A network that looks at the state and gives a hint, and a weaker one to be led away from."""

    class Look(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.mean(dim=(1, 2, 3))[:, :4]

    weaker = ModelSpec(Push(), examples(1))
    others = {"look": ModelSpec(Look(), {"picture": torch.randn(SHAPE)}), "weaker": weaker}

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            told = hint + c.look(picture=picture)
            push = c.mover(picture=picture, when=at(now), hint=told)
            worse = c.weaker(picture=picture, when=at(now), hint=hint)
            picture = sum_of_products(picture, push + 2 * (push - worse), now, then)
        return picture

    made = program(sample, others=others)
    found = check(made, times())
    assert euler_sampler(made, "weaker").result is found.result


class Finish(nn.Module):
    """What is left of a drift, by a strength and by the state."""

    def forward(self, push: Tensor, strength: Tensor, beside: Tensor) -> Tensor:
        return push * strength.view(-1, 1, 1, 1, 1) - 0.3 * beside


def finishing() -> dict[str, ModelSpec]:
    inputs = {"push": torch.randn(SHAPE), "strength": torch.ones(1), "beside": torch.randn(SHAPE)}
    return {"finish": ModelSpec(Finish(), inputs)}


@pytest.mark.parametrize("strength", ["the time", "its first value"])
def test_a_drift_by_two_components_one_after_the_other(strength: str) -> None:
    """Both are told the state, the time, or what is the same in all steps."""

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times(shift=2.0)
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now), hint=hint)
            told = now if strength == "the time" else ts[0]
            push = c.finish(push=push, strength=at(told), beside=picture)
            push = c.finish(push=push, strength=at(0.5) + 0.1 * hint[:, 0], beside=-picture)
            picture = sum_of_products(picture, push, now, then)
        return picture

    check(program(sample, others=finishing()), times(shift=2.0))


def test_what_comes_after_is_no_matter() -> None:
    class Show(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.clamp(-1, 1)

    def sample(c: Any, start: Tensor, hint: Tensor) -> dict[str, Tensor]:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now), hint=hint)
            picture = sum_of_products(picture, push, now, then)
        shown = c.show(picture=picture * 2 + 1)
        return {"film": shown, "latent": picture, "noise": start}

    others = {"show": ModelSpec(Show(), {"picture": torch.randn(SHAPE)})}
    check(program(sample, others=others), times())


# ------------------------------------------------------------------ not Euler


def refusal(made: Program, component: str = "mover") -> str:
    with pytest.raises(NotEulerError) as caught:
        euler_sampler(made, component)
    return str(caught.value)


def test_one_step_is_nothing_to_leave_out() -> None:
    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        return start + c.mover(picture=start, when=at(1000), hint=hint)

    assert "called in one step only" in refusal(program(sample))


Step = Callable[..., Tensor]


def predicted_end(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any
) -> Tensor:
    """The network gives the end itself."""
    return push + (picture - push) * (then / now)


def shrinking(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    """DDIM with a linear schedule of 1000 betas."""
    betas = torch.linspace(1e-4, 2e-2, 1000)
    kept = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])
    a, b = kept[round(now)], kept[round(then)]
    start = (picture - (1 - a).sqrt() * push) / a.sqrt()
    return b.sqrt() * start + (1 - b).sqrt() * push


def two_stages(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    """Heun."""
    length = (now - then) / 1000
    ahead = picture + push * length
    again = c.mover(picture=ahead, when=at(then), hint=k["hint"])
    return picture + (push + again) * (length / 2)


def midpoint(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    length = (now - then) / 1000
    again = c.mover(picture=picture + push * (length / 2), when=at(now), hint=k["hint"])
    return picture + again * length


def remembering(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    """Adams-Bashforth."""
    before = k["memory"].get("push", push)
    k["memory"]["push"] = push
    return picture + (1.5 * push - 0.5 * before) * ((now - then) / 1000)


def averaged(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    """Momentum: a running mean of the drifts, normalised, which is no sum."""
    k["memory"]["mean"] = 0.5 * k["memory"].get("mean", push) + 0.5 * push
    return picture + torch.tanh(k["memory"]["mean"]) * ((now - then) / 1000)


def noisy(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    return sum_of_products(picture, push, now, then) + 0.01 * torch.randn_like(picture)


def noise_given(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    return sum_of_products(picture, push, now, then) + 0.01 * k["start"]


def noise_in_the_drift(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any
) -> Tensor:
    return sum_of_products(picture, push * torch.randn_like(picture), now, then)


def shifted(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    return sum_of_products(picture, push, now, then) + 0.25


def length_given(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any
) -> Tensor:
    return picture + push * k["dial"] * (now - then)


def scale_given(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    return picture * k["dial"] + push * ((now - then) / 1000)


def scale_found(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    return picture * (1 - push.std()) + push * ((now - then) / 1000)


def bent(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    return picture + push * torch.sigmoid(picture) * ((now - then) / 1000)


def clipped(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any) -> Tensor:
    return sum_of_products(picture, push, now, then).clamp(-3, 3)


def masked(c: Any, picture: Tensor, push: Tensor, now: float, then: float, **k: Any) -> Tensor:
    mask = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    return mask * sum_of_products(picture, push, now, then) + (1 - mask) * k["start"]


def stopping_early(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any
) -> Tensor:
    return sum_of_products(picture, push, now, then or now / 2)


def overshooting(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any
) -> Tensor:
    return sum_of_products(picture, push, now, then if now < 600 else 0.9 * then)


def hidden_length(
    c: Any, picture: Tensor, push: Tensor, now: float, then: float, **_: Any
) -> Tensor:
    """All steps of a size, in an operator that is not looked into."""
    return picture + torch.where(push > -9, push * (1 + now / 1000), push) / 6


@pytest.mark.parametrize(
    ("advance", "reason"),
    [
        (predicted_end, "in step 0 the state is scaled by 0.833333 before the drift is added"),
        (shrinking, "in step 0 the state is scaled by"),
        (two_stages, "step 1 starts again from the state of step 0: a method of several stages"),
        (midpoint, "starts again from the state of step 0"),
        (remembering, "step 1 uses the state or drift of step 0 again, as multistep methods do"),
        (averaged, "step 1 uses the state or drift of step 0 again"),
        (noisy, "step 0 adds noise to the state"),
        (noise_given, "scaled by 1.01"),
        (noise_in_the_drift, "step 0 adds noise to the state"),
        (shifted, "step 0 adds a number to the state, which no call gives"),
        (length_given, "the size of step 0 depends on 'dial', which is not known before the run"),
        (scale_given, "in step 0 the state is scaled by 'dial', which is not known"),
        (scale_found, "(mul) is computed from the state itself"),
        (bent, "(mul) is computed from the state itself"),
        (clipped, "the state after step 0 is made by clamp"),
        (masked, "the state is scaled by 'constant"),
        (stopping_early, "the steps do not add up to the remaining time"),
        (overshooting, "goes from 1000 to 833.333 and adds"),
        (hidden_length, "the drift of step 1 is computed otherwise than that of step 0"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_methods_are_refused_with_a_reason(advance: Step, reason: str) -> None:
    def sample(c: Any, start: Tensor, hint: Tensor, dial: Tensor) -> Tensor:
        picture, ts = start, times()
        more = {"hint": hint, "dial": dial, "start": start, "memory": {}}
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now), hint=hint)
            picture = advance(c, picture, push, now, then, **more)
        return picture

    assert reason in refusal(program(sample, dial=torch.tensor(1e-3)))


def told_the_length(c: Any, picture: Tensor, push: Tensor, length: float) -> Tensor:
    return c.finish(push=push, strength=at(length), beside=picture)


def told_it_indirectly(c: Any, picture: Tensor, push: Tensor, length: float) -> Tensor:
    """By another component again, which sees nothing of the drift."""
    told = c.finish(push=picture, strength=at(length), beside=picture)
    return c.finish(push=push, strength=at(1.0), beside=told)


def told_within_an_operator(c: Any, picture: Tensor, push: Tensor, length: float) -> Tensor:
    told = c.finish(push=picture, strength=at(length), beside=picture)
    return torch.where(push > 0, push, told)


def told_in_parts(c: Any, picture: Tensor, push: Tensor, length: float) -> Tensor:
    made = c.finish(push=push, strength=at(length), beside=picture)
    return torch.cat([made[:, :1], push[:, 1:]], dim=1)


def told_noise(c: Any, picture: Tensor, push: Tensor, length: float) -> Tensor:
    return c.finish(push=push, strength=at(1.0), beside=torch.randn_like(picture))


@pytest.mark.parametrize(
    "finished",
    [told_the_length, told_it_indirectly, told_within_an_operator, told_in_parts, told_noise],
    ids=lambda way: way.__name__,
)
def test_no_size_hides_in_another_component(finished: Callable[..., Tensor]) -> None:
    """Time runs evenly and so do the sums; what the other component does with it is unknown."""
    lengths = [0.05, 0.35, 0.02, 0.28, 0.2, 0.1]

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, length in zip(ts, lengths, strict=False):
            push = c.mover(picture=picture, when=at(now), hint=hint)
            picture = picture + finished(c, picture, push, length)
        return picture

    reason = refusal(program(sample, others=finishing()))
    assert "the drift of step 1 is computed otherwise than that of step 0" in reason


def test_a_state_that_enters_scaled_is_refused() -> None:
    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            inner = picture / (1 + now / 1000)
            push = c.mover(picture=inner, when=at(now), hint=hint)
            picture = sum_of_products(picture, push, now, then)
        return picture

    assert "the state enters the calls scaled" in refusal(program(sample))


def test_results_of_earlier_steps_beside_the_state_are_refused() -> None:
    """Self-conditioning."""

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture, ts, told = start, times(), hint
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now), hint=told)
            told = hint + push.mean()
            picture = sum_of_products(picture, push, now, then)
        return picture

    assert "in several ways" in refusal(program(sample))


@pytest.mark.parametrize("kept", ["states", "drifts", "previews"])
def test_values_of_single_steps_used_elsewhere_are_refused(kept: str) -> None:
    class Show(nn.Module):
        def forward(self, picture: Tensor) -> Tensor:
            return picture.clamp(-1, 1)

    def sample(c: Any, start: Tensor, hint: Tensor) -> dict[str, Tensor]:
        picture, ts, trail = start, times(), []
        for now, then in itertools.pairwise(ts):
            push = c.mover(picture=picture, when=at(now), hint=hint)
            picture = sum_of_products(picture, push, now, then)
            if kept == "previews":
                trail.append(c.show(picture=picture))
            else:
                trail.append(picture if kept == "states" else push.mean())
        return {"picture": picture, "trail": torch.stack(trail)}

    others = {"show": ModelSpec(Show(), {"picture": torch.randn(SHAPE)})}
    made = program(sample, others=others if kept == "previews" else None)
    assert "output 'trail' needs step" in refusal(made)


@pytest.mark.parametrize("when", ["dial", "always 500"])
def test_a_time_that_is_not_known_is_refused(when: str) -> None:
    def sample(c: Any, start: Tensor, hint: Tensor, dial: Tensor) -> Tensor:
        picture, ts = start, times()
        for now, then in itertools.pairwise(ts):
            clock = dial * at(now) if when == "dial" else at(500)
            push = c.mover(picture=picture, when=clock, hint=hint)
            picture = sum_of_products(picture, push, now, then)
        return picture

    reason = refusal(program(sample, dial=torch.tensor(1.0)))
    assert "no argument that is known before the run and changes" in reason


# ------------------------------------------------------------------ schedulers of diffusers


def diffusers_program(scheduler: Any, **settings: Any) -> Program:
    scheduler.set_timesteps(STEPS, **settings)
    kind = scheduler.timesteps.dtype

    def sample(c: Any, start: Tensor, hint: Tensor) -> Tensor:
        picture = start * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            inner = picture
            if hasattr(scheduler, "scale_model_input"):
                inner = scheduler.scale_model_input(picture, t)
            push = c.mover(picture=inner, when=t.expand(1), hint=hint)
            picture = scheduler.step(push, t, picture, return_dict=False)[0]
        return picture

    return program(sample, kinds={"when": kind})


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_flow_matching_euler_of_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = diffusers_program(FlowMatchEulerDiscreteScheduler(shift=shift))
    found = euler_sampler(made, "mover")
    check(made, [*(step.time for step in found.steps), 0.0])
    assert found.remaining(0) == pytest.approx(-found.steps[0].time / 1000, rel=1e-6)


def test_flow_matching_by_a_solver_of_order_one_is_euler_too() -> None:
    """Written as a prediction of the end, with logarithms, and times cut to whole numbers."""
    from diffusers import DPMSolverMultistepScheduler

    options = {"solver_order": 1, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    made = diffusers_program(DPMSolverMultistepScheduler(**options))
    assert euler_sampler(made, "mover").remaining(0) == pytest.approx(-0.999, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDIMScheduler", {"clip_sample": False}, "the state is scaled by 3.50307"),
        ("DDIMScheduler", {}, "(clamp) is computed from the state itself"),
        ("DDPMScheduler", {"clip_sample": False}, "step 0 adds noise"),
        ("EulerDiscreteScheduler", {}, "the state enters the calls scaled"),
        ("FlowMatchHeunDiscreteScheduler", {}, "several stages"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "step 0"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            "step 1 uses the state or drift of step 0 again",
        ),
        (
            "UniPCMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
            "step",
        ),
    ],
)
def test_other_schedulers_of_diffusers(name: str, options: dict[str, Any], reason: str) -> None:
    import diffusers

    made = diffusers_program(getattr(diffusers, name)(**options))
    assert reason in refusal(made)
