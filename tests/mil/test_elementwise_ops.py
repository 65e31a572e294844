"""Arithmetic, comparison, logic and casts against torch and numpy in fp64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from mil_programs import Case, case, conformance_test, mb, numbers

X, Y = numbers(2, 3, 4), numbers(2, 3, 4, seed=5)
POSITIVE = X.abs() + 0.0625
INSIDE = (X / 8).clamp(-0.9375, 0.9375).half().double()
INTS = torch.tensor([[-7, -2, 0], [3, 5, 9]], dtype=torch.int32)
DIVISORS = torch.tensor([2, -3, 4], dtype=torch.int32)
YES_NO = torch.tensor([[True, False, True], [False, False, True]])
ROW = torch.tensor([True, True, False])


def unary(name: str, reference: Callable[..., torch.Tensor], x: torch.Tensor = X) -> Case:
    return case(name, lambda f, x: getattr(mb, name)(x=x), reference, x=x)


CASES = [
    # Broadcast on either side; the second operand a constant or an input.
    case("add", lambda f, x, y: mb.add(x=x, y=y), lambda x, y: x + y, x=(2, 3, 4), y=(3, 1)),
    case("add_scalar", lambda f, x: mb.add(x=f(0.5), y=x), lambda x: x + 0.5, x=(2, 3)),
    case("sub", lambda f, x, y: mb.sub(x=x, y=y), lambda x, y: x - y, x=(4,), y=(2, 3, 4)),
    case("mul", lambda f, x, y: mb.mul(x=x, y=y), lambda x, y: x * y, x=(2, 3, 4), y=(4,)),
    case("div", lambda f, x, y: mb.real_div(x=x, y=y), lambda x, y: x / y, x=X, y=POSITIVE),
    case("pow", lambda f, x: mb.pow(x=x, y=f(1.5)), lambda x: x**1.5, x=POSITIVE),
    case("pow_square", lambda f, x: mb.pow(x=x, y=f(2.0)), lambda x: x**2, x=X),
    case("mod", lambda f, x, y: mb.mod(x=x, y=y), lambda x, y: x - y * (x / y).floor(), x=X, y=Y),
    case("floor_div", lambda f, x: mb.floor_div(x=x, y=f(0.75)), lambda x: (x / 0.75).floor(), x=X),
    case("maximum", lambda f, x, y: mb.maximum(x=x, y=y), lambda x, y: x.maximum(y), x=X, y=Y),
    case("minimum", lambda f, x, y: mb.minimum(x=x, y=y), lambda x, y: x.minimum(y), x=X, y=Y),
    case("int_add", lambda f, x, y: mb.add(x=x, y=y), lambda x, y: x + y, x=INTS, y=DIVISORS),
    case("int_mul", lambda f, x, y: mb.mul(x=x, y=y), lambda x, y: x * y, x=INTS, y=DIVISORS),
    case(
        "int_mod",
        lambda f, x, y: mb.mod(x=x, y=y),
        lambda x, y: torch.remainder(x, y),
        x=INTS,
        y=DIVISORS,
    ),
    case(
        "int_floor_div",
        lambda f, x, y: mb.floor_div(x=x, y=y),
        lambda x, y: torch.tensor(np.floor_divide(x.numpy(), y.numpy())),
        x=INTS,
        y=DIVISORS,
    ),
    *(
        case(
            f"{name}_{kind}",
            lambda f, x, y, name=name: getattr(mb, name)(x=x, y=y),
            lambda x, y, compare=compare: compare(x, y),
            x=x,
            y=y,
        )
        for name, compare in {
            "equal": torch.eq,
            "not_equal": torch.ne,
            "greater": torch.gt,
            "greater_equal": torch.ge,
            "less": torch.lt,
            "less_equal": torch.le,
        }.items()
        for kind, x, y in (("float", X.round(), Y.round()), ("int", INTS, DIVISORS.sort().values))
    ),
    *(
        case(
            name,
            lambda f, x, y, name=name: getattr(mb, name)(x=x, y=y),
            lambda x, y, logic=logic: logic(x, y),
            x=YES_NO,
            y=ROW,
        )
        for name, logic in {
            "logical_and": torch.logical_and,
            "logical_or": torch.logical_or,
            "logical_xor": torch.logical_xor,
        }.items()
    ),
    case("logical_not", lambda f, x: mb.logical_not(x=x), torch.logical_not, x=YES_NO),
    case(
        "select",
        lambda f, c, a, b: mb.select(cond=c, a=a, b=b),
        lambda c, a, b: torch.where(c, a, b),
        c=YES_NO,
        a=(2, 3),
        b=(2, 3),
    ),
    case(
        "select_scalar",
        lambda f, c, a: mb.select(cond=c, a=a, b=f(-np.inf)),
        lambda c, a: a.masked_fill(~c, -torch.inf),
        c=YES_NO,
        a=(2, 3),
    ),
    unary("abs", torch.abs),
    unary("ceil", torch.ceil),
    unary("floor", torch.floor),
    unary("sign", torch.sign, X.round()),
    unary("sqrt", torch.sqrt, POSITIVE),
    unary("square", torch.square),
    unary("exp", torch.exp),
    unary("exp2", torch.exp2),
    unary("erf", torch.erf),
    unary("cos", torch.cos),
    unary("sin", torch.sin),
    unary("tan", torch.tan),
    unary("cosh", torch.cosh),
    unary("sinh", torch.sinh),
    unary("tanh", torch.tanh),
    unary("acos", torch.acos, INSIDE),
    unary("asin", torch.asin, INSIDE),
    unary("atan", torch.atan),
    unary("atanh", torch.atanh, INSIDE),
    unary("log", torch.log, POSITIVE),
    unary("rsqrt", torch.rsqrt, POSITIVE),
    unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE + 1),
    case("round", lambda f, x: mb.round(x=x), torch.round, x=torch.arange(-2, 2.25, 0.25).double()),
    case(
        "log_epsilon",
        lambda f, x: mb.log(x=x, epsilon=f(0.25)),
        lambda x: (x + 0.25).log(),
        x=POSITIVE,
    ),
    case(
        "rsqrt_epsilon",
        lambda f, x: mb.rsqrt(x=x, epsilon=f(2**-6)),
        lambda x: (x + 2**-6) ** -0.5,
        x=POSITIVE,
    ),
    case(
        "inverse_epsilon",
        lambda f, x: mb.inverse(x=x, epsilon=f(0.5)),
        lambda x: 1 / (x + 0.5),
        x=POSITIVE,
    ),
    # 1e-6 is subnormal in fp16, and half of it is lost if the sum is rounded before the root.
    case(
        "rsqrt_of_tiny_numbers",
        lambda f, x: mb.rsqrt(x=x, epsilon=f(2**-20)),
        lambda x: (x + 2**-20) ** -0.5,
        x=torch.tensor([2.0**-20, 2.0**-14, 2.0**-10 + 2.0**-20]).double(),
    ),
    case(
        "clip",
        lambda f, x: mb.clip(x=x, alpha=f(-0.5), beta=f(0.75)),
        lambda x: x.clamp(-0.5, 0.75),
        x=X,
    ),
    case(
        "threshold", lambda f, x: mb.threshold(x=x, alpha=f(0.5)), lambda x: x.clamp(min=0.5), x=X
    ),
    case("int_abs", lambda f, x: mb.abs(x=x), torch.abs, x=INTS),
    case("cast_to_int", lambda f, x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), x=X * 2),
    case("cast_to_bool", lambda f, x: mb.cast(x=x, dtype="bool"), lambda x: x != 0, x=X.round()),
]


test_operation = conformance_test(CASES)
