"""Memory that running a function takes besides its weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.cost import FLOAT_BYTES, SAME_MEMORY, value_bytes
from odsora_compiler.ir.function import Function

aten = torch.ops.aten


def activation_bytes(
    function: Function, precision: str, held_inputs: Collection[str] | None = None
) -> int:
    """Most bytes of values in memory at once in a run of `function` lowered to `precision`.

    Finished outputs and the `held_inputs` (None: all inputs) are held to the end, other values to
    their last use; operators run in the order of the graph. Reshapes take no memory of their own,
    transposed copies do, as do the logits of attention. Values made of weights alone are counted
    like others.
    """
    owner: dict[fx.Node, fx.Node] = {}
    for node in function.graph.nodes:
        source = node.args[0] if node.target in SAME_MEMORY else None
        owner[node] = owner[source] if isinstance(source, fx.Node) else node
    last_read = {
        owner[used]: node for node in function.graph.nodes for used in node.all_input_nodes
    }
    given_back = {
        node
        for node in function.placeholders
        if held_inputs is not None and str(node.target) not in held_inputs
    }
    held = sum(_bytes(node, precision) for node in function.placeholders)
    peak = held
    for node in function.operators():
        if owner[node] is node:
            held += _bytes(node, precision)
        peak = max(peak, held + _workspace(node, precision))
        touched = dict.fromkeys((owner[node], *(owner[used] for used in node.all_input_nodes)))
        for value in touched:
            passes = value.op == "call_function" or value in given_back
            if passes and last_read.get(value, node) is node:
                held -= _bytes(value, precision)
    return peak


def _bytes(node: fx.Node, precision: str) -> int:
    return value_bytes(node.meta["val"], precision)


def _workspace(node: fx.Node, precision: str) -> int:
    """Bytes an operator needs while it runs, beside what it reads and makes."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return 0
    query, key = (_shape(node.args[index]) for index in range(2))
    return query.numel() // query[-1] * key[-2] * FLOAT_BYTES[precision]


def _shape(argument: Any) -> torch.Size:
    return argument.meta["val"].shape
