"""The host graph as a list of operations that any runtime could execute, and its interpreter.

A bundle's manifest carries this list. Values have names; an operation is one JSON object, run in
order. Its `do` says what it is, `free` (absent: none) names values that nothing after it needs:

    {"do": "call", "component": C, "function": F, "inputs": {I: value}, "outputs": {O: value}}
    {"do": "exit", "if": value, "value": value, "to": M}   where `if` (one bool) holds, go on at the
                                                           merge M with `value` as its result
    {"do": "merge", "name": M, "default": value, "out": value}   reached without an exit
    {"do": "random", "kind": "normal" | "uniform", "shape": [...], "dtype": D, "seed": n, "out": …}
                                                           drawn anew in each run, of its seed and n
    {"do": "constant", "name": N, "out": value}            a tensor of host.safetensors
    {"do": "aten.mul.Tensor", "args": [...], "kwargs": {...}, "out": value | {"0": value, …}}

The last is an ATen operator of PyTorch by its name and overload, on arguments that are numbers,
strings, lists, `{"node": value}` or `{"dtype": D}`; `out` of one with several results names those
that are used. docs/bundle-format.md describes the operators that occur.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from odsora_compiler.errors import PackageError, RunError
from odsora_compiler.ir.encoding import (
    decode_argument,
    encode_argument,
    resolve_target,
    target_name,
)
from odsora_compiler.ir.evaluate import check_tensors, run_operator
from odsora_compiler.ir.function import Function, TensorSpec, dtype_name
from odsora_compiler.ir.host import (
    Draw,
    call_component,
    early_exit,
    first_true,
    random_tensor,
)

Operation = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]
# Given a call and its inputs: its outputs.
Call = Callable[[Operation, dict[str, torch.Tensor]], Tensors]

# PyTorch's generator on the CPU looks at 32 bits of its seed. The factor is Knuth's for hashing by
# multiplication: neighbouring seeds of runs and of operations give no equal sums. One is added
# because the noise that a run starts from is drawn with the run's own seed, which may be 0.
_SEED_FACTOR, _SEED_RANGE = 2654435761, 1 << 32


@dataclass(frozen=True)
class HostProgram:
    """Operations with the signature: inputs and outputs, and the value that each one is."""

    inputs: tuple[tuple[TensorSpec, str], ...]
    outputs: tuple[tuple[TensorSpec, str], ...]
    operations: tuple[Operation, ...]

    @classmethod
    def of(cls, host: Function) -> HostProgram:
        """The host graph `host` as operations."""
        results = {name: node.name for name, node in host.results.items()}
        return cls(
            tuple(zip(host.inputs, _names(host.placeholders), strict=True)),
            tuple((spec, results[spec.name]) for spec in host.outputs),
            _with_free(list(_operations(host)), results.values()),
        )

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "inputs": [_spec_data(*each) for each in self.inputs],
            "outputs": [_spec_data(*each) for each in self.outputs],
            "operations": list(self.operations),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> HostProgram:
        """The inverse of `to_data`. Raises `PackageError` on what is not such data."""
        try:
            made = cls(
                tuple((_spec(item), str(item["value"])) for item in data["inputs"]),
                tuple((_spec(item), str(item["value"])) for item in data["outputs"]),
                tuple(data["operations"]),
            )
            _check(made)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise PackageError(f"damaged host program: {error!r}") from error
        return made

    @property
    def calls(self) -> tuple[Operation, ...]:
        """The calls of components, in order."""
        return tuple(item for item in self.operations if item["do"] == "call")

    @torch.no_grad()
    def run(
        self, inputs: Tensors, constants: Tensors, call: Call, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Execute on named `inputs`; `call` runs components. Returns the named outputs.

        `seed` changes what random operations draw. Operations between an exit that is taken and its
        merge are left out. Raises `RunError` when inputs do not fit the signature.
        """
        check_tensors("the host program", (spec for spec, _ in self.inputs), inputs)
        values = {value: inputs[spec.name] for spec, value in self.inputs}
        target, carried = "", torch.empty(0)
        for item in self.operations:
            do = item["do"]
            if target and (do != "merge" or item["name"] != target):
                pass
            elif do == "merge":
                values[item["out"]] = carried if target else values[item["default"]]
                target = ""
            elif do == "exit":
                if bool(values[item["if"]]):
                    target, carried = item["to"], values[item["value"]]
            elif do == "call":
                given = {name: values[value] for name, value in item["inputs"].items()}
                results = call(item, given)
                values.update({value: results[name] for name, value in item["outputs"].items()})
                del given, results
            elif do == "constant":
                values[item["out"]] = constants[item["name"]]
            elif do == "random":
                values[item["out"]] = random_tensor(
                    cast(Draw, item["kind"]),
                    item["shape"],
                    getattr(torch, item["dtype"]),
                    (seed * _SEED_FACTOR + item["seed"] + 1) % _SEED_RANGE,
                )
            else:
                values.update(operator_results(item, values))
            for name in item.get("free", ()):
                values.pop(name, None)
        if target:
            raise RunError(f"the host program leaves for '{target}', which does not follow")
        return {spec.name: values[value] for spec, value in self.outputs}


def operator_results(item: Operation, values: Tensors) -> dict[str, torch.Tensor]:
    """What an operation that is an ATen operator makes of `values`, by the names of its results."""
    args = tuple(decode_argument(arg, values) for arg in item.get("args", ()))
    kwargs = {key: decode_argument(arg, values) for key, arg in item.get("kwargs", {}).items()}
    result = run_operator(resolve_target(item["do"]), args, kwargs)
    if isinstance(item["out"], str):
        return {item["out"]: result}
    return {name: result[int(index)] for index, name in item["out"].items()}


# ------------------------------------------------------------------ from graph to operations


def _operations(host: Function) -> Iterator[dict[str, Any]]:
    for node in host.graph.nodes:
        if node.op == "get_attr":
            yield {"do": "constant", "name": str(node.target), "out": node.name}
        elif node.op != "call_function" or node.target is operator.getitem:
            continue
        elif node.target is call_component:
            yield _call(node)
        elif node.target is early_exit:
            condition, value = _names(node.args)
            (merge,) = node.users
            yield {"do": "exit", "if": condition, "value": value, "to": merge.name}
        elif node.target is first_true:
            (default,) = _names(node.args[1:])
            yield {"do": "merge", "name": node.name, "default": default, "out": node.name}
        elif node.target is random_tensor:
            kind, shape, dtype, seed = node.args
            drawn = {"kind": kind, "shape": shape, "dtype": dtype_name(cast(Any, dtype))}
            yield {"do": "random", **drawn, "seed": seed, "out": node.name}
        else:
            yield _operator(node)


def _call(node: fx.Node) -> dict[str, Any]:
    component, function = node.args
    inputs = dict(zip(node.kwargs, _names(node.kwargs.values()), strict=True))
    called = {"component": component, "function": function, "inputs": inputs}
    return {"do": "call", **called, "outputs": _items(node)}


def _operator(node: fx.Node) -> dict[str, Any]:
    made: dict[str, Any] = {"do": target_name(node.target)}
    made["args"] = [encode_argument(arg) for arg in node.args]
    if node.kwargs:
        made["kwargs"] = {key: encode_argument(value) for key, value in node.kwargs.items()}
    made["out"] = node.name if isinstance(node.meta["val"], torch.Tensor) else _items(node)
    return made


def _items(node: fx.Node) -> dict[str, str]:
    """Which item of a node's result is which value: all its users take one."""
    return {str(user.args[1]): user.name for user in node.users}


def _names(nodes: Iterable[Any]) -> list[str]:
    return [node.name for node in nodes]


def _with_free(
    operations: Sequence[dict[str, Any]], kept: Iterable[str]
) -> tuple[dict[str, Any], ...]:
    """`operations`, each with the values that nothing after it and no output needs."""
    needed = set(kept)
    made: list[dict[str, Any]] = []
    for item in reversed(operations):
        touched = dict.fromkeys((*_read(item), *_written(item)))
        free = [name for name in touched if name not in needed]
        made.append({**item, "free": free} if free else item)
        needed.update(touched)
    return tuple(reversed(made))


def _read(item: Operation) -> Iterator[str]:
    """Names of the values an operation takes."""
    for key in ("if", "value", "default"):
        if key in item:
            yield item[key]
    yield from item.get("inputs", {}).values()
    for argument in (*item.get("args", ()), *item.get("kwargs", {}).values()):
        yield from _nodes_in(argument)


def _nodes_in(argument: Any) -> Iterator[str]:
    if isinstance(argument, list):
        for each in argument:
            yield from _nodes_in(each)
    elif isinstance(argument, dict) and "node" in argument:
        yield argument["node"]


def _written(item: Operation) -> Iterator[str]:
    """Names of the values an operation makes."""
    out = item.get("outputs", item.get("out", {}))
    yield from [out] if isinstance(out, str) else out.values()


# ------------------------------------------------------------------ data


def _spec_data(spec: TensorSpec, value: str) -> dict[str, Any]:
    data = {"name": spec.name, "dtype": dtype_name(spec.dtype), "shape": list(spec.shape)}
    return {**data, **({"axes": spec.axes} if spec.axes else {}), "value": value}


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    dtype = getattr(torch, data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown type {data['dtype']}")
    return TensorSpec(data["name"], tuple(data["shape"]), dtype, data.get("axes"))


_KEYS = {
    "call": ("component", "function", "inputs", "outputs"),
    "exit": ("if", "value", "to"),
    "merge": ("name", "default", "out"),
    "random": ("kind", "shape", "dtype", "seed", "out"),
    "constant": ("name", "out"),
}


def _check(program: HostProgram) -> None:
    """Raise ValueError or KeyError on an unknown operation, or a value used before it is made."""
    known = {value for _, value in program.inputs}
    for item in program.operations:
        for key in _KEYS.get(item["do"], ("args", "out")):
            item[key]
        if item["do"] not in _KEYS:
            resolve_target(item["do"])
        unknown = [name for name in _read(item) if name not in known]
        if unknown:
            raise ValueError(f"{item['do']} needs '{unknown[0]}', which nothing before it makes")
        known.update(_written(item))
    missing = [value for _, value in program.outputs if value not in known]
    if missing:
        raise ValueError(f"nothing makes the output '{missing[0]}'")
