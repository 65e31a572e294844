"""Each legalization rule: a graph where it fires, one where it must not, values kept in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.lowering.legalize import legalize
from odsora_compiler.lowering.rules import DEFAULT_RULES, HALF_RULES
from odsora_compiler.rewrite.rules import rewrite

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = {"x": numbers(2, 3, 4)}
XY = {"x": numbers(3, 3), "y": numbers(3, 3, seed=1)}
MIXED = {"x": numbers(2, 3), "i": torch.arange(6).view(2, 3)}
FLAGS = {"x": numbers(2, 3) > 0, "y": numbers(2, 3, seed=1) > 0}
WHOLE = {"x": torch.arange(6), "y": torch.arange(6) + 3}
QKV = {name: numbers(1, 4, 3, 8, seed=i) for i, name in enumerate("qkv")}
GROUPS = {**QKV, "k": numbers(1, 2, 3, 8), "v": numbers(1, 2, 3, 8)}
VIDEO = {"x": numbers(2, 3, 4, 6)}
IMAGE = {"x": numbers(1, 2, 4, 4)}

Example = tuple[Callable[..., Any], dict[str, Tensor]]

# Rule → where it fires, where it must not.
EXAMPLES: dict[str, tuple[Example, Example]] = {
    "tanh-gelu": (
        (lambda x: F.gelu(x, approximate="tanh"), X),
        (lambda x: F.gelu(x), X),
    ),
    "alpha": (
        (lambda x, y: torch.add(x, y, alpha=2) - torch.rsub(x, y, alpha=3), XY),
        (lambda x, y: torch.add(x, y) - torch.rsub(x, y), XY),
    ),
    "matrix-factors": (
        (lambda x, y: torch.addmm(x, x, y, beta=0.5, alpha=2), XY),
        (lambda x, y: torch.addmm(x, x, y), XY),
    ),
    "addcmul": (
        (lambda x, y: torch.addcmul(x, x, y, value=2), XY),
        (lambda x, y: x + 2 * x * y, XY),
    ),
    "rms-norm": (
        (lambda x: F.rms_norm(x, (3, 4), x[0]), X),
        (lambda x: F.layer_norm(x, (3, 4)), X),
    ),
    "outer-einsum": (
        (lambda x, y: torch.einsum("...i,...j->j...i", x, y), XY),
        (lambda x, y: torch.einsum("ij,jk->ik", x, y), XY),
    ),
    "group-norm": (
        (lambda x: F.group_norm(x, 2, x[0, :, 0, 0, 0], eps=0.1), {"x": numbers(2, 4, 3, 2, 2)}),
        (lambda x: F.layer_norm(x, (2, 2)), {"x": numbers(2, 4, 3, 2, 2)}),
    ),
    "reciprocal": (
        (lambda x: 1 / x, X),
        (lambda x: x / 2, X),
    ),
    "log-softmax": (
        (lambda x: F.log_softmax(100 * x, 1), X),
        (lambda x: F.softmax(x, 1).log(), X),
    ),
    "search-everywhere": (
        (lambda x: x.argmax() + x.argmin(keepdim=True), X),
        (lambda x: x.argmax(0) + x.argmin(0), X),
    ),
    "common-dtype": (
        (lambda x, i: torch.stack([x, i, x]), MIXED),
        (lambda x, i: torch.stack([i, i]), MIXED),
    ),
    "reduce-dtype": (
        (lambda x, y: (x & y).sum(0), FLAGS),
        (lambda x, y: (x + y).sum(0), XY),
    ),
    "fill": (
        (lambda x: x.new_ones(3, 4) + torch.zeros_like(x), X),
        (lambda x: x + torch.full((), 2.0), X),
    ),
    "where-number": (
        (lambda x, y: torch.where(x > y, x, 2.0), XY),
        (lambda x, y: torch.where(x > y, x, y), XY),
    ),
    "logic": (
        (lambda x, y: (x & y) | (x ^ y), FLAGS),
        (lambda x, y: (x & y) | 4, WHOLE),
    ),
    "pool-stride": (
        (lambda x: F.max_pool2d(x, 2), IMAGE),
        (lambda x: F.max_pool2d(x, 2, 1), IMAGE),
    ),
    "high-rank-permute": (
        (lambda x: x.view(2, 3, 2, 2, 3, 2).permute(5, 0, 2, 4, 1, 3).reshape(4, 36), VIDEO),
        (lambda x: x.view(2, 3, 2, 2, 6).permute(4, 0, 2, 1, 3).reshape(12, 12), VIDEO),
    ),
    "high-rank-view": (
        (lambda x: x.view(2, 3, 2, 2, 3, 2).transpose(1, 2).reshape(4, 36), VIDEO),
        (lambda x: x.view(6, 24).view(36, 4), VIDEO),
    ),
    "sdpa-scale": (
        (lambda q, k, v: sdpa(q, k, v, scale=0.1), QKV),
        (lambda q, k, v: sdpa(q, k, v), QKV),
    ),
    "sdpa-groups": (
        (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), GROUPS),
        (lambda q, k, v: sdpa(q, k, v), QKV),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_rule_fires_and_keeps_the_values(name: str, captured: Any) -> None:
    body, inputs = EXAMPLES[name][0]
    function, weights = captured(body, inputs)
    fired = rewrite(function.copy(), DEFAULT_RULES, "test")
    assert fired[name] > 0
    legal, legal_weights = legalize(function, weights)
    expected = evaluate(function, weights, inputs)["out"]
    got = evaluate(legal, legal_weights, inputs)["out"]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_rule_does_not_fire(name: str, captured: Any) -> None:
    body, inputs = EXAMPLES[name][1]
    function, _ = captured(body, inputs)
    assert rewrite(function, DEFAULT_RULES, "test")[name] == 0


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in DEFAULT_RULES} == {*EXAMPLES, "positional"}
    assert all(rule.why for rule in (*DEFAULT_RULES, *HALF_RULES))


def test_keywords_of_positional_arguments_become_positional(captured: Any) -> None:
    function, weights = captured(lambda x: x.relu(), X)
    editor = Editor(function, "test")
    relu = function.results["out"]
    clamp = editor.before(relu).call(aten.clamp.default, relu.args[0], max=0.5)
    editor.replace(relu, clamp)
    legal, _ = legalize(function, weights)
    (node,) = legal.operators()
    assert node.args[1:] == (None, 0.5) and not node.kwargs
    again = rewrite(legal, DEFAULT_RULES, "test")
    assert again["positional"] == 0
    assert torch.equal(evaluate(legal, weights, X)["out"], X["x"].clamp(max=0.5))


@pytest.mark.parametrize(
    "body",
    [
        lambda x, y: x.masked_fill(y > 1, float("-inf")),
        lambda x, y: torch.where(y > 1, x, torch.finfo(torch.float32).min),
        lambda x, y: x + (y > 1).float() * -1e9,
    ],
)
def test_mask_values_fit_half_precision(body: Callable[..., Tensor], captured: Any) -> None:
    function, weights = captured(body, XY)
    legal, legal_weights = legalize(function, weights, (*DEFAULT_RULES, *HALF_RULES))
    got = evaluate(legal, legal_weights, XY)["out"]
    assert got.abs().max() < 65504
    full = evaluate(*legalize(function, weights), XY)["out"]
    assert torch.equal(got.softmax(-1) > 1e-6, full.softmax(-1) > 1e-6)


def test_ordinary_numbers_are_no_mask(captured: Any) -> None:
    function, _ = captured(lambda x, y: (x * -3.0).masked_fill(y > 0, -1000.0) + y * 1e6, XY)
    assert not rewrite(function, HALF_RULES, "test")


def test_a_rule_can_be_left_out(captured: Any) -> None:
    function, weights = captured(lambda x: F.gelu(x, approximate="tanh"), X)
    rules = [rule for rule in DEFAULT_RULES if rule.name != "tanh-gelu"]
    legal, _ = legalize(function, weights, rules)
    assert [node.target for node in legal.operators()] == [aten.gelu.default]


def test_ignored_argument_is_refused(captured: Any) -> None:
    function, weights = captured(
        lambda x: torch.searchsorted(torch.arange(4.0), x, out_int32=True), {"x": numbers(4)}
    )
    with pytest.raises(LoweringError, match=r"out_int32=True of 'searchsorted'.*ignored"):
        legalize(function, weights)


def test_rank_above_five_is_refused(captured: Any) -> None:
    function, weights = captured(lambda x: x.view(2, 3, 2, 2, 3, 2).relu(), VIDEO)
    with pytest.raises(LoweringError, match=r"'view'.*rank 6.*limit is 5"):
        legalize(function, weights)


# ------------------------------------------------------------------ constant folding


def test_what_no_input_reaches_becomes_a_weight(captured: Any) -> None:
    def body(x: Tensor, freqs: Tensor) -> Tensor:
        angle = torch.arange(3)[:, None] * freqs
        return x * angle.cos() + torch.arange(4)

    function, weights = captured(body, X, freqs=numbers(4))
    legal, legal_weights = legalize(function, weights)
    assert [node.target for node in legal.operators()] == [aten.mul.Tensor, aten.add.Tensor]
    assert legal.weight_names() == ["folded/cos", "folded/arange_1"]
    assert [legal_weights.is_literal(name) for name in legal.weight_names()] == [False, True]
    torch.testing.assert_close(
        evaluate(legal, legal_weights, X)["out"], evaluate(function, weights, X)["out"]
    )
    assert "freqs" in function.weight_names()


def test_parameters_used_directly_and_broadcasts_are_not_folded(captured: Any) -> None:
    function, weights = captured(lambda x, w: x * w.expand(2, 3, 4), X, w=numbers(4))
    legal, _ = legalize(function, weights)
    assert legal.weight_names() == ["w"]


def test_random_numbers_are_not_folded(captured: Any) -> None:
    function, weights = captured(lambda x: x + torch.ones(4), X)
    (ones,) = [node for node in function.operators() if node.target is aten.ones.default]
    editor = Editor(function, "test")
    editor.replace(ones, editor.before(ones).call(aten.rand.default, [4]))
    legal, _ = legalize(function, weights)
    assert legal.weight_names() == []
