"""A small program, passes that do one thing each and say that they ran, and a registry of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Program
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.exactness import Exact, Exactness
from odsora_compiler.plugins import Registered, Registry

aten = torch.ops.aten

Action = Callable[[Program, Context], Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


_CAPTURED: list[Program] = []


def net_program() -> Program:
    """y = second(tanh(first(x))), x [3, 4] with axes b and c; a new copy each time."""
    if not _CAPTURED:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        _CAPTURED.append(capture(ModelSpec(Net(), {"x": x}, {"x": "b c"})))
    return _CAPTURED[0].copy()


def base(program: Program) -> Function:
    return program.component("model").function("base")


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in base(program).graph.nodes if item.name == name)


def scale(by: float, at: str = "tanh", function: str = "base") -> Action:
    """Multiply the value of a node by a number."""

    def action(program: Program, context: Context) -> None:
        editor = Editor(program.component("model").function(function), context.author)
        target = next(item for item in editor.graph.nodes if item.name == at)
        editor.replace(target, editor.after(target).call(aten.mul.Tensor, target, by))

    return action


def do_nothing(program: Program, context: Context) -> None:
    """A pass that finds nothing to do."""


def make_pass(
    name: str,
    action: Action = do_nothing,
    *,
    requires: set[str] | None = None,
    establishes: set[str] | None = None,
    destroys: set[str] | None = None,
    exactness: Exactness | None = None,
    ran: list[str] | None = None,
) -> type[Pass]:
    """A pass class that does `action` and adds its name to `ran`."""
    declared = exactness or Exact()

    @dataclass(frozen=True)
    class Made(Pass):
        """Made for a test."""

        level: int = option(1, "not used")

        @property
        def exactness(self) -> Exactness:
            return declared

        def run(self, program: Program, context: Context) -> None:
            if ran is not None:
                ran.append(name)
            action(program, context)

    Made.name = name
    Made.requires = frozenset(requires or ())
    Made.establishes = frozenset(establishes or ())
    Made.destroys = frozenset(destroys or ())
    return Made


def registry(*passes: type[Pass]) -> Registry:
    """A registry of these passes alone."""
    return Registry({cls.name: Registered(cls, "tests") for cls in passes})
