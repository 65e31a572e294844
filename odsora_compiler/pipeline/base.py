"""What a pass is: a frozen dataclass of options with a name, conditions and an exactness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import fx

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.serialize import function_fingerprint
from odsora_compiler.pipeline.exactness import Exact, Exactness

Result = TypeVar("Result")


class Pass:
    """Base of all passes. Subclass as a frozen dataclass whose fields are the options.

    `name`: what pipeline text calls it. `requires`: facts that must hold before it runs;
    `establishes`, `destroys`: facts that hold, or no longer hold, after it. Facts are words such as
    `"axis t"` (an input names that axis), `"plan"` (components are cut into chunks) or
    `"function tdtm"`. `exactness`: what it does to the numbers; the manager measures it.
    A field's help text stands in its metadata: `option(default, "help")`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    destroys: ClassVar[frozenset[str]] = frozenset()

    @property
    def exactness(self) -> Exactness:
        """How exact the pass is with these options."""
        return Exact()

    def run(self, program: Program, context: Context) -> None:
        """Rewrite `program` in place, through `ir.edit.Editor`."""
        raise NotImplementedError


def option(default: Any, help: str) -> Any:
    """A dataclass field of a pass with its default and help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Declined:
    """A place a pass left alone, and why."""

    author: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.author}: left {self.place} alone: {self.reason}"


class Analyses:
    """Results of analyses, computed when asked for and kept until the function changes."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[str, fx.Graph, Any]] = {}

    def of(self, analysis: Callable[[Function], Result], function: Function) -> Result:
        """`analysis(function)`, from the cache when the function is as it was."""
        key = (analysis, id(function.graph))
        now = function_fingerprint(function)
        if key not in self._kept or self._kept[key][0] != now:
            # The graph is kept alive with the result: its id stays taken and its nodes valid.
            self._kept[key] = (now, function.graph, analysis(function))
        result: Result = self._kept[key][2]
        return result


@dataclass
class Context:
    """What the manager gives a pass besides the program.

    `precision`: `"fp16"` or `"fp32"`, what the program will be lowered to; weights count 2 or 4
    bytes an element. `decline` records a place left alone, `note` a sentence about what was done;
    both reach the user on stderr.
    """

    author: str
    precision: str = "fp16"
    analyses: Analyses = field(default_factory=Analyses)
    declined: list[Declined] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def decline(self, place: str, reason: str) -> None:
        """Say that the pass leaves `place` alone, and why."""
        self.declined.append(Declined(self.author, place, reason))

    def note(self, text: str) -> None:
        """Say something about what the pass did."""
        self.notes.append(text)
