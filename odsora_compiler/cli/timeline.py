"""Pictures of a timeline, planned or measured: as text, and as a drawing where matplotlib is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from odsora_compiler.cli.reporting import size_text
from odsora_compiler.errors import UsageError
from odsora_compiler.runtime.output_file import output_file

if TYPE_CHECKING:
    from odsora_compiler.planning.simulate import Timeline

_LEVELS = " ▁▂▃▄▅▆▇█"
_IMAGES = {".png": "png", ".svg": "svg"}
_COLORS = {"load": "tab:blue", "compute": "tab:green", "stall": "tab:red"}


def timeline_text(timeline: Timeline, budget: int, width: int = 72) -> str:
    """How busy loading and computing are over time, where computing waits, and memory.

    A column is a part of the time; its height says how much of it, or of `budget`, is taken.
    """
    step = timeline.seconds / width or 1.0
    lines = []
    for lane in ("load", "compute", "stall"):
        busy = [0.0] * width
        for event in timeline.events:
            if event.lane == lane:
                _add(busy, event.start / step, event.end / step)
        lines.append(f"{lane:>8} {_row(busy)} {timeline.total(lane):.4g} s")
    peaks = [0.0] * width
    for (start, size), (end, _) in zip(
        timeline.memory, [*timeline.memory[1:], (timeline.seconds, 0)], strict=True
    ):
        if end > start:
            for column in range(int(start / step), min(int(end / step) + 1, width)):
                peaks[column] = max(peaks[column], size / budget)
    lines.append(f"{'memory':>8} {_row(peaks)} of {size_text(budget)}")
    scale = f"{timeline.seconds:.4g} s"
    lines.append(f"{'':8} 0{scale:>{width - 1}}")
    return "\n".join(lines)


def check_drawing(path: Path) -> None:
    """Raise `UsageError` where no timeline can be drawn at `path`; to be asked before the work."""
    if path.suffix.lower() not in _IMAGES:
        raise UsageError(f"{path}: nothing can be drawn as '{path.suffix}'", "Use .png or .svg.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"{path}: drawing needs matplotlib", "pip install matplotlib, or leave it out."
        )


def draw_timeline(timeline: Timeline, path: Path, budget: int, title: str) -> None:
    """Draw lanes and memory into the file `path`; see `check_drawing`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    lanes, memory = figure.subplots(2, 1, sharex=True)
    names = list(_COLORS)
    for place, lane in enumerate(names):
        bars = [
            (event.start, event.end - event.start)
            for event in timeline.events
            if event.lane == lane
        ]
        lanes.broken_barh(bars, (place - 0.4, 0.8), color=_COLORS[lane], linewidth=0)
    lanes.set_yticks(range(len(names)), names)
    lanes.invert_yaxis()
    lanes.set_title(title, loc="left", fontsize=10)
    times, sizes = zip(*timeline.memory, strict=True) if timeline.memory else ((0.0,), (0,))
    memory.fill_between(times, [size / 1e9 for size in sizes], step="post", alpha=0.4)
    memory.axhline(budget / 1e9, color="black", linewidth=0.8, linestyle="--")
    memory.set_ylabel("memory, GB")
    memory.set_ylim(0)
    memory.set_xlabel("s")
    with output_file(path) as partial:
        figure.savefig(partial, dpi=120, format=_IMAGES[path.suffix.lower()])


def _add(busy: list[float], start: float, end: float) -> None:
    """Add to every column how much of it lies between `start` and `end`, in columns."""
    column = int(start)
    while column < min(end, len(busy)):
        busy[column] += max(0.0, min(end, column + 1) - max(start, column))
        column += 1


def _row(parts: Sequence[float]) -> str:
    return "".join(_level(part) for part in parts)


def _level(part: float) -> str:
    if part <= 0.005:
        return _LEVELS[0]
    return _LEVELS[max(1, min(round(part * 8), 8))]
