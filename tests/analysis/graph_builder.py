"""Small functions for tests of the analyses, built node by node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.weights import WeightSpec

aten = torch.ops.aten


class GraphBuilder:
    """Adds nodes to one function; `finish` names its outputs."""

    def __init__(self, name: str = "base") -> None:
        self.function = Function(name)
        self.function.graph.output(()).meta["names"] = ()
        self.editor = Editor(self.function, "test")
        self._reads: dict[str, fx.Node] = {}

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        first = next(iter(self.function.graph.nodes))
        with self.function.graph.inserting_before(first):
            node = self.function.graph.placeholder(name)
        node.meta["val"] = fake_tensor(shape, dtype)
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        if name not in self._reads:
            self._reads[name] = self.editor.weight(name, WeightSpec(shape, torch.float32))
        return self._reads[name]

    def call(self, target: Any, *args: Any, module: str = "", **kwargs: Any) -> fx.Node:
        node = self.editor.call(target, *args, **kwargs)
        node.meta["provenance"] = Provenance(module or node.name)
        return node

    def linear(self, x: fx.Node, name: str, out: int, module: str = "") -> fx.Node:
        weight = self.weight(name, out, x.meta["val"].shape[-1])
        return self.call(aten.linear.default, x, weight, module=module)

    def finish(self, **outputs: fx.Node) -> Function:
        output = self.function.output_node
        output.args = (tuple(outputs.values()),)
        output.meta["names"] = tuple(outputs)
        return self.function

    @property
    def specs(self) -> dict[str, WeightSpec]:
        return {
            name: WeightSpec(tuple(node.meta["val"].shape), torch.float32)
            for name, node in self._reads.items()
        }
