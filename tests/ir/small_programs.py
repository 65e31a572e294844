"""A small program with everything in it, built by hand so that a test can break any part."""

from __future__ import annotations

import operator

import torch
from torch import fx

from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.host import single_call_host
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.program import Chunk, Component, Plan, Program
from odsora_compiler.ir.weights import TensorWeights, WeightSpec

aten = torch.ops.aten


def new_function(**inputs: tuple[int, ...]) -> Function:
    """A function `base` with float32 inputs of these shapes and no outputs yet."""
    graph = fx.Graph()
    for name, shape in inputs.items():
        graph.placeholder(name).meta["val"] = fake_tensor(shape, torch.float32)
    graph.output(()).meta["names"] = ()
    return Function("base", graph)


def returns(function: Function, **results: fx.Node) -> Function:
    """Set the outputs."""
    function.output_node.args = (tuple(results.values()),)
    function.output_node.meta["names"] = tuple(results)
    return function


def small_program() -> Program:
    """x [2, 4] → split(linear(x)) → halves `a` and, after a tanh, `b`; weights `w` and `bias`."""
    tensors = {"w": torch.arange(32.0).view(8, 4) / 32, "bias": torch.arange(8.0)}
    function = new_function(x=(2, 4))
    function.placeholders[0].meta["axes"] = "b c"
    editor = Editor(function, "")
    w, bias = (editor.weight(name, WeightSpec.of(tensor)) for name, tensor in tensors.items())
    linear = editor.call(aten.linear.default, function.placeholders[0], w, bias)
    halves = editor.call(aten.split.Tensor, linear, 4, 1)
    a = editor.call(operator.getitem, halves, 0)
    b = editor.call(aten.tanh.default, editor.call(operator.getitem, halves, 1))
    names = iter(("linear", "split", "getitem", "getitem_1", "tanh"))
    for node in function.operators():
        node._rename(next(names))
        node.meta["provenance"] = Provenance("net.proj", "net.py:3 in forward")
    returns(function, a=a, b=b)
    examples = {"x": torch.linspace(-1, 1, 8).view(2, 4)}
    component = Component("net", {"base": function}, TensorWeights(tensors), examples=examples)
    return Program("net", {"net": component}, single_call_host("net", function), dict(examples))


def planned_program() -> Program:
    """`small_program` cut in two: the linear, then the rest."""
    program = small_program()
    component = program.component("net")
    component.plan = Plan(
        1 << 20, "fp16", "bytes", (Chunk(160, {"base": 64}, "here"), Chunk(0, {}, "end"))
    )
    for node in component.function("base").operators():
        node.meta["chunk"] = 0 if node.target is aten.linear.default else 1
    return program
