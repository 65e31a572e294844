"""Cutting a function into the chunks its nodes are marked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.evaluate import check_tensors, evaluate
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Component
from odsora_compiler.ir.weights import WeightStore


@dataclass(frozen=True)
class ChunkedFunction:
    """A function as a sequence of smaller ones that hand values on by name.

    `chunks[i].inputs` are inputs of the whole function or outputs of earlier chunks. `outputs` maps
    each output name of the whole to the name of the value that is it.
    """

    whole: Function
    chunks: tuple[Function, ...]
    outputs: dict[str, str]

    def last_uses(self) -> list[list[str]]:
        """Per chunk, the values no later chunk and no output needs: they can be freed after it."""
        kept = set(self.outputs.values())
        seen: set[str] = set(kept)
        freed: list[list[str]] = []
        for chunk in reversed(self.chunks):
            names = [spec.name for spec in (*chunk.inputs, *chunk.outputs)]
            freed.append([name for name in dict.fromkeys(names) if name not in seen])
            seen.update(names)
        return freed[::-1]


def split(function: Function, component: Component) -> ChunkedFunction:
    """`function` cut as the component's plan says; one chunk where there is no plan."""
    names = _value_names(function)
    results = function.results
    outputs = {name: names[node] for name, node in results.items()}
    count = len(component.plan.chunks) if component.plan else 1
    home = _homes(function, count)
    members: list[list[fx.Node]] = [[] for _ in range(count)]
    for node, place in home.items():
        if place is not None:
            members[place].append(node)
    order = {node: place for place, node in enumerate(function.graph.nodes)}
    chunks = tuple(
        _extract(function, index, members, home, order, names, set(results.values()))
        for index in range(count)
    )
    return ChunkedFunction(function, chunks, outputs)


@torch.no_grad()
def evaluate_chunked(
    chunked: ChunkedFunction, weights: WeightStore, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run the chunks one after another in PyTorch, freeing values at their last use."""
    check_tensors(f"function '{chunked.whole.name}'", chunked.whole.inputs, inputs)
    values = dict(inputs)
    for chunk, freed in zip(chunked.chunks, chunked.last_uses(), strict=True):
        given = {spec.name: values[spec.name] for spec in chunk.inputs}
        values.update(evaluate(chunk, weights, given))
        del given
        for name in freed:
            values.pop(name, None)
    return {name: values[value] for name, value in chunked.outputs.items()}


def _homes(function: Function, count: int) -> dict[fx.Node, int | None]:
    """Node → the chunk that computes it; None for values computed anew wherever they are used."""
    if count == 1:
        return dict.fromkeys(function.operators(), 0)
    homes = {node: node.meta.get("chunk") for node in function.operators()}
    for node, home in homes.items():
        for used in node.all_input_nodes:
            if home is None and homes.get(used) is not None:
                raise VerificationError(
                    f"function '{function.name}': '{node.name}' belongs to no chunk, but needs "
                    f"'{used.name}' of chunk {homes[used]}",
                    "Cut functions (cidl) after the passes that change them.",
                )
    return homes


def _value_names(function: Function) -> dict[fx.Node, str]:
    """Names by which values pass between chunks: an input's or output's own where it has one."""
    names = {node: str(node.target) for node in function.placeholders}
    taken = set(names.values())
    wanted = {node: name for name, node in reversed(function.results.items())}
    for node in (*function.results.values(), *function.operators()):
        if node not in names:
            # An output may be named like an input that later chunks still read.
            name = wanted.get(node, node.name)
            while name in taken:
                name += "_"
            names[node] = name
            taken.add(name)
    return names


def _extract(
    function: Function,
    index: int,
    members: list[list[fx.Node]],
    home: dict[fx.Node, int | None],
    order: dict[fx.Node, int],
    names: dict[fx.Node, str],
    results: set[fx.Node],
) -> Function:
    last = max((place for place, nodes in enumerate(members) if nodes), default=0)

    def made_here(node: fx.Node) -> bool:
        return node.op != "placeholder" and home.get(node, index) in (index, None)

    def leaves(node: fx.Node) -> bool:
        crosses = home.get(node) == index and any(
            home.get(user, index) not in (index, None) for user in node.users
        )
        finished = node in results and (home.get(node) == index or index == last)
        return made_here(node) and (crosses or finished)

    roots = list(members[index])
    if index == last:
        roots += [node for node in results if node.op != "placeholder" and home.get(node) is None]
    needed = sorted(_needed_here(roots, index, home), key=order.__getitem__)
    chunk = Function(function.name, base=function.base)
    made: dict[fx.Node, fx.Node] = {}
    own = [node for node in needed if made_here(node)]
    # The function's inputs as it has them, then values of earlier chunks as they are first read:
    # chunks that do the same get their inputs in the same order.
    given = [node for node in needed if node.op == "placeholder"]
    given += dict.fromkeys(
        used for node in own for used in node.all_input_nodes if not made_here(used)
    )
    for node in dict.fromkeys(given):
        made[node] = chunk.graph.placeholder(names[node])
        made[node].meta = {key: value for key, value in node.meta.items() if key in ("val", "axes")}
    for node in own:
        made[node] = chunk.graph.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, made.__getitem__),
            fx.node.map_arg(node.kwargs, made.__getitem__),
            name=node.name,
        )
        made[node].meta = {key: value for key, value in node.meta.items() if key != "chunk"}
    leaving = [node for node in made if leaves(node)]
    for node in leaving:
        if not isinstance(node.meta["val"], torch.Tensor):
            raise VerificationError(
                f"function '{function.name}': the cut after chunk {index} splits '{node.name}' "
                "from the node that takes its parts"
            )
    chunk.graph.output(tuple(made[node] for node in leaving)).meta["names"] = tuple(
        names[node] for node in leaving
    )
    return chunk


def _needed_here(roots: list[fx.Node], index: int, home: dict[fx.Node, int | None]) -> set[fx.Node]:
    """The nodes `roots` of a chunk, what they read, and all behind what is computed anew."""
    needed = set(roots)
    pending = list(roots)
    while pending:
        node = pending.pop()
        if home.get(node, index) not in (index, None):
            continue
        for used in node.all_input_nodes:
            if used not in needed:
                needed.add(used)
                pending.append(used)
    return needed
