"""A record of what ran when, in the Chrome trace format (opens in Perfetto)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trace:
    """Collects spans and a memory counter. Times are seconds since the trace was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Record the time the block takes as a bar called `name` in `lane`."""
        begin = self._now()
        try:
            yield
        finally:
            self._events.append(
                {
                    "name": name,
                    "cat": lane,
                    "ph": "X",
                    "ts": begin,
                    "dur": self._now() - begin,
                    "pid": 1,
                    "tid": lane,
                }
            )

    def resident(self, bytes_held: int) -> None:
        """Record how many bytes of weights are in memory from now on."""
        self._events.append(
            {
                "name": "resident weights",
                "ph": "C",
                "ts": self._now(),
                "pid": 1,
                "args": {"bytes": bytes_held},
            }
        )

    def seconds(self, lane: str) -> float:
        """Total time of the spans in `lane`."""
        return sum(event["dur"] for event in self._events if event.get("cat") == lane) / 1e6

    def save(self, path: Path) -> None:
        """Write the trace as JSON."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _now(self) -> float:
        """Microseconds, the unit of the format."""
        return (time.perf_counter() - self._start) * 1e6
