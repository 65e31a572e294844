"""Structural verification: a sound program passes, and every way to break one is found."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from small_programs import planned_program, small_program
from torch import fx

from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import TensorWeights

aten = torch.ops.aten


def test_sound_programs_pass() -> None:
    verify_program(small_program())
    verify_program(planned_program())
    derived = small_program()
    derived.component("net").derive("variant")
    derived.redirect("net", "base", "variant")
    verify_program(derived)


def base(program: Program) -> Function:
    return program.component("net").function("base")


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in base(program).graph.nodes if item.name == name)


def call(program: Program) -> fx.Node:
    return program.calls()[0]


WAYS: dict[str, tuple[Callable[[Program], object], str]] = {}


def way(message: str) -> Callable[[Callable[[Program], object]], Callable[[Program], object]]:
    def register(function: Callable[[Program], object]) -> Callable[[Program], object]:
        WAYS[function.__name__] = (function, message)
        return function

    return register


@way("net.base: node 'linear' has no meta\\['val'\\]")
def no_value(program: Program) -> None:
    del node(program, "linear").meta["val"]


@way("node 'linear' claims float32\\[2, 9\\], aten.linear.default gives float32\\[2, 8\\]")
def wrong_shape(program: Program) -> None:
    node(program, "linear").meta["val"] = fake_tensor((2, 9), torch.float32)


@way("node 'tanh' claims float16")
def wrong_dtype(program: Program) -> None:
    node(program, "tanh").meta["val"] = fake_tensor((2, 4), torch.float16)


@way("node 'split' claims float32\\[2, 8\\]")
def tensor_for_many(program: Program) -> None:
    node(program, "split").meta["val"] = fake_tensor((2, 8), torch.float32)


@way("node 'tanh' has no provenance")
def no_provenance(program: Program) -> None:
    del node(program, "tanh").meta["provenance"]


@way("node 'w' has no provenance")
def wrong_provenance(program: Program) -> None:
    node(program, "w").meta["provenance"] = "net.py:3"


@way("node 'tanh' carries unknown meta \\['note'\\], which saving would lose")
def unknown_meta(program: Program) -> None:
    node(program, "tanh").meta["note"] = 1


@way("node 'linear': aten.linear.default refuses its arguments")
def refused_arguments(program: Program) -> None:
    linear = node(program, "linear")
    linear.args = (linear.args[0], linear.args[2], linear.args[1])


@way("node 'tanh': aten.relu_.default writes to its arguments")
def in_place_operator(program: Program) -> None:
    node(program, "tanh").target = aten.relu_.default


@way("operator <built-in method relu .*> cannot be saved")
def python_function(program: Program) -> None:
    node(program, "tanh").target = torch.relu


@way("cannot be saved: tensor")
def tensor_argument(program: Program) -> None:
    linear = node(program, "linear")
    linear.args = (*linear.args[:2], torch.ones(8))


@way("is a call_method; only operators are allowed")
def method_call(program: Program) -> None:
    tanh = node(program, "tanh")
    tanh.op, tanh.target = "call_method", "tanh"


@way("there is no weight 'v'")
def unknown_weight(program: Program) -> None:
    node(program, "w").target = "v"


@way("weight 'w' is .*, the graph sees float32\\[8, 4\\]")
def other_weight(program: Program) -> None:
    tensors = {"w": torch.zeros(8, 5), "bias": torch.zeros(8)}
    program.component("net").weights = TensorWeights(tensors)


@way("weight 'w' is .*float16")
def weight_of_another_type(program: Program) -> None:
    tensors = {"w": torch.zeros(8, 4).half(), "bias": torch.zeros(8)}
    program.component("net").weights = TensorWeights(tensors)


@way("was used before it has been defined")
def used_before_made(program: Program) -> None:
    node(program, "split").append(node(program, "linear"))


@way("belong to this Graph")
def node_of_another_graph(program: Program) -> None:
    other = small_program()
    node(program, "tanh").args = (node(other, "getitem_1"),)


@way("exactly one output node")
def no_output(program: Program) -> None:
    base(program).graph.erase_node(base(program).output_node)


@way("exactly one output node")
def output_in_the_middle(program: Program) -> None:
    made = base(program).graph.create_node("get_attr", "w")
    made.meta.update(node(program, "w").meta)
    base(program).output_node.append(made)


@way("argument is not a tuple")
def bare_output(program: Program) -> None:
    base(program).output_node.args = (node(program, "tanh"),)


@way("which is no node")
def number_as_output(program: Program) -> None:
    base(program).output_node.args = ((node(program, "tanh"), 3),)


@way("returns 'split', which is no tensor")
def many_as_one_output(program: Program) -> None:
    base(program).output_node.args = ((node(program, "tanh"), node(program, "split")),)


@way("meta\\['names'\\] does not match")
def too_few_names(program: Program) -> None:
    base(program).output_node.meta["names"] = ("a",)


@way("output names repeat: \\['a', 'a'\\]")
def repeated_output_name(program: Program) -> None:
    base(program).output_node.meta["names"] = ("a", "a")


@way("input names repeat: \\['x', 'x'\\]")
def repeated_input_name(program: Program) -> None:
    graph = base(program).graph
    with graph.inserting_before(node(program, "w")):
        graph.create_node("placeholder", "x").meta["val"] = fake_tensor((1,), torch.float32)


@way("node 'x' has no meta")
def input_without_value(program: Program) -> None:
    del node(program, "x").meta["val"]


@way("node 'x' is no tensor")
def input_that_is_no_tensor(program: Program) -> None:
    node(program, "x").meta["val"] = (fake_tensor((2, 4), torch.float32),)


@way("axes of 'x': 'b c d' names 3 dimensions")
def wrong_axes(program: Program) -> None:
    node(program, "x").meta["axes"] = "b c d"


@way("component 'net' has no function 'bas'")
def call_of_an_unknown_function(program: Program) -> None:
    call(program).args = ("net", "bas")


@way("the program has no component 'nett'")
def call_of_an_unknown_component(program: Program) -> None:
    call(program).args = ("nett", "base")


@way("needs a component, a function")
def call_without_a_function(program: Program) -> None:
    call(program).args = ("net",)


@way("gives \\['y'\\], needs \\['x'\\]")
def call_with_another_input(program: Program) -> None:
    call(program).kwargs = {"y": call(program).kwargs["x"]}


@way("input 'x' is not a tensor")
def call_with_a_number(program: Program) -> None:
    call(program).kwargs = {"x": 3}


@way("input 'x' is float32\\[2, 5\\], expected x: float32\\[2, 4\\]")
def call_with_another_shape(program: Program) -> None:
    program.host.placeholders[0].meta["val"] = fake_tensor((2, 5), torch.float32)
    program.host.placeholders[0].meta["axes"] = None
    program.examples["x"] = torch.ones(2, 5)


@way("claims outputs")
def call_with_other_outputs(program: Program) -> None:
    values = call(program).meta["val"]
    call(program).meta["val"] = {**values, "b": fake_tensor((2, 5), torch.float32)}
    for item in program.host.operators():
        if item.target is operator.getitem and item.args[1] == "b":
            item.meta["val"] = fake_tensor((2, 5), torch.float32)


@way("host: node 'w': there is no weight 'w'")
def weight_in_the_host(program: Program) -> None:
    made = program.host.graph.create_node("get_attr", "w")
    made.meta.update(node(program, "w").meta)
    program.host.output_node.prepend(made)


@way("the function registered so is named 'other'")
def function_under_another_name(program: Program) -> None:
    base(program).name = "other"


@way("component 'other' is registered as 'net'")
def component_under_another_name(program: Program) -> None:
    program.component("net").name = "other"


@way("input 'x' of the program has no example")
def no_example(program: Program) -> None:
    program.examples.clear()


@way("example 'y' is no input")
def example_too_many(program: Program) -> None:
    program.examples["y"] = torch.ones(1)


@way("example 'x' is float64\\[2, 4\\], expected x: float32\\[2, 4\\]")
def example_of_another_type(program: Program) -> None:
    program.examples["x"] = program.examples["x"].double()


@pytest.mark.parametrize("name", WAYS)
def test_a_broken_program_is_found(name: str) -> None:
    break_it, message = WAYS[name]
    program = small_program()
    break_it(program)
    with pytest.raises(VerificationError, match=message):
        verify_program(program)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"linear": 1, "split": 0}, "'split' of chunk 0 needs 'linear' of chunk 1"),
        ({"tanh": 2}, "'tanh' is in chunk 2 of 2"),
        ({"tanh": "1"}, "'tanh' is in chunk 1 of 2"),
        ({"split": None}, "'split' is in no chunk, but needs 'linear' of chunk 0: cut functions"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_found(chunks: dict[str, object], message: str) -> None:
    program = planned_program()
    for name, chunk in chunks.items():
        node(program, name).meta["chunk"] = chunk
        if chunk is None:
            del node(program, name).meta["chunk"]
    with pytest.raises(VerificationError, match=message):
        verify_program(program)


def test_values_without_a_chunk_are_computed_where_they_are_needed() -> None:
    program = planned_program()
    del node(program, "linear").meta["chunk"]
    verify_program(program)


def test_in_one_chunk_nodes_need_no_mark() -> None:
    program = planned_program()
    component = program.component("net")
    assert component.plan is not None
    component.plan = dataclasses.replace(component.plan, chunks=component.plan.chunks[:1])
    for item in base(program).operators():
        item.meta["chunk"] = 0
    del node(program, "split").meta["chunk"]
    verify_program(program)


def test_many_problems_are_counted() -> None:
    program = small_program()
    for item in base(program).operators():
        del item.meta["provenance"]
    node(program, "x").meta["axes"] = "b"
    program.component("net").name = "other"
    with pytest.raises(VerificationError, match="… and 2 more"):
        verify_program(program)


def test_plans_are_compared_by_value() -> None:
    plan = planned_program().component("net").plan
    assert plan is not None
    assert plan == dataclasses.replace(plan)
