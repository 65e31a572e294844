"""The time of a sampler's steps, read from the calls, against the sizes of the steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.linear_forms import HostConstants
from odsora_compiler.analysis.sampler_states import NotEulerError

# How far the size of a step may be, relatively, from what the times say. Both are differences of
# neighbouring float32 numbers: measured up to 7.5e-4 (the smallest of 1000 steps, shifted to 1/12
# of an even one), 2e-5 in 30 steps.
SIZE_TOLERANCE = 1e-3

# What time flows to: 0 where it falls, and 1 or 1000 where it rises.
_FALLING_END = (0.0,)
_RISING_ENDS = (1.0, 1000.0)


def step_times(
    steps: Sequence[Sequence[fx.Node]], sizes: Sequence[float], constants: HostConstants
) -> list[float]:
    """t_i of every step, where the sizes are κ(t_i − t_{i+1}) with one κ and t ending at 0.

    `steps`: the calls of a component, step by step. The time is that of their arguments which is
    one known number in every step, changes, and fits. Raises `NotEulerError` when none does.
    """
    problems = []
    for name in steps[0][0].kwargs:
        known = [_time(calls, name, constants) for calls in steps]
        times = [value for value, _ in filter(None, known)]
        if len(times) < len(steps) or len(set(times)) < 2:
            continue
        problem = _misfit(times, sizes, max(rounding for _, rounding in filter(None, known)))
        if not problem:
            return times
        problems.append(f"by the argument '{name}' of its calls, {problem}")
    raise NotEulerError(
        "; ".join(problems)
        or "its calls have no argument that is known before the run and changes from step to "
        "step, as a time would"
    )


def _time(
    calls: Sequence[fx.Node], name: str, constants: HostConstants
) -> tuple[float, float] | None:
    """The one number that the argument is in all calls of a step, and how far it is rounded."""
    values = {constants.number(call.kwargs[name]) for call in calls}
    if len(values) != 1:
        return None
    (number,) = values
    given: Any = calls[0].kwargs[name]
    dtype = given.meta["val"].dtype
    if number is None or dtype == torch.bool:
        return None
    # Half a last place, twice in a difference; the authors of whole numbers round or cut.
    return number, torch.finfo(dtype).eps * abs(number) if dtype.is_floating_point else 1.0


def _misfit(times: Sequence[float], sizes: Sequence[float], rounding: float) -> str:
    """What of `sizes` does not fit `times`; empty when all does."""
    steps = [now - following for now, following in itertools.pairwise(times)]
    falling = times[0] > times[-1]
    if any(step == 0 or (step > 0) != falling for step in steps):
        return "time goes up and down"
    scale = sum(sizes[:-1]) / (times[0] - times[-1])
    for index, (step, size) in enumerate(zip(steps, sizes, strict=False)):
        if not _fits(size, scale * step, abs(scale) * rounding):
            return (
                f"step {index} goes from {times[index]:.6g} to {times[index + 1]:.6g} and adds "
                f"{size:.4g} times the drift; at the pace of all steps it would be "
                f"{scale * step:.4g}"
            )
    ends = _FALLING_END if falling else _RISING_ENDS
    if any(_fits(sizes[-1], scale * (times[-1] - end), abs(scale) * rounding) for end in ends):
        return ""
    return (
        f"the steps do not add up to the remaining time: the last starts at {times[-1]:.6g} and "
        f"adds {sizes[-1]:.4g} times the drift, which does not end at "
        + " or ".join(f"{end:g}" for end in ends)
    )


def _fits(size: float, expected: float, rounding: float) -> bool:
    """Whether a step has the size it should have; one of no size never has."""
    return size != 0 and abs(size - expected) <= SIZE_TOLERANCE * abs(expected) + rounding
