"""A function as the `ExportedProgram` that coremltools reads; nothing is traced again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.weights import WeightStore
from odsora_compiler.lowering.interface import Names, operator_name

aten = torch.ops.aten

# Types of Core ML's arithmetic; the last MIL pass brings float32 to float16.
_COMPUTED_AS = {
    torch.float64: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def exported_program(function: Function, weights: WeightStore) -> ExportedProgram:
    """`function` as torch.export would hold it, with made-up names and its weights as buffers.

    Types that Core ML does not compute with become the nearest that it does; booleans that leave
    the function become integers.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs, state = [], {}
    for index, name in enumerate(function.weight_names()):
        tensor = weights.load(name)
        tensor = tensor.to(_STORED_AS.get(tensor.dtype, tensor.dtype))
        node = _placeholder(graph, Names.made_up("w", index), tensor.shape, tensor.dtype)
        for user in function.graph.find_nodes(op="get_attr", target=name):
            made[user] = node
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True))
        state[name] = tensor
    for index, node in enumerate(function.placeholders):
        value = node.meta["val"]
        dtype = _COMPUTED_AS.get(value.dtype, value.dtype)
        made[node] = _placeholder(graph, Names.made_up("in", index), value.shape, dtype)
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(made[node].name), None))
    for index, node in enumerate(function.operators()):
        made[node] = _operator(graph, index, node, made)
    outputs: list[fx.Node] = []
    for node in function.results.values():
        outputs.append(_output(graph, made[node], outputs))
    graph.output(tuple(outputs))
    signature = ExportGraphSignature(
        inputs,
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    names = {spec.name: 0 for spec in function.inputs}
    call = ModuleCallSignature(
        [],
        [],
        pytree.tree_structure(((), names)),
        pytree.tree_structure(tuple(0 for _ in outputs)),
    )
    return ExportedProgram(
        nn.Module(), graph, signature, state, {}, [ModuleCallEntry("", call)], constants={}
    )


_STORED_AS = {**_COMPUTED_AS, torch.int64: torch.int32}


def _placeholder(graph: fx.Graph, name: str, shape: Collection[int], dtype: torch.dtype) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = fake_tensor(tuple(shape), dtype)
    return node


def _operator(
    graph: fx.Graph, index: int, node: fx.Node, made: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    def argument(value: Any) -> Any:
        return _COMPUTED_AS.get(value, value) if isinstance(value, torch.dtype) else value

    args, kwargs = pytree.tree_map(argument, (node.args, dict(node.kwargs)))
    target: Any = node.target
    copy = graph.create_node(
        "call_function",
        target,
        fx.node.map_arg(args, made.__getitem__),
        fx.node.map_arg(kwargs, made.__getitem__),
        name=operator_name(index, node),
    )
    copy.meta["val"] = node.meta["val"]
    return copy


def _output(graph: fx.Graph, node: fx.Node, others: Collection[fx.Node]) -> fx.Node:
    """What leaves the function for `node`: booleans as integers, scalars as vectors of one."""
    shape, dtype = tuple(node.meta["val"].shape), node.meta["val"].dtype
    if dtype == torch.bool:
        node = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.int32})
        node.meta["val"] = fake_tensor(shape, torch.int32)
    if not shape:
        node = graph.call_function(aten.view.default, (node, [1]))
        node.meta["val"] = fake_tensor((1,), dtype)
    if node.op == "placeholder" or node in others:
        # An output is renamed, which no input and no other output may be. A product with one that
        # leaves the function is not optimised away.
        node = graph.call_function(aten.mul.Tensor, (node, 1))
        node.meta["val"] = fake_tensor(shape, dtype)
    return node
