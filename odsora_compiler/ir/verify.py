"""Structural verification: what must hold of every program between any two passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import OdsoraError, UsageError, VerificationError, WeightsError, nearest
from odsora_compiler.ir.axis_names import parse_axes
from odsora_compiler.ir.function import Function, Provenance, TensorSpec
from odsora_compiler.ir.host import call_component, early_exit, first_true
from odsora_compiler.ir.inference import infer
from odsora_compiler.ir.program import Plan, Program
from odsora_compiler.ir.serialize import function_to_data
from odsora_compiler.ir.weights import TensorWeights, WeightStore

_META_KEYS = {"val", "provenance", "axes", "chunk", "names"}


def verify_program(program: Program) -> None:
    """Raise `VerificationError` naming component, function and node of the first few violations.

    Checked: the graph is well formed and functional; names of inputs and outputs are distinct; axis
    names fit; every node has `meta['val']` equal to what its operator gives
    on its arguments, and a provenance; weights exist with the shape and dtype the graph sees; calls
    of the host fit the signature of the function they name; no chunk of a plan needs a value of a
    later one, and what belongs to no chunk needs none of any; an early exit skips no value that is
    used after it; the roles of text to video fit the host; everything can be saved.
    """
    problems: list[str] = []
    for name, component in program.components.items():
        if component.name != name:
            problems.append(f"component '{component.name}' is registered as '{name}'")
        for key, function in component.functions.items():
            place = f"{name}.{key}"
            if function.name != key:
                problems.append(f"{place}: the function registered so is named '{function.name}'")
            problems += [
                f"{place}: {text}"
                for text in _function_problems(function, component.weights, component.plan)
            ]
    constants = TensorWeights(program.constants)
    problems += [f"host: {text}" for text in _function_problems(program.host, constants)]
    if not problems:
        # These read signatures, which broken functions do not have.
        problems += [f"host: {text}" for text in _call_problems(program)]
        problems += [f"host: {text}" for text in _exit_problems(program.host)]
        problems += _example_problems("program", program.inputs, program.examples)
        for component in program.components.values():
            first = next(iter(component.functions.values()))
            place = f"component '{component.name}'"
            problems += _example_problems(place, first.inputs, component.examples)
        problems += _text_to_video_problems(program)
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise VerificationError(
            "the program is not well formed:\n  " + "\n  ".join(problems[:5]) + more
        )


def _function_problems(
    function: Function, weights: WeightStore, plan: Plan | None = None
) -> Iterator[str]:
    try:
        function.graph.lint()
    except Exception as error:
        yield str(error).partition("\n")[0]
        return
    outputs = list(function.graph.find_nodes(op="output"))
    if len(outputs) != 1 or outputs[0] is not list(function.graph.nodes)[-1]:
        yield "it needs exactly one output node, at the end"
        return
    names = [str(node.target) for node in function.placeholders]
    if len(set(names)) != len(names):
        yield f"input names repeat: {names}"
    broken = False
    for node in function.graph.nodes:
        for problem in _node_problems(node, weights):
            broken = True
            yield problem
    if not broken:
        try:
            function_to_data(function)
        except OdsoraError as error:
            yield str(error)
    if plan is not None:
        yield from _chunk_problems(function, len(plan.chunks))


def _node_problems(node: fx.Node, weights: WeightStore) -> Iterator[str]:
    unknown = node.meta.keys() - _META_KEYS
    if unknown:
        yield f"node '{node.name}' carries unknown meta {sorted(unknown)}, which saving would lose"
    if node.op == "output":
        yield from _output_problems(node)
        return
    if node.op not in ("placeholder", "get_attr", "call_function"):
        yield f"node '{node.name}' is a {node.op}; only operators are allowed"
        return
    if "val" not in node.meta:
        yield f"node '{node.name}' has no meta['val']"
        return
    if node.op != "call_function" and not isinstance(node.meta["val"], torch.Tensor):
        yield f"node '{node.name}' is no tensor but {_text(node.meta['val'])}"
        return
    if node.op == "placeholder" and node.meta.get("axes"):
        try:
            parse_axes(node.meta["axes"], tuple(node.meta["val"].shape), str(node.target))
        except UsageError as error:
            yield error.message
    if node.op in ("call_function", "get_attr") and not isinstance(
        node.meta.get("provenance"), Provenance
    ):
        yield f"node '{node.name}' has no provenance"
    if node.op == "get_attr":
        try:
            spec = weights.spec(str(node.target))
        except WeightsError as error:
            yield f"node '{node.name}': {error.message}"
            return
        value = node.meta["val"]
        if (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype):
            yield f"weight '{node.target}' is {spec}, the graph sees {_text(value)}"
    elif node.op == "call_function" and node.target is not call_component:
        if any("val" not in used.meta for used in node.all_input_nodes):
            return
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            yield f"node '{node.name}': {target} writes to its arguments; graphs are functional"
            return
        try:
            expected = infer(target, node.args, node.kwargs)
        except Exception as error:
            yield f"node '{node.name}': {target} refuses its arguments: {error}"
            return
        if _text(expected) != _text(node.meta["val"]):
            yield (
                f"node '{node.name}' claims {_text(node.meta['val'])}, "
                f"{target} gives {_text(expected)}"
            )


def _output_problems(node: fx.Node) -> Iterator[str]:
    results: Any = node.args[0] if node.args else None
    if not isinstance(results, (tuple, list)):
        yield "the output node's argument is not a tuple of nodes"
        return
    names = node.meta.get("names", ())
    if len(names) != len(results):
        yield "the output node's meta['names'] does not match its values"
    if len(set(names)) != len(names):
        yield f"output names repeat: {list(names)}"
    for result in results:
        if not isinstance(result, fx.Node):
            yield f"the function returns {result!r}, which is no node"
        elif "val" in result.meta and not isinstance(result.meta["val"], torch.Tensor):
            yield f"the function returns '{result.name}', which is no tensor"


def _chunk_problems(function: Function, count: int) -> Iterator[str]:
    # Values without a chunk are computed anew in every chunk that needs them, from what all have.
    homes: dict[fx.Node, int] = {}
    for node in function.operators():
        chunk = node.meta.get("chunk")
        needed = [used for used in node.all_input_nodes if used in homes]
        if chunk is None:
            if needed and count > 1:
                yield (
                    f"node '{node.name}' is in no chunk, but needs '{needed[0].name}' of chunk "
                    f"{homes[needed[0]]}: cut functions (cidl) after the passes that change them"
                )
            continue
        if not isinstance(chunk, int) or not 0 <= chunk < count:
            yield f"node '{node.name}' is in chunk {chunk} of {count}"
            return
        homes[node] = chunk
        for used in needed:
            if homes[used] > chunk:
                yield (
                    f"node '{node.name}' of chunk {chunk} needs '{used.name}' "
                    f"of chunk {homes[used]}"
                )


def _call_problems(program: Program) -> Iterator[str]:
    for node in program.calls():
        if len(node.args) != 2 or not isinstance(node.meta["val"], dict):
            yield f"call '{node.name}' needs a component, a function and a dict of outputs"
            continue
        name, function_name = str(node.args[0]), str(node.args[1])
        try:
            function = program.component(name).function(function_name)
        except VerificationError as error:
            yield str(error)
            continue
        specs = {spec.name: spec for spec in function.inputs}
        if specs.keys() != node.kwargs.keys():
            yield f"call '{node.name}' gives {sorted(node.kwargs)}, needs {sorted(specs)}"
            continue
        for key, value in node.kwargs.items():
            if not isinstance(value, fx.Node):
                yield f"call '{node.name}': input '{key}' is not a tensor"
            elif _text(value.meta.get("val")) != _text_of(specs[key].shape, specs[key].dtype):
                yield (
                    f"call '{node.name}': input '{key}' is {_text(value.meta.get('val'))}, "
                    f"expected {specs[key]}"
                )
        outputs = {spec.name: _text_of(spec.shape, spec.dtype) for spec in function.outputs}
        claimed = {key: _text(value) for key, value in node.meta["val"].items()}
        if outputs != claimed:
            yield f"call '{node.name}' claims outputs {claimed}, the function has {outputs}"


def _exit_problems(host: Function) -> Iterator[str]:
    """What is wrong with early exits: conditions, and values that an exit would leave unmade."""
    order = {node: index for index, node in enumerate(host.graph.nodes)}
    for node in host.graph.find_nodes(op="call_function", target=early_exit):
        condition = node.args[0].meta["val"]
        if condition.dtype != torch.bool or condition.numel() != 1:
            yield f"exit '{node.name}' has the condition {_text(condition)}, not one bool"
        if [user.target for user in node.users] != [first_true]:
            yield f"exit '{node.name}' needs exactly one first_true that takes it"
    for merge in host.graph.find_nodes(op="call_function", target=first_true):
        exits, _ = merge.args
        start = min((order[each] for each in exits), default=order[merge])
        for node in (each for each in order if start < order[each] < order[merge]):
            late = next((user for user in node.users if order[user] > order[merge]), None)
            if late is not None:
                yield f"'{late.name}' needs '{node.name}', which an exit to '{merge.name}' skips"


def _text_to_video_problems(program: Program) -> Iterator[str]:
    roles = program.text_to_video
    if roles is None:
        return
    wrong = list(roles.problems())
    if wrong:
        yield from wrong
        return
    inputs = {spec.name: spec for spec in program.inputs}
    for role, name in (
        ("tokens", roles.tokens),
        ("mask", roles.mask),
        ("noise", roles.noise),
        ("guidance", roles.guidance),
    ):
        if name not in inputs and (name or role in ("tokens", "noise")):
            yield f"text_to_video: the {role} '{name}' is no input, {nearest(name, inputs)}"
    tokens = inputs.get(roles.tokens)
    for role, name in (("tokens", roles.tokens), ("mask", roles.mask)):
        spec = inputs.get(name)
        if spec is None or tokens is None:
            continue
        fits = spec.dtype == torch.int64 and len(spec.shape) == 2 and spec.shape[0] == 1
        if not fits or spec.shape != tokens.shape:
            yield f"text_to_video: the {role} are {spec}; make that input int64[1, L], L tokens"
    guidance = inputs.get(roles.guidance)
    if guidance is not None and (guidance.dtype != torch.float32 or math.prod(guidance.shape) != 1):
        yield f"text_to_video: the guidance is {guidance}; make that input one float32"
    found = next((spec for spec in program.outputs if spec.name == roles.video), None)
    if found is None or len(found.shape) != 5 or found.shape[:2] != (1, 3):
        yield f"text_to_video: there is no output '{roles.video}' [1, 3, frames, height, width]"


def _example_problems(
    place: str, signature: tuple[TensorSpec, ...], examples: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    specs = {spec.name: spec for spec in signature}
    for name, tensor in examples.items():
        if name not in specs:
            yield f"example '{name}' is no input of the {place}"
        elif _text(tensor) != _text_of(specs[name].shape, specs[name].dtype):
            yield f"example '{name}' is {_text(tensor)}, expected {specs[name]}"
    missing = specs.keys() - examples.keys()
    yield from (f"input '{name}' of the {place} has no example" for name in sorted(missing))


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _text_of(tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_text(item) for item in value) + ")"
    return repr(value)


def _text_of(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
