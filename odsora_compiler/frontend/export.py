"""Tracing a module with torch.export into a function of this project's representation.

Operators stay as large as Core ML has them (attention, linear, layer norm, group norm, GELU, SiLU
stay whole). What is dropped on the way: copies and aliases that mean nothing in a functional graph,
checks of metadata, device arguments.
"""

from __future__ import annotations

import operator
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from odsora_compiler.errors import CaptureError
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.inference import canonical

aten = torch.ops.aten


def trace_module(
    module: nn.Module, inputs: Mapping[str, Any], mode: FakeTensorMode | None
) -> tuple[Function, dict[str, torch.Tensor]]:
    """Trace `module(**inputs)` in evaluation mode.

    `mode`: the fake mode that the module's parameters live in, or None when they hold data. Returns
    the function `base` and the constants it uses that the module's `state_dict` does not have.
    Raises `CaptureError` naming the model's source line where tracing fails.
    """
    module.eval()
    arguments = dict(inputs)
    if mode is not None:
        arguments = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, (), arguments, strict=False)
            exported = exported.run_decompositions({})
    except Exception as error:
        raise _tracing_error(error) from error
    function = _lift(exported, inputs)
    constants = {
        name: exported.constants[name]
        for name in function.weight_names()
        if name in exported.constants
    }
    return function, constants


def input_names(inputs: Mapping[str, Any]) -> list[str]:
    """Names of the tensors in `inputs`, in tracing order: the key, or `key_path` inside trees."""
    leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
    return [_path_name(path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------ from ExportedProgram


def _lift(exported: torch.export.ExportedProgram, inputs: Mapping[str, Any]) -> Function:
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        mutated = ", ".join(sorted(set(signature.buffers_to_mutate.values())))
        raise CaptureError(
            f"the model changes its buffer {mutated} in forward()",
            "Compute the value from the inputs each time, or once in the constructor.",
        )
    if signature.user_inputs_to_mutate:
        mutated = ", ".join(sorted(set(signature.user_inputs_to_mutate.values())))
        raise CaptureError(
            f"the model changes its input {mutated} in place", "Use the out-of-place operator."
        )
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    leaf_names = iter(_leaf_names(inputs))
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind is not InputKind.USER_INPUT:
            continue
        input_name = next(leaf_names)
        if isinstance(spec.arg, ConstantArgument):
            continue
        mapping[node] = graph.create_node("placeholder", input_name, name=input_name)
        mapping[node].meta["val"] = canonical(node.meta["val"])
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node not in mapping:
            spec = specs[node.name]
            if spec.target is not None and node.users:
                made = graph.create_node("get_attr", spec.target)
                made.meta["val"] = canonical(node.meta["val"])
                made.meta["provenance"] = Provenance(spec.target.rpartition(".")[0])
                mapping[node] = made
        elif node.op == "call_function":
            converted = _convert(node, mapping, graph)
            if converted is not None:
                mapping[node] = converted
    output_names, results = _outputs(exported, mapping)
    graph.output(tuple(results)).meta["names"] = tuple(output_names)
    function = Function("base", graph)
    _drop_dead(function)
    return function


def _leaf_names(inputs: Mapping[str, Any]) -> list[str]:
    leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
    return [_path_name(path) for path, _ in leaves]


def _path_name(path: tuple[Any, ...]) -> str:
    parts = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return re.sub(r"\W", "_", "_".join(parts)) or "output"


def _convert(node: fx.Node, mapping: dict[fx.Node, fx.Node], graph: fx.Graph) -> fx.Node | None:
    """The node in the new graph, or None for one that only checks something."""
    target: Any = node.target
    if target in _CHECKS:
        return None
    value: Any = node.meta.get("val")
    if not all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
        raise CaptureError(
            f"{_source(node) or node.name}: a Python number is read out of a tensor ({target})",
            "Compute with the tensor instead of .item(), int() or float(), or pass the number as "
            "an option of build().",
        )
    args: Any = fx.node.map_arg(node.args, mapping.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, mapping.__getitem__)
    kwargs = {key: arg for key, arg in kwargs.items() if key not in _PLACEMENT}
    if target in _IDENTITIES or (target in _CASTS and args[0].meta["val"].dtype == value.dtype):
        return args[0]
    if target in _CASTS:
        target, args, kwargs = aten._to_copy.default, args[:1], {"dtype": value.dtype}
    target = _SAME.get(target, target)
    if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
        raise CaptureError(
            f"{_source(node) or node.name}: {target} is not an operator of PyTorch's ATen set",
            "Write this part of the model with tensor operators only.",
        )
    made = graph.create_node("call_function", target, args, kwargs, name=node.name)
    made.meta["val"] = canonical(value)
    made.meta["provenance"] = _provenance(node)
    return made


_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
}
_IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}
_CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device}
_SAME = {aten._unsafe_view.default: aten.view.default, aten.reshape.default: aten.view.default}
_PLACEMENT = {"device", "pin_memory", "layout", "memory_format", "non_blocking"}


def _outputs(
    exported: torch.export.ExportedProgram, mapping: dict[fx.Node, fx.Node]
) -> tuple[list[str], list[fx.Node]]:
    specs = exported.graph_signature.output_specs
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    slots = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    paths = {leaf: _path_name(path) for path, leaf in pytree.tree_flatten_with_path(slots)[0]}
    by_name = {node.name: node for node in exported.graph.nodes}
    names, results = [], []
    user_outputs = [spec for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    for index, spec in enumerate(user_outputs):
        if isinstance(spec.arg, TensorArgument):
            name = paths[index]
            names.append(f"output_{name}" if name.isdigit() else name)
            results.append(mapping[by_name[spec.arg.name]])
    if not results:
        raise CaptureError("the model returns no tensor")
    return names, results


def _drop_dead(function: Function) -> None:
    for node in reversed(list(function.graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            function.graph.erase_node(node)


def _provenance(node: fx.Node) -> Provenance:
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    return Provenance(module.removeprefix("L['self']."), _source(node))


def _source(node: fx.Node) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', node.meta.get("stack_trace") or "")
    if not lines:
        return ""
    file, line, where = lines[-1]
    return f"{Path(file).name}:{line} in {where}"


def _tracing_error(error: Exception) -> CaptureError:
    torch_folder = str(Path(torch.__file__).parent)
    here = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_folder, here, "<"))
    ]
    place = ""
    if frames:
        frame = frames[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    data_dependent = any(
        word in f"{type(error).__name__} {error}"
        for word in ("data-dependent", "DataDependent", "_local_scalar_dense", "unbacked")
    )
    if data_dependent:
        return CaptureError(
            f"{place or 'the model'}: the model's path depends on a tensor's value",
            "Compute with the tensor (torch.where) instead of .item(), bool() or int(), or pass "
            "the value as an option of build().",
        )
    return CaptureError(f"the model cannot be traced: {place}\n  {type(error).__name__}: {first}")
