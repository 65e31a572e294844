"""A function: an FX graph of ATen operators with a signature, naming its weights.

Node kinds: `placeholder` (target: the input's name), `get_attr` (target: the weight's name in the
component's store), `call_function` (an operator overload, `operator.getitem`, or in a host graph
`call_component`), `output` (a tuple of nodes; their names in `meta['names']`).

`meta` of a node holds `val` (fake tensors), `provenance`, on placeholders `axes` (a string such as
`"b c t h w"`, or absent) and after partitioning `chunk` (an index).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    `module`: path in the model's module tree (`"spatial_blocks.0.attn"`). `source`: line of the
    model's code (`"stdit3.py:120 in forward"`). `passes`: the passes that made or remade the node.
    """

    module: str = ""
    source: str = ""
    passes: tuple[str, ...] = ()

    def by(self, author: str) -> Provenance:
        """The same place, with `author` added to the passes."""
        if not author or (self.passes and self.passes[-1] == author):
            return self
        return Provenance(self.module, self.source, (*self.passes, author))

    def __str__(self) -> str:
        place = " ".join(
            text for text in (self.module, f"({self.source})" if self.source else "") if text
        )
        made = f" by {','.join(self.passes)}" if self.passes else ""
        return (place or "?") + made


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape, dtype and axis names of a function's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: str | None = None

    def __str__(self) -> str:
        dims = ", ".join(str(size) for size in self.shape)
        named = f' "{self.axes}"' if self.axes else ""
        return f"{self.name}: {dtype_name(self.dtype)}[{dims}]{named}"


@dataclass
class Function:
    """A named graph. `base`: the function it was derived from, if any."""

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    base: str | None = None

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def output_node(self) -> fx.Node:
        """The one `output` node."""
        (node,) = self.graph.find_nodes(op="output")
        return node

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The signature's inputs, in order."""
        return tuple(
            _spec(str(node.target), node.meta["val"], node.meta.get("axes"))
            for node in self.placeholders
        )

    @property
    def results(self) -> dict[str, fx.Node]:
        """Output name → the node that computes it."""
        node = self.output_node
        values: Any = node.args[0]
        return dict(zip(node.meta["names"], values, strict=True))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The signature's outputs, in order."""
        return tuple(_spec(name, node.meta["val"]) for name, node in self.results.items())

    def weight_names(self) -> list[str]:
        """Names of the weights the graph uses, in order of first use, each once."""
        nodes = (node for node in self.graph.nodes if node.op == "get_attr")
        return list(dict.fromkeys(str(node.target) for node in nodes))

    def operators(self) -> Iterator[fx.Node]:
        """The `call_function` nodes, in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def copy(self, name: str | None = None, base: str | None = None) -> Function:
        """A deep copy of the graph; node names and `meta` entries are kept."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            made = graph.create_node(
                node.op,
                node.target,
                fx.node.map_arg(node.args, mapping.__getitem__),
                fx.node.map_arg(node.kwargs, mapping.__getitem__),
                name=node.name,
            )
            made.meta = dict(node.meta)
            mapping[node] = made
        return Function(name or self.name, graph, base if base is not None else self.base)


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _spec(name: str, value: Any, axes: str | None = None) -> TensorSpec:
    return TensorSpec(name, tuple(value.shape), value.dtype, axes)
