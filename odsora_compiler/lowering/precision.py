"""Which values must stay in single precision in a half-precision package.

Angles that go into sine and cosine are large (a timestep is up to 1000, where half precision has
steps of a half), and so are the numbers that lead there (height times width overflows). The cone of
cheap operators before each sine and cosine is therefore computed in single precision; results of
sine and cosine are rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.function import Function

aten = torch.ops.aten


def exact_nodes(function: Function, exact_outputs: Collection[str] = ()) -> set[fx.Node]:
    """Nodes (inputs among them) whose values must not be rounded to half precision.

    `exact_outputs`: outputs that later functions need unrounded.
    """
    roots = [node for node in function.operators() if node.target in _PERIODIC]
    roots += [node for name, node in function.results.items() if name in exact_outputs]
    exact: set[fx.Node] = set()
    while roots:
        node = roots.pop()
        if node in exact or not (node.op == "placeholder" or _passes_through(node)):
            continue
        exact.add(node)
        roots += node.all_input_nodes
    return exact


def exact_boundaries(chunks: Sequence[Function]) -> set[str]:
    """Names of the values, given to or passed between `chunks`, that must not be rounded.

    `chunks` are the parts of one function in the order in which they run.
    """
    exact: set[str] = set()
    for chunk in reversed(chunks):
        nodes = exact_nodes(chunk, exact)
        exact |= {str(node.target) for node in chunk.placeholders if node in nodes}
    return exact


_PERIODIC = {aten.sin.default, aten.cos.default, aten.tan.default}
_SHAPE_OPERATORS: set[Any] = {
    aten.cat.default,
    aten.expand.default,
    aten.permute.default,
    aten.repeat.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def _passes_through(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    tags = getattr(node.target, "tags", None)
    # operator.getitem, the one target without tags, takes a part of a tuple.
    return tags is None or node.target in _SHAPE_OPERATORS or torch.Tag.pointwise in tags
