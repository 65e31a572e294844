"""What any cut of a component would be, told from a forecast of the finest one.

Chunks of the finest cut that follow each other become one. What each of them computes anew counts
for each, and constants that conversion adds are taken to be the same in all; else nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise, takewhile

from odsora_compiler.analysis.cutting import cut
from odsora_compiler.analysis.footprint import activation_bytes
from odsora_compiler.analysis.partition import CutPoints, Span, finest
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.manifest import ChunkCall, ComponentEntry, FunctionEntry
from odsora_compiler.ir.program import Component
from odsora_compiler.lowering.chunks import LoweringSettings
from odsora_compiler.lowering.forecast import TEXT, WEIGHTS, forecast


class FinestCut:
    """The finest cut of `component`, which it leaves made. `points`: where it can be cut."""

    def __init__(self, component: Component, points: CutPoints, settings: LoweringSettings) -> None:
        spans = finest(points)
        most = max(span.weight_bytes for span in spans)
        cut(component, points, spans, most, settings.precision, "as many chunks as there can be")
        made = forecast(component, settings)
        self._points = points
        self._entry = made.entry
        self._packages = list(made.entry.packages.items())
        self._functions = {
            name: _Values(function, made.legal[name], settings.precision)
            for name, function in made.entry.functions.items()
        }
        self._borders = [0, *(span.stop for span in spans)]
        self._places = {point: place for place, point in enumerate(self._borders)}
        # Constants that conversion adds. Parts of a chunk have them in common.
        self._added = [
            package.weight_bytes - span.weight_bytes
            for (_, package), span in zip(self._packages, spans, strict=True)
        ]

    def joined(self, spans: Sequence[Span]) -> ComponentEntry | None:
        """About what the manifest would say of that cut; None where it has other borders.

        That happens where functions use weights in different orders.
        """
        if not all(span.stop in self._places for span in spans):
            return None
        groups = list(pairwise([0, *(self._places[span.stop] for span in spans)]))
        packages = {}
        for span, (start, stop) in zip(spans, groups, strict=True):
            text = sum(package.files[TEXT][0] for _, package in self._packages[start:stop])
            size = span.weight_bytes + max(self._added[start:stop])
            name, first = self._packages[start]
            files = {WEIGHTS: (size, ""), TEXT: (text, "")}
            packages[name] = replace(first, weight_bytes=size, files=files)
        functions = {
            name: replace(
                function,
                chunks=tuple(self._functions[name].joined(*group) for group in groups),
            )
            for name, function in self._entry.functions.items()
        }
        return replace(self._entry, functions=functions, packages=packages)

    def narrowest(
        self, weight_expansion: float = 1.0, activation_expansion: float = 1.0
    ) -> list[Span]:
        """The cut in which a chunk and the activations of running it take least memory at most.

        Of several, one with fewest chunks. The expansions: bytes of memory that a byte takes.
        """
        last = len(self._packages)
        expansions = (weight_expansion, activation_expansion)
        # What the finest cut needs is enough; more is of no interest.
        enough = max(next(self._needed(start, *expansions))[2] for start in range(last))
        possible = [
            list(takewhile(lambda item: item[2] <= enough, self._needed(start, *expansions)))
            for start in range(last)
        ]
        worst = {0: 0.0}
        for start in range(last):
            for stop, _, needed in possible[start] if start in worst else ():
                worst[stop] = min(worst.get(stop, enough), max(worst[start], needed))
        chunks = {0: 0}
        before: dict[int, tuple[int, Span]] = {}
        for start in range(last):
            for stop, span, needed in possible[start] if start in chunks else ():
                if needed <= worst[last] and chunks[start] + 1 < chunks.get(stop, last + 1):
                    chunks[stop], before[stop] = chunks[start] + 1, (start, span)
        found: list[Span] = []
        while last:
            last, span = before[last]
            found.append(span)
        return found[::-1]

    def _needed(
        self, start: int, weight_expansion: float, activation_expansion: float
    ) -> Iterator[tuple[int, Span, float]]:
        """Chunks that begin with the finest cut's chunk `start`: the one after them, where they
        are, and bytes that their weights and activations take."""
        every = (values.activations(start) for values in self._functions.values())
        activations = zip(*every, strict=True)
        reached, most, added = start, 0, 0
        for span, _ in self._points.spans(self._borders[start]):
            stop = self._places.get(span.stop)
            while stop is not None and reached < stop:
                added = max(added, self._added[reached])
                most = max(next(activations))
                reached += 1
            if stop is not None:
                weights = (span.weight_bytes + added) * weight_expansion
                yield stop, span, weights + most * activation_expansion


class _Values:
    """A function's values between the chunks of the finest cut, and what each chunk needs."""

    def __init__(self, function: FunctionEntry, legal: Sequence[Function], precision: str) -> None:
        self._calls = function.chunks
        self._legal = legal
        self._precision = precision
        self._running: dict[tuple[int, frozenset[str]], int] = {}
        self._last_read = {
            item.name: number for number, call in enumerate(self._calls) for item in call.inputs
        }
        self._last_read |= dict.fromkeys(function.results.values(), len(self._calls))
        self._alive = []  # per chunk, values of earlier ones that are still to be read
        alive: dict[str, int] = {}
        for number, call in enumerate(self._calls):
            self._alive.append(alive)
            alive = self._after(number, alive | {item.name: item.bytes for item in call.outputs})

    def joined(self, start: int, stop: int) -> ChunkCall:
        """The chunks from `start` to before `stop` as one."""
        calls = self._calls[start:stop]
        made = {item.name: item for call in calls for item in call.outputs}
        read = {item.name: item for call in calls for item in call.inputs}
        passing = sum(size for name, size in self._alive[start].items() if name not in read)
        *_, most = islice(self.activations(start), stop - start)
        return ChunkCall(
            calls[0].package,
            tuple(item for name, item in read.items() if name not in made),
            tuple(item for name, item in made.items() if self._last_read.get(name, -1) >= stop),
            sum(call.flops for call in calls),
            most - passing,
        )

    def activations(self, start: int) -> Iterator[int]:
        """For one chunk of 1, 2, … of the finest cut's from `start` on: most bytes of all values
        while it runs, those that only pass by included.

        Inputs of the chunk are held to its end, what its parts hand on to their last use.
        """
        passing = sum(self._alive[start].values())
        inputs: dict[str, int] = {}
        inner: dict[str, int] = {}
        most = 0
        for number in range(start, len(self._calls)):
            call = self._calls[number]
            for item in call.inputs:
                if item.name in inputs or item.name in inner:
                    continue
                inputs[item.name] = item.bytes
                if item.name in self._alive[start]:
                    passing -= item.bytes
                else:  # An input of the function, which the chunk has from its start.
                    most += item.bytes
            own = {item.name for item in call.inputs}
            held = inputs | inner
            beside = sum(size for name, size in held.items() if name not in own)
            kept = (name for name in own if name in inputs or self._last_read[name] > number)
            most = max(most, passing + beside + self._run(number, frozenset(kept)))
            yield most
            inner = self._after(number, inner | {item.name: item.bytes for item in call.outputs})

    def _run(self, number: int, kept: frozenset[str]) -> int:
        """Bytes of activations of a chunk; the inputs that are not kept go after their last use."""
        key = (number, kept)
        if key not in self._running:
            self._running[key] = activation_bytes(self._legal[number], self._precision, kept)
        return self._running[key]

    def _after(self, number: int, values: dict[str, int]) -> dict[str, int]:
        """Those of the values that are read after chunk `number`."""
        return {
            name: size for name, size in values.items() if self._last_read.get(name, -1) > number
        }
