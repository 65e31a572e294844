"""Tracing a module with torch.export into a function of this project's representation.

Operators stay as large as Core ML has them (attention, linear, layer norm, group norm, GELU, SiLU
stay whole). What is dropped on the way: copies and aliases that mean nothing in a functional graph,
checks of metadata, device arguments.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import operator
import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
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
from odsora_compiler.frontend.decompose import can_take_apart, is_composite_view, recipe
from odsora_compiler.frontend.operators import (
    CASTS,
    draws,
    drop_dead,
    plain_form,
    refuse_foreign,
)
from odsora_compiler.frontend.source import failing_line, is_torch, line_name
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.inference import canonical, infer

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
    # Cloned, because tracing takes one tensor given under two names for one input.
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), dict(inputs))
    if mode is not None:
        arguments = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    # `module.forward` may return dataclasses, which tracing knows only when they are registered.
    hook = module.register_forward_hook(lambda module, args, result: _dataclasses_to_dicts(result))
    try:
        with torch.no_grad(), _quiet_tracing():
            exported = torch.export.export(module, (), arguments, strict=False)
            if not can_take_apart(exported.graph):
                exported = exported.run_decompositions({})
    except Exception as error:
        raise _tracing_error(error) from error
    finally:
        hook.remove()
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


def refuse_repeated(names: Iterable[str], what: str) -> None:
    """Raise `CaptureError` when two inputs or outputs have one name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise CaptureError(
            f"two {what}s of the model are both called '{repeated[0]}'",
            "Names of nested tensors are their keys joined by '_'; rename a key.",
        )


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Within it, PyTorch logs nothing, such as the tracebacks of errors that it also raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def named_tensors(returned: Any, taken: Container[str]) -> dict[str, torch.Tensor]:
    """The tensors in what a function returned, by the names of outputs.

    A key, attribute or `key_path` inside trees; `output` for a tensor alone. `taken`: names of
    inputs, which no output may have. Raises `CaptureError` when two have one name.
    """
    named = [
        (_output_name(name, taken), leaf)
        for name, leaf in named_leaves(returned)
        if isinstance(leaf, torch.Tensor)
    ]
    refuse_repeated((name for name, _ in named), "output")
    return dict(named)


def named_leaves(returned: Any) -> list[tuple[str, Any]]:
    """What a function returned, tensors and others, each by its key, attribute or `key_path`.

    The name is `""` where that is one thing alone.
    """
    leaves, _ = pytree.tree_flatten_with_path(_dataclasses_to_dicts(returned))
    return [(_path_name(path), leaf) for path, leaf in leaves]


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
    mapping: dict[fx.Node, Any] = {}
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
        elif node.op == "call_function" and node.target not in _CHECKS:
            mapping[node] = _convert(node, mapping, graph)
    output_names, results = _outputs(exported, mapping)
    graph.output(tuple(results)).meta["names"] = tuple(output_names)
    drop_dead(graph)
    return Function("base", graph)


def _output_name(path: str, taken: Container[str]) -> str:
    name = path or "output"
    # A package has one name space for what goes in and what comes out.
    return f"output_{name}" if name[0].isdigit() or name in taken else name


def _leaf_names(inputs: Mapping[str, Any]) -> list[str]:
    leaves, _ = pytree.tree_flatten_with_path(dict(inputs))
    return [_path_name(path) for path, _ in leaves]


def _path_name(path: tuple[Any, ...]) -> str:
    parts = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return re.sub(r"\W", "_", "_".join(parts))


def _dataclasses_to_dicts(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and type(value) not in pytree.SUPPORTED_NODES:
        return {
            item.name: _dataclasses_to_dicts(getattr(value, item.name))
            for item in dataclasses.fields(value)
        }
    if type(value) in (tuple, list):
        return type(value)(_dataclasses_to_dicts(item) for item in value)
    if type(value) is dict:
        return {key: _dataclasses_to_dicts(item) for key, item in value.items()}
    return value


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Keep what PyTorch prints while tracing off stderr; our errors say what matters of it."""
    with quiet_torch(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _convert(node: fx.Node, mapping: dict[fx.Node, Any], graph: fx.Graph) -> Any:
    """The operator in the new graph: a node, or a list of them where the parts were taken out."""
    target: Any = node.target
    value: Any = node.meta.get("val")
    if not all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
        raise CaptureError(
            f"{_source(node) or node.name}: a Python number is read out of a tensor ({target})",
            "Compute with the tensor instead of .item(), int() or float(), or pass the number as "
            "an option of build().",
        )
    if any(not isinstance(size, int) for size in _sizes(value)):
        raise CaptureError(
            f"{_source(node) or node.name}: the shape of a value depends on a tensor's values "
            f"({target})",
            "Keep the shape and select with torch.where or a product with the mask, instead of "
            "indexing by a mask or nonzero().",
        )
    args: Any = fx.node.map_arg(node.args, mapping.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, mapping.__getitem__)
    if target is operator.getitem and isinstance(args[0], list):
        return args[0][args[1]]
    if target in CASTS or not is_composite_view(target):
        return _add(graph, node, target, args, kwargs)

    def call(part: Any, args: Any, kwargs: Any) -> fx.Node:
        return _add(graph, node, part, args, kwargs)

    def item(whole: fx.Node, index: int) -> fx.Node:
        return _add(graph, node, operator.getitem, (whole, index), {})

    fakes = fx.node.map_arg((args, kwargs), lambda used: used.meta["val"])
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Node)]
    return recipe(target, *fakes).replay(tensors, call, item)


def _add(graph: fx.Graph, origin: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
    """Add one operator call, or return its argument where the operator changes nothing."""
    form = plain_form(target, args, kwargs)
    if isinstance(form, fx.Node):
        return form
    target, args, kwargs = form
    _refuse_unfit(origin, target, args, kwargs)
    made = graph.create_node("call_function", target, args, kwargs, name=origin.name)
    made.meta["val"] = infer(target, args, kwargs)
    made.meta["provenance"] = _provenance(origin)
    return made


def _refuse_unfit(node: fx.Node, target: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    place = _source(node) or node.name
    refuse_foreign(target, place)
    if draws(target, args, kwargs):
        raise CaptureError(
            f"{place}: {target} draws random numbers",
            "Draw them outside and give them to the model as an input.",
        )


def _sizes(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        yield from leaf.shape


_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
}


def _outputs(
    exported: torch.export.ExportedProgram, mapping: dict[fx.Node, Any]
) -> tuple[list[str], list[fx.Node]]:
    specs = exported.graph_signature.output_specs
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    slots = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    paths = {leaf: _path_name(path) for path, leaf in pytree.tree_flatten_with_path(slots)[0]}
    by_name = {node.name: node for node in exported.graph.nodes}
    taken = {
        str(node.target)
        for node in mapping.values()
        if isinstance(node, fx.Node) and node.op == "placeholder"
    }
    names: list[str] = []
    results = []
    user_outputs = [spec for spec in specs if spec.kind is OutputKind.USER_OUTPUT]
    for index, spec in enumerate(user_outputs):
        if isinstance(spec.arg, TensorArgument):
            names.append(_output_name(paths[index], taken))
            results.append(mapping[by_name[spec.arg.name]])
    if not results:
        raise CaptureError("the model returns no tensor", "Return tensors, or a tree of them.")
    refuse_repeated(names, "output")
    return names, results


def _provenance(node: fx.Node) -> Provenance:
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    return Provenance(module.removeprefix("L['self']."), _source(node))


def _source(node: fx.Node) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    # The innermost line outside PyTorch: for a layer, the line that calls it.
    written = [item for item in lines if not is_torch(item[0])]
    return line_name(*written[-1]) if written else ""


def _tracing_error(error: Exception) -> CaptureError:
    place = failing_line(error)
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
    if ".numpy() is not supported" in first:
        return CaptureError(
            f"{place or 'the model'}: a tensor is turned into a numpy array, which has no graph",
            "Compute with tensor operators instead, or pass the numbers as an option of build().",
        )
    return CaptureError(
        f"{place or 'the model'}: tracing stops here: {type(error).__name__}: {first}",
        "The model's forward() is called with ModelSpec.inputs as keyword arguments; it must run "
        "on them by itself.",
    )
