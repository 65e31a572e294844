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

# The most that a rounding of the times may be beside all of time. It does not add up: whatever part
# of the way a leap leaves out, its sizes fit its time to this. Times of bfloat16 are rounded by
# 1/128 and whole numbers of a thousand by 1/1000; a rounding coarser than this would let any sizes
# pass, so that such times (the numbers of a few steps) must fit as they are.
COARSEST_ROUNDING = 1e-2

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
    ends = _FALLING_END if falling else _RISING_ENDS
    if not all(_off_pace([*times, end], sizes, rounding) for end in ends):
        return ""
    return _off_pace(times, sizes[:-1], rounding) or (
        f"the steps do not add up to the remaining time: the last starts at {times[-1]:.6g} and "
        f"adds {sizes[-1]:.4g} times the drift, which does not end at "
        + " or ".join(f"{end:g}" for end in ends)
    )


def _off_pace(times: Sequence[float], sizes: Sequence[float], rounding: float) -> str:
    """Which of `sizes`, alone or with all before it, is not in proportion to its time.

    `times`: one more than `sizes`. Empty when all are.
    """
    whole = times[0] - times[-1]
    if not whole:
        return f"time ends where it begins, at {times[0]:.6g}"
    pace = sum(sizes) / whole
    slack = abs(pace) * rounding if rounding <= COARSEST_ROUNDING * abs(whole) else 0.0
    sums = [0.0, *itertools.accumulate(sizes)]
    for last, size in enumerate(sizes):
        for first, added in ((last, size), (0, sums[last + 1])):
            due = pace * (times[first] - times[last + 1])
            # A step of no size never has the one it should have.
            if size == 0 or abs(added - due) > SIZE_TOLERANCE * abs(due) + slack:
                one = first == last
                return (
                    (f"step {last} goes" if one else f"steps {first} to {last} go")
                    + f" from {times[first]:.6g} to {times[last + 1]:.6g} and "
                    + (f"adds {added:.4g}" if one else f"add {added:.4g}")
                    + f" times the drift; at the pace of all steps it would be {due:.4g}"
                )
    return ""
