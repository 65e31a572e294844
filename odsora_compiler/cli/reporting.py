"""How the commands speak: progress and warnings on stderr, errors without a traceback."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from odsora_compiler.errors import OdsoraError

if TYPE_CHECKING:
    import rich.progress


class Reporter:
    """Progress on stderr: a line that renews itself on a terminal, else a line a stage.

    `quiet` leaves out everything but warnings.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._status: Any = None
        self._stage = ""
        self._begin = time.perf_counter()

    def __enter__(self) -> Reporter:
        if self._live:
            from rich.console import Console

            self._status = Console(stderr=True).status("")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the work: says when it is done and how long it took."""
        self._stage = name
        self.step("")
        begin = time.perf_counter()
        yield
        if not self._quiet:
            self.say(f"{name}  {time.perf_counter() - begin:.1f} s")

    def step(self, text: str) -> None:
        """What is being done just now; shown on a terminal only."""
        if self._status is not None:
            elapsed = time.perf_counter() - self._begin
            self._status.update(f"{self._stage}  {text}  [{elapsed:.0f} s]".replace("[", "\\["))

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Bars of a run in place of the line; they are gone when the block ends."""
        if not self._live:
            yield Bars(None, (lambda _: None) if self._quiet else self.say)
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._status.stop()
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn()
        shown = Progress(
            *columns,
            TextColumn("{task.fields[count]}"),
            console=self._status.console,
            transient=True,
        )
        try:
            with shown:
                yield Bars(shown, self.say)
        finally:
            self._status.start()

    def say(self, text: str) -> None:
        """A line on stderr."""
        if self._status is not None:
            self._status.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


class Bars:
    """How far a run is: for each component a bar, its calls, and the time left for them.

    Without a terminal, `say` gets a line every `between` seconds instead.
    """

    def __init__(
        self,
        progress: rich.progress.Progress | None,
        say: Callable[[str], None],
        between: float = 30,
    ) -> None:
        self._progress = progress
        self._say = say
        self._between = between
        self._bars: dict[str, rich.progress.TaskID] = {}
        self._begins: dict[str, float] = {}
        self._current = ""
        self._updated = self._said = time.perf_counter()

    def update(self, name: str, call: int, calls: int, part: float) -> None:
        """`part`, from 0 to 1, of call number `call` of `calls` of the component `name` is done."""
        now = time.perf_counter()
        if name != self._current:
            self._finish(self._current)
            self._begins.setdefault(name, self._updated)
            self._current = name
        self._updated = now
        done = call - 1 + part
        left = (now - self._begins[name]) / done * (calls - done)
        count = f"{call} of {calls}, {duration_text(left)} left"
        if self._progress is not None:
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=calls, count="")
            self._progress.update(self._bars[name], completed=done, total=calls, count=count)
        elif now - self._said >= self._between:
            self._said = now
            self._say(f"{name}  {count}")

    def _finish(self, name: str) -> None:
        """Another component's turn: an early exit may have left out the last calls of this one."""
        if self._progress is not None and name:
            done = self._progress.tasks[self._bars[name]].completed
            self._progress.update(self._bars[name], total=done, count=f"{done:.0f} done")


def guarded(work: Callable[[], None], nothing_left: str = "") -> None:
    """Run `work` and exit: 0 done, 1 the work failed, 2 the command was wrong.

    An error of this project or of the file system and an interruption become messages without
    traceback; ODSORA_DEBUG=1 shows the traceback. `nothing_left` is added when the user interrupts.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: a name in a script that the terminal's encoding lacks is no error.
        sys.stdout.reconfigure(errors="backslashreplace")
    previous = signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        work()
    except OdsoraError as error:
        if os.environ.get("ODSORA_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted{'; ' + nothing_left if nothing_left else ''}", file=sys.stderr)
        code = 1
    except BrokenPipeError:
        # The reader of stdout went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if os.environ.get("ODSORA_DEBUG"):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.exit(code)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; columns of numbers are those whose heading ends in a space."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in columns:
        right = column.endswith(" ")
        table.add_column(column.strip(), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)


def size_text(count: float) -> str:
    """Bytes for people: `1.5 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def duration_text(seconds: float) -> str:
    """Seconds for people: `12 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def budget_bytes(text: str) -> int | None:
    """`"1GB"` of --memory-budget in bytes, None of ""; raises `UsageError` on anything else."""
    from odsora_compiler.errors import UsageError
    from odsora_compiler.pipeline.options import ByteSize

    try:
        return ByteSize.parse(text) if text else None
    except ValueError as error:
        raise UsageError(f"--memory-budget: {error}", "For example --memory-budget 1GB") from error


def parse_settings(settings: list[str]) -> dict[str, str]:
    """`["a=1"]` → `{"a": "1"}`; raises `UsageError` on anything else."""
    from odsora_compiler.errors import UsageError

    found: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set '{text}': expected name=value", "For example --set depth=8")
        found[name.strip()] = value
    return found
