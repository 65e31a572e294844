"""What watches passes run: one hook with a call before and after each pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

import torch

from odsora_compiler.analysis.cost import function_flops
from odsora_compiler.errors import PassError, VerificationError
from odsora_compiler.ir.drift import Drift, measure_drift
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_component, evaluate_program
from odsora_compiler.ir.serialize import program_text
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.pipeline.base import Declined
from odsora_compiler.pipeline.exactness import Exactness, Lossy, violation


@dataclass
class PassReport:
    """What happened when one pass ran. `seconds` is the pass alone, without instruments."""

    name: str
    text: str
    exactness: Exactness
    changed: bool = False
    seconds: float = 0.0
    drift: Drift | None = None
    declined: tuple[Declined, ...] = ()
    notes: tuple[str, ...] = ()


class Instrument:
    """Override what you need. Raising from `after` fails the pipeline."""

    def before(self, program: Program, report: PassReport) -> None:
        """Called before a pass runs; `report` has its name, text and exactness."""

    def after(self, program: Program, report: PassReport) -> None:
        """Called after a pass ran; `report.changed` is set."""

    def finish(self, program: Program) -> None:
        """Called once, after the last pass."""


class StructureCheck(Instrument):
    """Verify the program's structure after every pass, and that its signature is what it was."""

    def before(self, program: Program, report: PassReport) -> None:
        self._signature = (program.inputs, program.outputs)

    def after(self, program: Program, report: PassReport) -> None:
        try:
            verify_program(program)
        except VerificationError as error:
            raise PassError(f"pass '{report.name}' left a broken program: {error}") from error
        for was, now in zip(self._signature, (program.inputs, program.outputs), strict=True):
            if was != now:
                raise PassError(
                    f"pass '{report.name}' changed the program's signature from "
                    f"({', '.join(map(str, was))}) to ({', '.join(map(str, now))})",
                    "A program keeps the names, shapes and types of its inputs and outputs.",
                )


class Timing(Instrument):
    """Print a table of seconds per pass at the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._rows: list[tuple[str, float, bool]] = []

    def after(self, program: Program, report: PassReport) -> None:
        self._rows.append((report.text, report.seconds, report.changed))

    def finish(self, program: Program) -> None:
        stream = self._stream or sys.stderr
        total = sum(seconds for _, seconds, _ in self._rows)
        print("pass timing (seconds)", file=stream)
        for text, seconds, changed in self._rows:
            share = f"{100 * seconds / total:5.1f} %" if total > 0 else ""
            kept = "" if changed else "  (changed nothing)"
            print(f"  {seconds:8.3f}  {share}  {text}{kept}", file=stream)
        print(f"  {total:8.3f}  total", file=stream)


class PrintProgram(Instrument):
    """Print the program after passes: `"after-changed"`, `"after-all"` or after one pass's name.

    `"after-all"` prints a program that no pass runs on as well.
    """

    def __init__(self, when: str, stream: TextIO | None = None) -> None:
        self._when = when
        self._stream = stream
        self._passes = 0

    def after(self, program: Program, report: PassReport) -> None:
        self._passes += 1
        wanted = {"after-all": True, "after-changed": report.changed}
        if wanted.get(self._when, self._when == report.name):
            self._print(f"// after {report.text}", program)

    def finish(self, program: Program) -> None:
        if self._when == "after-all" and not self._passes:
            self._print("// no passes", program)

    def _print(self, heading: str, program: Program) -> None:
        stream = self._stream or sys.stdout
        print(heading, file=stream)
        print(program_text(program), file=stream)


class DriftCheck(Instrument):
    """Measure what each pass does to the numbers and hold it to its declared exactness.

    Runs the host, and every component function on the inputs the host's first call gives it, on the
    program's examples before and after. `limit_flops`: programs that need more for one run are not
    measured, and `tell` is given a sentence that says so; None measures always.
    """

    def __init__(
        self, limit_flops: float | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        self._limit = limit_flops
        self._tell = tell or (lambda text: print(text, file=sys.stderr))
        self._reference: Mapping[str, torch.Tensor] | None = None
        self._examples: Mapping[str, torch.Tensor] = {}
        self._warned = False

    def before(self, program: Program, report: PassReport) -> None:
        # A pass may give the program other examples; outputs on the old ones say nothing then.
        same = self._examples.keys() == program.examples.keys() and all(
            value is self._examples[name] for name, value in program.examples.items()
        )
        if (self._reference is None or not same) and self._affordable(program):
            self._reference = all_outputs(program)
            self._examples = dict(program.examples)

    def after(self, program: Program, report: PassReport) -> None:
        if self._reference is None:
            return
        if not report.changed:
            report.drift = Drift(0.0, 0.0, 1.0, True)
            return
        now = all_outputs(program)
        kept = {name: value for name, value in self._reference.items() if name in now}
        report.drift = measure_drift(now, kept)
        problem = violation(report.drift, report.exactness, now, kept)
        # Functions that existed before are held to it one by one; new ones only through the host.
        self._reference = now
        if problem:
            raise PassError(
                f"pass '{report.name}' is declared {report.exactness}, but {problem}",
                "Declare what it does to the numbers, or mend the pass.",
            )
        if isinstance(report.exactness, Lossy):
            self._tell(f"{report.text}: {report.drift}")

    def _affordable(self, program: Program) -> bool:
        if self._limit is None:
            return True
        flops = program_flops(program)
        if flops > self._limit and not self._warned:
            self._warned = True
            self._tell(
                f"passes are not held to their exactness by numbers: one run takes "
                f"{flops / 1e12:.1f} TFLOP, more than {self._limit / 1e12:.1f} "
                "(--verify full measures anyway)"
            )
        return flops <= self._limit


def program_flops(program: Program) -> float:
    """FLOP of one run of the host."""
    return float(
        sum(
            function_flops(program.component(str(node.args[0])).function(str(node.args[1])))
            for node in program.calls()
        )
    )


def all_outputs(program: Program) -> dict[str, torch.Tensor]:
    """Outputs of the host and of every function of every component the host calls.

    Keys: the host's output names, and `component.function:output`.
    """
    inputs: dict[str, Mapping[str, torch.Tensor]] = {}
    called: dict[tuple[str, str], Mapping[str, torch.Tensor]] = {}

    def on_call(
        name: str,
        function: str,
        given: Mapping[str, torch.Tensor],
        results: Mapping[str, torch.Tensor],
    ) -> None:
        if name not in inputs:
            inputs[name] = dict(given)
            called[name, function] = results

    outputs = dict(evaluate_program(program, program.examples, on_call))
    for name, given in inputs.items():
        component = program.component(name)
        for function in component.functions:
            results = called.get((name, function)) or evaluate_component(component, function, given)
            outputs.update({f"{name}.{function}:{key}": value for key, value in results.items()})
    return outputs
