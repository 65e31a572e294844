"""A program: components with their functions and weights, and the host graph that calls them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx

from odsora_compiler.errors import OdsoraError, VerificationError, nearest
from odsora_compiler.ir.function import Function, Provenance, TensorSpec
from odsora_compiler.ir.weights import WeightStore


def call_component(component: str, function: str, /, **inputs: Any) -> NoReturn:
    """Target of the host graph's call nodes: run `function` of `component`, a dict of outputs.

    Only a marker: whoever runs a host graph (`evaluate`, the runtime) interprets it.
    """
    raise OdsoraError("call_component marks a node of a host graph and cannot be called")


@dataclass(frozen=True)
class Chunk:
    """What a plan says of one chunk of a component.

    `weight_bytes`: distinct weights used, in the precision the plan was made for. `crossing_bytes`:
    per function, bytes of the values handed to later chunks at the chunk's end. `reason`: why the
    chunk ends where it does.
    """

    weight_bytes: int
    crossing_bytes: dict[str, int]
    reason: str


@dataclass(frozen=True)
class Plan:
    """How a component is cut. Nodes of its functions carry their chunk's index in `meta['chunk']`.

    `budget`: bytes of weights a chunk may hold, counted in `precision` (`"fp16"` or `"fp32"`).
    `cost`: the cost function in words.
    """

    budget: int
    precision: str
    cost: str
    chunks: tuple[Chunk, ...]


@dataclass
class Component:
    """One network: variants of it as functions over one store of weights."""

    name: str
    functions: dict[str, Function]
    weights: WeightStore
    plan: Plan | None = None

    def function(self, name: str) -> Function:
        """The function of that name; raises `VerificationError` with the nearest names."""
        if name not in self.functions:
            raise VerificationError(
                f"component '{self.name}' has no function '{name}'", nearest(name, self.functions)
            )
        return self.functions[name]

    def used_weights(self) -> list[str]:
        """Names of the weights its functions use, in order of first use, each once."""
        names = (name for function in self.functions.values() for name in function.weight_names())
        return list(dict.fromkeys(names))

    def derive(self, name: str, base: str = "base") -> Function:
        """Add function `name`, a copy of `base`, and return it. Replaces none that exists."""
        if name in self.functions:
            raise VerificationError(
                f"component '{self.name}' already has a function '{name}'",
                "Run the pass that makes it once, on a program that does not have it yet.",
            )
        made = self.function(base).copy(name, base=base)
        self.functions[name] = made
        return made


@dataclass
class Program:
    """Components and host.

    `examples`: a tensor for every host input, of its shape and dtype; numeric checks run on them.
    `facts`: what passes established and no later pass destroyed. `history`: the pipeline text of
    each pass that ran, in order.
    """

    name: str
    components: dict[str, Component]
    host: Function
    examples: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: set[str] = field(default_factory=set)
    history: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The host's inputs."""
        return self.host.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The host's outputs."""
        return self.host.outputs

    def component(self, name: str) -> Component:
        """The component of that name; raises `VerificationError` with the nearest names."""
        if name not in self.components:
            raise VerificationError(
                f"the program has no component '{name}'", nearest(name, self.components)
            )
        return self.components[name]

    def calls(self, component: str | None = None) -> list[fx.Node]:
        """The host's call nodes, in order; only those of `component` when one is given."""
        nodes = self.host.graph.find_nodes(op="call_function", target=call_component)
        return [node for node in nodes if component in (None, node.args[0])]

    def redirect(self, component: str, old: str, new: str, first: int | None = None) -> int:
        """Let the host call function `new` where it calls `old` of `component`.

        Only in the `first` calls of the component (all when None). Both functions must have the
        same signature. Returns how many calls changed.
        """
        owner = self.component(component)
        before, after = owner.function(old), owner.function(new)
        if (before.inputs, before.outputs) != (after.inputs, after.outputs):
            raise VerificationError(
                f"'{new}' cannot be called instead of '{old}' of '{component}': "
                "their inputs or outputs differ"
            )
        changed = 0
        for node in self.calls(component)[:first]:
            if node.args[1] == old:
                node.args = (component, new)
                changed += 1
        return changed

    def __str__(self) -> str:
        """Every function as readable text, as `--print-ir` shows it."""
        # Imported here, because saving and printing are built on this module.
        from odsora_compiler.ir.serialize import program_text

        return program_text(self)

    def copy(self) -> Program:
        """A copy whose graphs can be edited apart; weight stores and examples are shared."""
        return Program(
            self.name,
            {
                name: Component(
                    name,
                    {key: function.copy() for key, function in component.functions.items()},
                    component.weights,
                    component.plan,
                )
                for name, component in self.components.items()
            },
            self.host.copy(),
            dict(self.examples),
            set(self.facts),
            list(self.history),
        )


def single_call_host(component: Component) -> Function:
    """The host of a bare module: one call of `component`'s function `base`, outputs passed on."""
    base = component.function("base")
    host = Function("host")
    inputs: dict[str, Any] = {}
    for placeholder in base.placeholders:
        node = host.graph.placeholder(str(placeholder.target))
        node.meta.update(placeholder.meta)
        inputs[str(placeholder.target)] = node
    call = host.graph.call_function(call_component, (component.name, "base"), inputs)
    call.meta["val"] = {name: node.meta["val"] for name, node in base.results.items()}
    outputs = []
    for name, result in base.results.items():
        item = host.graph.call_function(operator.getitem, (call, name))
        item.meta["val"] = result.meta["val"]
        outputs.append(item)
    for node in (call, *outputs):
        node.meta["provenance"] = Provenance()
    host.graph.output(tuple(outputs)).meta["names"] = tuple(base.results)
    return host
