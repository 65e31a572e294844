"""Constant folding: what no input reaches is computed by torch once and becomes a weight.

After folding, every weight of a function is a parameter used directly or a folded constant, so a
converter that folds constants itself (in numpy, in float32 or worse) has nothing left to fold.

    rope.freqs ─ mul ─ cos ─ …          folded/cos ─ …
    arange ──────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import WeightsError, nearest
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import LookupTable, WeightSpec, WeightStore

aten = torch.ops.aten

PREFIX = "folded/"


class FoldedWeights:
    """The results of parts of a graph that depend on weights and literals only.

    `recipes` maps a name to the function, without inputs, that computes it from `weights`; it is
    run at each `load`.
    """

    def __init__(self, recipes: Mapping[str, Function], weights: WeightStore) -> None:
        self._recipes = dict(recipes)
        self._weights = weights

    def names(self) -> Iterable[str]:
        return self._recipes

    def spec(self, name: str) -> WeightSpec:
        (output,) = self._recipe(name).outputs
        return WeightSpec(output.shape, output.dtype)

    def load(self, name: str) -> torch.Tensor:
        recipe = self._recipe(name)
        if not recipe.outputs[0].shape or 0 not in recipe.outputs[0].shape:
            return evaluate(recipe, self._weights, {})["value"].contiguous()
        return torch.empty(recipe.outputs[0].shape, dtype=recipe.outputs[0].dtype)

    def encoding(self, name: str) -> LookupTable | None:
        return None

    def sources(self, name: str) -> list[str]:
        """The weights that a folded constant is computed from; none for one of literals only."""
        return self._recipe(name).weight_names()

    def _recipe(self, name: str) -> Function:
        if name not in self._recipes:
            raise WeightsError(f"there is no weight '{name}'", nearest(name, self._recipes))
        return self._recipes[name]


def fold_constants(function: Function, weights: WeightStore) -> FoldedWeights:
    """Replace, in `function`, values that depend on no input by weights; returns those weights.

    A folded weight is named after the node that it replaces. Broadcasting (`expand`) of a constant
    stays in the graph, and so do reshapes of a compressed weight, whose table would be lost.
    """
    constant = _constant_nodes(function, weights)
    frontier: dict[fx.Node, None] = {}
    for node in function.graph.nodes:
        if node in constant or node.op == "get_attr":
            continue
        for used in node.all_input_nodes:
            chosen = _stored_part(used, constant)
            if chosen is not None:
                frontier[chosen] = None
    recipes = {}
    editor = Editor(function, "fold-constants")
    for node in frontier:
        name = PREFIX + node.name
        recipes[name] = _recipe(function, node)
        value = node.meta["val"]
        stored = editor.before(node).weight(name, WeightSpec(tuple(value.shape), value.dtype))
        editor.replace(node, stored)
    editor.erase_dead()
    return FoldedWeights(recipes, weights)


def _constant_nodes(function: Function, weights: WeightStore) -> set[fx.Node]:
    """Operator nodes that depend on weights and literals only."""
    constant: set[fx.Node] = set()
    for node in function.operators():
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            continue
        if all(
            used in constant
            or (used.op == "get_attr" and weights.encoding(str(used.target)) is None)
            for used in node.all_input_nodes
        ):
            constant.add(node)
    return constant


def _stored_part(node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    """What to store so that `node` need not be computed; None where nothing is to be stored."""
    while node in constant and node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    return node if node in constant else None


def _recipe(function: Function, result: fx.Node) -> Function:
    needed = {result}
    pending = [result]
    while pending:
        for used in pending.pop().all_input_nodes:
            if used not in needed:
                needed.add(used)
                pending.append(used)
    recipe = Function(result.name)
    made: dict[fx.Node, Any] = {}
    for node in function.graph.nodes:
        if node in needed:
            made[node] = recipe.graph.node_copy(node, made.__getitem__)
    recipe.graph.output((made[result],)).meta["names"] = ("value",)
    return recipe
