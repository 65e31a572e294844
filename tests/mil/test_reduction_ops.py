"""Reductions against torch in fp64: default axes, negative axes, kept dimensions, integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mil_programs import Case, case, conformance_test, mb, numbers

X = numbers(2, 3, 4, 5)
POSITIVE = X.abs() + 0.25
INTS = torch.tensor([[-7, -2, 0], [3, 5, 9]], dtype=torch.int32)
FAR_APART = torch.randperm(60, generator=torch.Generator().manual_seed(0)).reshape(3, 4, 5).double()


def reduction(
    name: str, reference: Callable[[torch.Tensor, list[int], bool], torch.Tensor], x: torch.Tensor
) -> list[Case]:
    build = getattr(mb, name)
    return [
        case(
            f"{name}_axes",
            lambda f, x: build(x=x, axes=[-1, 1]),
            lambda x: reference(x, [1, 3], False),
            x=x,
        ),
        case(
            f"{name}_kept",
            lambda f, x: build(x=x, axes=[0, 2], keep_dims=True),
            lambda x: reference(x, [0, 2], True),
            x=x,
        ),
        case(f"{name}_all", lambda f, x: build(x=x), lambda x: reference(x, [], False), x=x),
    ]


def product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in reversed(axes or range(x.ndim)):
        x = x.prod(axis, keepdim=keep)
    return x


CASES = [
    *reduction("reduce_sum", lambda x, axes, keep: x.sum(axes, keep), X),
    *reduction("reduce_mean", lambda x, axes, keep: x.mean(axes, keep), X),
    *reduction("reduce_max", lambda x, axes, keep: x.amax(axes, keep), X),
    *reduction("reduce_min", lambda x, axes, keep: x.amin(axes, keep), X),
    *reduction("reduce_prod", product, POSITIVE**0.125),
    *reduction("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keep), X),
    *reduction("reduce_l2_norm", lambda x, axes, keep: x.square().sum(axes, keep).sqrt(), X),
    *reduction("reduce_sum_square", lambda x, axes, keep: x.square().sum(axes, keep), X),
    *reduction("reduce_log_sum", lambda x, axes, keep: x.sum(axes, keep).log(), POSITIVE),
    *reduction(
        "reduce_log_sum_exp",
        lambda x, axes, keep: x.exp().sum(axes or list(range(x.ndim)), keep).log(),
        X,
    ),
    case("argmax", lambda f, x: mb.reduce_argmax(x=x), lambda x: x.argmax(-1), x=FAR_APART),
    case(
        "argmax_axis",
        lambda f, x: mb.reduce_argmax(x=x, axis=0, keep_dims=True),
        lambda x: x.argmax(0, keepdim=True),
        x=FAR_APART,
    ),
    case(
        "argmin",
        lambda f, x: mb.reduce_argmin(x=x, axis=-2, output_dtype="uint16"),
        lambda x: x.argmin(1),
        x=FAR_APART,
    ),
    case("int_sum", lambda f, x: mb.reduce_sum(x=x, axes=[1]), lambda x: x.sum(1), x=INTS),
    case("int_max", lambda f, x: mb.reduce_max(x=x, axes=[0]), lambda x: x.amax(0), x=INTS),
    # 4096 ones are beyond what a running fp16 sum of ones can count to, the squares beyond fp16.
    case(
        "sum_of_many",
        lambda f, x: mb.reduce_sum(x=x),
        lambda x: x.sum(),
        x=torch.ones(4096, dtype=torch.float64),
    ),
    case(
        "mean_beyond_range",
        lambda f, x: mb.reduce_mean(x=x, axes=[0]),
        lambda x: x.mean(0),
        x=torch.full((1000, 2), 1000.0, dtype=torch.float64),
    ),
]

test_operation = conformance_test(CASES)
