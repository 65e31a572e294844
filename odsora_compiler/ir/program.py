"""A program: components with their functions and weights, and the host graph that calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from odsora_compiler.errors import VerificationError, nearest
from odsora_compiler.ir.function import Function, TensorSpec
from odsora_compiler.ir.host import call_component
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.ir.weights import WeightStore


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


# What of a device should compute a component, in Core ML's words.
ComputeUnits = Literal["cpu_only", "cpu_and_gpu", "cpu_and_neural_engine", "all"]


@dataclass
class Component:
    """One network: variants of it as functions over one store of weights.

    `examples`: a tensor for every input of its functions; what was lowered is executed on them.
    """

    name: str
    functions: dict[str, Function]
    weights: WeightStore
    plan: Plan | None = None
    examples: dict[str, torch.Tensor] = field(default_factory=dict)
    compute_units: ComputeUnits = "cpu_and_gpu"

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
    each pass that ran, in order. `constants`: tensors that the host graph's `get_attr` nodes name.
    `text_to_video`: what to do with a prompt, where the program makes a film of one.
    """

    name: str
    components: dict[str, Component]
    host: Function
    examples: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: set[str] = field(default_factory=set)
    history: list[str] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    text_to_video: TextToVideo | None = None

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

    def steps(self, component: str) -> list[list[fx.Node]]:
        """The host's calls of `component`, step by step.

        Calls of one step do not need each other's results; a call that needs a result of step i
        belongs to a later one. So two calls for the halves of guidance are one step.
        """
        depth: dict[fx.Node, int] = {}
        found: list[list[fx.Node]] = []
        for node in self.host.graph.nodes:
            level = max((depth[used] for used in node.all_input_nodes), default=0)
            if node.target is call_component and node.args[0] == component:
                if level == len(found):
                    found.append([])
                found[level].append(node)
                level += 1
            depth[node] = level
        return found

    def redirect(self, component: str, old: str, new: str, first: int | None = None) -> int:
        """Let the host call function `new` where it calls `old` of `component`.

        Only in the `first` steps (see `steps`; all when None). Both functions must have the same
        signature. Returns how many calls changed.
        """
        owner = self.component(component)
        before, after = owner.function(old), owner.function(new)
        if (before.inputs, before.outputs) != (after.inputs, after.outputs):
            raise VerificationError(
                f"'{new}' cannot be called instead of '{old}' of '{component}': "
                "their inputs or outputs differ"
            )
        changed = 0
        for node in (node for step in self.steps(component)[:first] for node in step):
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
                    component.examples,
                    component.compute_units,
                )
                for name, component in self.components.items()
            },
            self.host.copy(),
            dict(self.examples),
            set(self.facts),
            list(self.history),
            dict(self.constants),
            self.text_to_video,
        )
