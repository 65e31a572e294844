"""A record of what ran when: in the Chrome trace format (opens in Perfetto), or as a timeline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from odsora_compiler.planning.simulate import Event, Lane, Timeline

_PROCESS = 1
# Lanes in the order in which they are shown; their place is the number of a thread.
_LANES: tuple[Lane, ...] = get_args(Lane)


@dataclass(frozen=True)
class _Span:
    """Seconds on the clock. `details`: what else is known."""

    lane: Lane
    name: str
    start: float
    end: float
    details: dict[str, Any]


class Trace:
    """Collects spans and how much memory is taken; for any number of threads."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._spans: list[_Span] = []
        self._memory: list[tuple[float, int, int]] = []
        # Begin and end of the last run; while it is under way, no end.
        self._run: tuple[float, float | None] = (self._begin, None)

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run is what the block does."""
        begin = time.perf_counter()
        self._run = begin, None
        try:
            yield
        finally:
            self._run = begin, time.perf_counter()

    @contextmanager
    def span(self, lane: Lane, name: str, **details: Any) -> Iterator[dict[str, Any]]:
        """Record the time the block takes as a bar in `lane`. `name`: the chunk.

        `details` are shown with it; the block is given them and may add to them.
        """
        begin = time.perf_counter()
        try:
            yield details
        finally:
            self._spans.append(_Span(lane, name, begin, time.perf_counter(), details))

    def memory(self, weights: int, activations: int) -> None:
        """Record how many bytes are taken from now on, as plans count them."""
        self._memory.append((time.perf_counter(), weights, activations))

    def timeline(self) -> Timeline:
        """The last run, until now where it is under way; the form in which runs are predicted."""
        begin, end = self._run
        end = time.perf_counter() if end is None else end
        events = [
            Event(span.lane, span.name, span.start - begin, span.end - begin)
            for span in self._spans
            if begin <= span.start and span.end <= end
        ]
        memory = [
            (now - begin, weights + activations)
            for now, weights, activations in self._memory
            if begin <= now <= end
        ]
        by_time = sorted(events, key=lambda event: (event.start, event.end))
        return Timeline(tuple(by_time), tuple(sorted(memory)), end - begin)

    def load_seconds(self) -> dict[str, float]:
        """Chunk → mean seconds of its loads in the last run that came to their end."""
        return self._means(
            (span.name, span) for span in self._of("load") if "given up" not in span.details
        )

    def compute_seconds(self) -> dict[str, float]:
        """Chunk and function, "CHUNK.FUNCTION" → mean seconds of its uses in the last run."""
        return self._means(
            (f"{span.name}.{span.details['function']}", span) for span in self._of("compute")
        )

    def save(self, path: Path) -> None:
        """Write everything as JSON: a thread for every lane, and a counter of bytes."""
        events: list[dict[str, Any]] = [_named("process_name", {"name": "odsora-run"})]
        for place, lane in enumerate(_LANES):
            events.append(_named("thread_name", {"name": lane}, place + 1))
            events.append(_named("thread_sort_index", {"sort_index": place}, place + 1))
        for span in sorted(self._spans, key=lambda span: span.start):
            events.append(
                {
                    "name": span.name,
                    "cat": span.lane,
                    "ph": "X",
                    "ts": self._microseconds(span.start),
                    "dur": (span.end - span.start) * 1e6,
                    "pid": _PROCESS,
                    "tid": _LANES.index(span.lane) + 1,
                    "args": span.details,
                }
            )
        for now, weights, activations in self._memory:
            events.append(
                {
                    "name": "memory",
                    "ph": "C",
                    "ts": self._microseconds(now),
                    "pid": _PROCESS,
                    "args": {"weights": weights, "activations": activations},
                }
            )
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _of(self, lane: Lane) -> list[_Span]:
        """Those of the last run."""
        return [span for span in self._spans if span.lane == lane and span.start >= self._run[0]]

    @staticmethod
    def _means(spans: Iterable[tuple[str, _Span]]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for name, span in spans:
            found.setdefault(name, []).append(span.end - span.start)
        return {name: sum(times) / len(times) for name, times in found.items()}

    def _microseconds(self, seconds: float) -> float:
        """The unit of the format, since the trace was made."""
        return (seconds - self._begin) * 1e6


def _named(kind: str, args: dict[str, Any], thread: int = 0) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": args}
