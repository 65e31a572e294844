"""What values are sums of: the forms are checked against the numbers that the graph computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odsora_compiler.analysis.linear_forms import Form, HostConstants, LinearForms
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec, PipelineSpec
from odsora_compiler.ir.evaluate import run_operator
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_component


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


RANDOM = torch.Generator().manual_seed(0)
INPUTS = {
    "a": torch.randn(2, 3, generator=RANDOM),
    "b": torch.randn(2, 3, generator=RANDOM),
    "g": torch.rand(2, 1, generator=RANDOM),
}


def traced(host: Callable[..., Tensor]) -> tuple[Program, LinearForms]:
    """A host of a component `net` and inputs a, b [2, 3] and g [2, 1]; what a call gives varies."""

    def whole(c: Any, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return host(c.net(x=a), c.net(x=b), g)

    made = capture(PipelineSpec({"net": ModelSpec(Sine(), {"x": INPUTS["a"]})}, whole, INPUTS))
    varying = set(made.calls())
    for node in made.host.graph.nodes:
        if any(used in varying for used in node.all_input_nodes):
            varying.add(node)
    return made, LinearForms(made.host.graph, HostConstants(made), (), varying)


def value_of(made: Program, form: Form) -> Tensor:
    """The form, computed: atoms have the values that the graph gives them."""
    values: dict[Any, Any] = {}
    for node in made.host.graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "placeholder":
            values[node] = made.examples[str(node.target)]
        elif node.op == "get_attr":
            values[node] = made.constants[str(node.target)]
        elif node.target is call_component:
            values[node] = evaluate_component(made.component(args[0]), args[1], kwargs)
        elif node.op == "call_function":
            values[node] = run_operator(node.target, args, kwargs)
    total = torch.zeros(())
    for product, coefficient in form.items():
        total = total + functools.reduce(
            torch.mul, (values[atom] for atom in product), torch.tensor(coefficient)
        )
    return total


def check(host: Callable[..., Tensor]) -> list[float]:
    """The coefficients of the result, whose form must compute what the host does."""
    made, forms = traced(host)
    (result,) = made.host.results.values()
    form = forms.of(result)
    expected = host(torch.sin(INPUTS["a"]), torch.sin(INPUTS["b"]), INPUTS["g"])
    got = value_of(made, form)
    torch.testing.assert_close(got.expand(expected.shape), expected, rtol=1e-5, atol=1e-5)
    return sorted(form.values())


TABLE = torch.tensor([0.5, 0.5, 0.5])

SUMS: list[tuple[Callable[..., Tensor], list[float]]] = [
    (lambda u, v, g: u + v, [1, 1]),
    (lambda u, v, g: u - 2 * v, [-2, 1]),
    (lambda u, v, g: 1.5 - u, [-1, 1.5]),
    (lambda u, v, g: torch.add(u, v, alpha=-3), [-3, 1]),
    (lambda u, v, g: torch.sub(u, v, alpha=-3), [1, 3]),
    (lambda u, v, g: torch.rsub(u, v, alpha=2), [-2, 1]),
    (lambda u, v, g: -(u / 4), [-0.25]),
    (lambda u, v, g: u * TABLE + v / TABLE, [0.5, 2]),
    (lambda u, v, g: u + v - u, [1]),
    (lambda u, v, g: u * 0 + v, [1]),
    (lambda u, v, g: torch.addcmul(u, v, TABLE, value=4), [1, 2]),
    (lambda u, v, g: torch.addcdiv(u, v, TABLE, value=4), [1, 8]),
    (lambda u, v, g: torch.lerp(u, v, 0.25), [0.25, 0.75]),
    (lambda u, v, g: torch.lerp(u, v, TABLE), [0.5, 0.5]),
    (lambda u, v, g: (u.double() * 3).float(), [3]),
    (lambda u, v, g: u + torch.zeros_like(v) + torch.full_like(v, 2.0), [1, 2]),
    (lambda u, v, g: (u.flatten() + v.reshape(6) * 2).view(2, 3), [1, 2]),
    (lambda u, v, g: u[None].squeeze(0).unsqueeze(1)[:, 0] - v, [-1, 1]),
    (lambda u, v, g: torch.slice_scatter(u, v * 2, 0), [2]),
    # Guidance by a number known when the host runs: u (1 - g) + v g.
    (lambda u, v, g: u + g * (v - u), [-1, 1, 1]),
    (lambda u, v, g: (1 - g) * u + v * g, [-1, 1, 1]),
    (lambda u, v, g: u * g * g - g * (u * g), []),
]


@pytest.mark.parametrize("host,coefficients", SUMS, ids=range(len(SUMS)))
def test_sums_are_looked_into(host: Callable[..., Tensor], coefficients: list[float]) -> None:
    assert check(host) == pytest.approx(coefficients)


ATOMS: list[Callable[..., Tensor]] = [
    lambda u, v, g: u * v,
    lambda u, v, g: u / v,
    lambda u, v, g: 1 / u,
    lambda u, v, g: torch.div(u, 0.3, rounding_mode="floor"),
    lambda u, v, g: u.exp(),
    lambda u, v, g: torch.lerp(u, v, u),
    lambda u, v, g: u.flip(0),
    lambda u, v, g: u.int().float(),
    lambda u, v, g: torch.slice_scatter(u, v[:1], 0, 0, 1),
]


@pytest.mark.parametrize("host", ATOMS, ids=range(len(ATOMS)))
def test_everything_else_is_an_atom(host: Callable[..., Tensor]) -> None:
    assert check(host) == [1]


def test_reshapes_are_no_sums_where_something_is_broadcast() -> None:
    """Element i of the sum is not made of element i of both then."""

    def rows_and_columns(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return u.view(6, 1) + v.view(1, 6)

    def per_row(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return u.view(3, 2) * g.view(1, 2) + v.view(3, 2)

    def after(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return (u * g).view(3, 2) + v.view(3, 2)

    assert check(rows_and_columns) == [1]
    for host in (per_row, after):
        made, forms = traced(host)
        (result,) = made.host.results.values()
        assert all(len(product) == 1 for product in forms.of(result))


def test_atoms_that_are_chosen_are_not_looked_into() -> None:
    made, _ = traced(lambda u, v, g: (u + v) * 2 - u)
    total = next(node for node in made.host.operators() if node.name == "add")
    varying = set(made.host.operators())
    forms = LinearForms(made.host.graph, HostConstants(made), [total], varying)
    (result,) = made.host.results.values()

    assert forms.of(total) == {(total,): 1.0}
    assert sorted(forms.definition(total).values()) == [1.0, 1.0]
    assert forms.of(result)[(total,)] == 2.0
    assert len(forms.of(result)) == 2


def test_rounding_is_dropped_and_small_terms_are_kept() -> None:
    sigma = torch.tensor(0.7)

    def rounded(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return v + u * float(1 / sigma) * float(sigma) * 3 - u * 3

    assert check(rounded) == [1]
    assert check(lambda u, v, g: v + u * 3.00003 - u * 3) == pytest.approx([3e-5, 1], rel=1e-3)
    assert check(lambda u, v, g: v + u * 1e-12) == [1e-12, 1]


def test_constants_are_numbers_where_all_elements_are_equal() -> None:
    made, _ = traced(lambda u, v, g: u * torch.tensor([1.0, 2.0, 3.0]) + TABLE + v * g)
    constants = HostConstants(made)
    numbers = {
        constants.number(node)
        for node in made.host.graph.nodes
        if constants.tensor(node) is not None
    }
    assert numbers == {None, 0.5}
    assert constants.number(2) == 2.0
    assert math.isnan(constants.number(math.nan) or 0.0)
    assert all(constants.tensor(node) is None for node in made.host.placeholders)
