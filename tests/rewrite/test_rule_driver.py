"""The rule driver: order, new nodes, names, provenance, and rules that never end."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from odsora_compiler.errors import PassError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.weights import TensorWeights
from odsora_compiler.rewrite.rules import Rule, rewrite

aten = torch.ops.aten


@pytest.fixture
def function() -> Function:
    """out = neg(neg(x)) + x"""
    made = Function("base")
    x = made.graph.placeholder("x")
    x.meta["val"] = fake_tensor((3,), torch.float32)
    made.graph.output(()).meta["names"] = ()
    editor = Editor(made, "")
    twice = editor.call(aten.neg.default, editor.call(aten.neg.default, x))
    out = editor.call(aten.add.Tensor, twice, x)
    out.meta["provenance"] = Provenance("block.0", "model.py:7 in forward")
    made.output_node.args = ((out,),)
    made.output_node.meta["names"] = ("out",)
    return made


def value(function: Function) -> torch.Tensor:
    x = {"x": torch.tensor([1.0, -2.0, 3.0])}
    return evaluate(function, TensorWeights({}), x)["out"]


def is_double_negation(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and source.target is aten.neg.default


def inner(editor: Editor, node: fx.Node) -> fx.Node:
    return node.args[0].args[0]  # type: ignore[union-attr,return-value]


def multiply(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(aten.mul.Tensor, node.args[0], -1)


def subtract(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(aten.sub.Tensor, *node.args)


NEG = frozenset({aten.neg.default})
UNDO = Rule("undo", "two negations are none", NEG, is_double_negation, inner)
MULTIPLY = Rule("multiply", "", NEG, lambda node: True, multiply)


def test_rewrites_and_removes_what_nothing_uses(function: Function) -> None:
    before = value(function)
    fired = rewrite(function, [UNDO], "test")
    assert fired == {"undo": 1}
    assert [node.target for node in function.operators()] == [aten.add.Tensor]
    assert torch.equal(value(function), before)


def test_the_first_rule_that_accepts_wins(function: Function) -> None:
    named = [
        Rule(name, "", frozenset({aten.add.Tensor}), lambda node: True, subtract)
        for name in ("first", "second")
    ]
    assert rewrite(function.copy(), named, "test") == {"first": 1}
    assert rewrite(function, named[::-1], "test") == {"second": 1}


def test_new_nodes_are_looked_at_again(function: Function) -> None:
    again = Rule(
        "halve",
        "",
        frozenset({aten.mul.Tensor}),
        lambda node: node.args[1] == -1,
        lambda editor, node: editor.call(aten.neg.default, node.args[0]),
    )
    with pytest.raises(PassError, match=r"do not come to an end.*'(halve|multiply)'"):
        rewrite(function, [MULTIPLY, again], "test")


def test_replacement_keeps_name_and_place(function: Function) -> None:
    add = Rule("subtract", "", frozenset({aten.add.Tensor}), lambda node: True, subtract)
    name = function.results["out"].name
    rewrite(function, [add], "test")
    node = function.results["out"]
    assert node.name == name
    assert node.meta["provenance"] == Provenance("block.0", "model.py:7 in forward", ("test",))


def test_replacement_of_another_shape_is_refused(function: Function) -> None:
    wrong = Rule(
        "wrong",
        "",
        NEG,
        lambda node: True,
        lambda editor, node: editor.call(aten.unsqueeze.default, node.args[0], 0),
    )
    with pytest.raises(PassError, match="cannot replace"):
        rewrite(function, [wrong], "test")
