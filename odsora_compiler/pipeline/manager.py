"""Running a pipeline of passes over a program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from odsora_compiler.errors import OdsoraError, PassError, UsageError
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.serialize import fingerprint
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.pipeline.base import Analyses, Context, Pass
from odsora_compiler.pipeline.instruments import (
    DriftCheck,
    Instrument,
    PassReport,
    StructureCheck,
)
from odsora_compiler.pipeline.options import construct
from odsora_compiler.pipeline.text import PassText, parse_pipeline, print_pipeline
from odsora_compiler.plugins import Registry, load_registry

# One run of a program above this is not worth its seconds unless asked for: 8 to 10 s on two cores.
NUMERIC_LIMIT_FLOPS = 1e12


@dataclass
class Pipeline:
    """Passes in order, made from pipeline text; `str` gives the text back."""

    texts: tuple[PassText, ...]
    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, registry: Registry) -> Pipeline:
        """Raises `UsageError` on a mistake in the text, an unknown pass or option."""
        texts = parse_pipeline(text)
        where = f"passes '{text}'"
        passes = tuple(
            construct(registry.find(item.name), dict(item.options), where) for item in texts
        )
        return cls(texts, passes)

    def __str__(self) -> str:
        return print_pipeline(self.texts)

    def check(self, facts: Iterable[str]) -> None:
        """Raise `UsageError` unless every pass finds what it requires, starting from `facts`.

        Also refused: destroying what an earlier pass of the pipeline established, unless a later
        one establishes it again; and making a function that exists.
        """
        holding = set(facts)
        author: dict[str, str] = {}
        for index, item in enumerate(self.passes):
            lacking = sorted(item.requires - holding)
            if lacking:
                later = [p.name for p in self.passes[index + 1 :] if p.establishes & set(lacking)]
                raise UsageError(
                    f"pass '{item.name}' requires {', '.join(lacking)}, which nothing before it "
                    "establishes",
                    f"Put it after '{later[0]}'." if later else _advice(lacking),
                )
            taken = sorted(fact for fact in item.establishes & holding if _is_function(fact))
            if taken:
                raise UsageError(
                    f"pass '{item.name}' makes the {taken[0]}, which the program has already",
                    f"Name '{item.name}' once, and start from a program without it.",
                )
            again = set().union(*(p.establishes for p in self.passes[index:]))
            for fact in sorted((item.destroys & author.keys()) - again):
                raise UsageError(
                    f"pass '{item.name}' destroys '{fact}', which '{author[fact]}' establishes",
                    f"Put '{item.name}' before '{author[fact]}'.",
                )
            holding = (holding - item.destroys) | item.establishes
            author.update(dict.fromkeys(item.establishes, item.name))


@dataclass
class PassManager:
    """Runs pipelines. Instruments see every pass; the structure check is always among them."""

    instruments: Sequence[Instrument] = ()
    precision: str = "fp16"
    tell: Callable[[str], None] | None = None
    reports: list[PassReport] = field(default_factory=list)

    def run(self, program: Program, pipeline: Pipeline) -> None:
        """Rewrite `program` in place. Raises `UsageError` before anything ran, else `PassError`."""
        pipeline.check(program.facts)
        verify_program(program)
        instruments = [StructureCheck(), *self.instruments]
        analyses = Analyses()
        for text, item in zip(pipeline.texts, pipeline.passes, strict=True):
            self.reports.append(self._run_one(program, item, str(text), instruments, analyses))
        for instrument in instruments:
            instrument.finish(program)

    def _run_one(
        self,
        program: Program,
        item: Pass,
        text: str,
        instruments: Sequence[Instrument],
        analyses: Analyses,
    ) -> PassReport:
        lacking = sorted(item.requires - program.facts)
        if lacking:
            raise PassError(
                f"pass '{item.name}' requires {', '.join(lacking)}, which the passes before it "
                "were to establish but did not",
                "See above what they left alone and why.",
            )
        report = PassReport(item.name, text, item.exactness)
        for instrument in instruments:
            instrument.before(program, report)
        before = _state(program)
        context = Context(item.name, self.precision, analyses)
        start = time.perf_counter()
        try:
            item.run(program, context)
        except (PassError, UsageError):
            raise
        except OdsoraError as error:
            raise PassError(f"pass '{item.name}' failed: {error.message}", error.hint) from error
        except Exception as error:
            raise PassError(
                f"pass '{item.name}' failed: {type(error).__name__}: {error}"
            ) from error
        report.seconds = time.perf_counter() - start
        report.changed = _changed(item, program, before)
        report.declined, report.notes = tuple(context.declined), tuple(context.notes)
        if report.changed:
            for fact in item.destroys:
                _forget(program, fact)
            program.facts = program.facts - item.destroys
        program.facts |= {fact for fact in item.establishes if _holds(program, fact)}
        program.history.append(text)
        if self.tell is not None:
            for line in (*report.declined, *report.notes):
                self.tell(str(line))
        for instrument in instruments:
            instrument.after(program, report)
        return report


def run_passes(
    program: Program,
    passes: str,
    *,
    precision: str = "fp16",
    verify: str = "numeric",
    instruments: Sequence[Instrument] = (),
    registry: Registry | None = None,
    tell: Callable[[str], None] | None = None,
) -> Program:
    """A rewritten copy of `program`.

    `passes` is pipeline text. `verify`: `"structure"`, `"numeric"` (drift is measured where one run
    of the program is affordable) or `"full"` (always measured). `tell` is given what passes note
    and decline, and what was measured; default: a line on stderr.
    """
    tell = tell or (lambda text: print(text, file=sys.stderr))
    pipeline = Pipeline.parse(passes, registry or load_registry())
    copy = program.copy()
    manager = PassManager([*drift_checks(verify, tell), *instruments], precision, tell)
    manager.run(copy, pipeline)
    return copy


def drift_checks(verify: str, tell: Callable[[str], None] | None = None) -> list[Instrument]:
    """The numeric instrument for a level of verification; none for `"structure"`."""
    limits: Mapping[str, float | None] = {"numeric": NUMERIC_LIMIT_FLOPS, "full": None}
    if verify not in ("structure", *limits):
        raise UsageError(
            f"unknown level of verification '{verify}'", "Use structure, numeric or full."
        )
    return [DriftCheck(limits[verify], tell)] if verify in limits else []


def _state(program: Program) -> tuple[Any, ...]:
    # Values of weights are too large to compare; a store that was put in place of another counts.
    stores = {name: component.weights for name, component in program.components.items()}
    return fingerprint(program), stores


def _changed(item: Pass, program: Program, before: tuple[Any, ...]) -> bool:
    try:
        return _state(program) != before
    except Exception as error:
        raise PassError(f"pass '{item.name}' left a broken program: {error}") from error


def _holds(program: Program, fact: str) -> bool:
    """Whether `fact` is true of `program`, where the program itself tells; else it is believed."""
    components = program.components.values()
    if fact == "plan":
        return any(component.plan is not None for component in components)
    kind, _, name = fact.partition(" ")
    if kind == "function":
        return any(name in component.functions for component in components)
    return True


def _forget(program: Program, fact: str) -> None:
    if fact == "plan":
        for component in program.components.values():
            component.plan = None
            for function in component.functions.values():
                for node in function.graph.nodes:
                    node.meta.pop("chunk", None)


def _is_function(fact: str) -> bool:
    return fact.startswith("function ")


def _advice(lacking: list[str]) -> str:
    axes = [fact.removeprefix("axis ") for fact in lacking if fact.startswith("axis ")]
    if axes:
        return (
            f"Name the axis {', '.join(axes)} on an input: ModelSpec(…, axes={{'z': 'b c t h w'}})."
        )
    return "Add a pass that establishes it before."
