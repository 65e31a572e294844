"""Running one function eagerly in PyTorch: the reference all results are held to.

Whole programs, host and chunks included, are `ir.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import RunError
from odsora_compiler.ir.function import Function, TensorSpec, dtype_name
from odsora_compiler.ir.weights import WeightStore

aten = torch.ops.aten

Observer = Callable[[fx.Node, Any], None]


@torch.no_grad()
def evaluate(
    function: Function,
    weights: WeightStore,
    inputs: Mapping[str, torch.Tensor],
    observe: Observer | None = None,
) -> dict[str, torch.Tensor]:
    """Run `function` on named `inputs`; returns its named outputs.

    Weights are loaded when used and every value is freed after its last use, so memory stays near
    the largest weight plus the live activations. `observe(node, value)` sees each operator's value.
    Raises `RunError` when inputs do not fit the signature.
    """
    check_tensors(f"function '{function.name}'", function.inputs, inputs)
    last_use: dict[fx.Node, fx.Node] = {}
    for node in function.graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    values: dict[fx.Node, Any] = {}
    for node in function.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "output":
            results = _bind(node.args[0], values, weights)
            return dict(zip(node.meta["names"], results, strict=True))
        elif node.op == "call_function":
            args, kwargs = _bind((node.args, node.kwargs), values, weights)
            values[node] = call_operator(node, args, kwargs)
            del args, kwargs
            if observe is not None:
                observe(node, values[node])
        for used in node.all_input_nodes:
            if last_use[used] is node:
                values.pop(used, None)
        if node not in last_use:
            values.pop(node, None)
    raise RunError(f"function '{function.name}' has no output")


def check_tensors(
    what: str, expected: Iterable[TensorSpec], inputs: Mapping[str, torch.Tensor]
) -> None:
    """Raise `RunError` unless `inputs` has the names, shapes and dtypes `expected` of it."""
    specs = {spec.name: spec for spec in expected}
    missing, extra = specs.keys() - inputs.keys(), inputs.keys() - specs.keys()
    if missing or extra:
        raise RunError(
            f"{what}: "
            + " and ".join(
                f"{problem} input {', '.join(sorted(names))}"
                for problem, names in (("missing", missing), ("unknown", extra))
                if names
            ),
            "It takes " + "; ".join(str(spec) for spec in specs.values()) + ".",
        )
    for name, spec in specs.items():
        tensor = inputs[name]
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            raise RunError(
                f"{what}: input '{name}' is {dtype_name(tensor.dtype)}{list(tensor.shape)}",
                f"Expected {spec}.",
            )


# Strides are not part of the representation, so a value may lie in memory otherwise than when the
# graph was captured; `reshape` and `contiguous` views are indifferent to that.
_STRIDE_FREE: dict[Any, Callable[..., Any]] = {aten.view.default: torch.reshape}


def call_operator(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the operator of `node` gives on these arguments."""
    return run_operator(node.target, args, kwargs)


def run_operator(target: Any, args: Any, kwargs: Any) -> Any:
    """What the operator `target` gives on these arguments."""
    return _STRIDE_FREE.get(target, target)(*args, **kwargs)


def _bind(arguments: Any, values: Mapping[fx.Node, Any], weights: WeightStore) -> Any:
    def value_of(node: fx.Node) -> Any:
        return weights.load(str(node.target)) if node.op == "get_attr" else values[node]

    return fx.node.map_arg(arguments, value_of)
