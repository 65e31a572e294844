"""Chunks that cannot be read, memory that is not there, and users who lose patience.

Whatever happens, a run gives what it always gives or an error that says what was wrong, ends soon,
and leaves no thread (the fixture of all tests here looks).
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_pipeline import STEPS, WatchedStorage, weights_file

import odsora_compiler as odsora
from odsora_compiler.errors import PackageError, RunError
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Progress, Runner
from odsora_compiler.runtime.storage import Storage

pytestmark = pytest.mark.timeout(60, func_only=True)

Tensors = dict[str, torch.Tensor]


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder_of_it(path: Path) -> None:
    path.unlink()
    path.mkdir()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("package", ["encoder-00", "denoiser-02", "decoder-00"])
@pytest.mark.parametrize("damage", [remove, make_a_folder_of_it, truncate, flip_a_bit])
@pytest.mark.parametrize("moment", ["before planning", "after planning", "with little memory"])
def test_a_chunk_that_is_damaged_after_the_bundle_was_opened(
    program: odsora.Program,
    copy: Bundle,
    expected: Tensors,
    package: str,
    damage: Callable[[Path], None],
    moment: str,
) -> None:
    """The error names the file; once that is as it was, the same runner runs."""
    runner = Runner(copy)
    if moment == "after planning":
        runner.plan_run()
    elif moment == "with little memory":
        runner.memory_budget = runner.plan_run().peak_bytes - 1
    path = weights_file(copy, package)
    content = path.read_bytes()
    damage(path)
    with pytest.raises(PackageError) as caught:
        runner.run(program.examples)
    assert f"{package}.mlpackage" in str(caught.value)
    assert "weight.bin" in str(caught.value)
    assert caught.value.hint
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)
    found = runner.run(program.examples)
    assert torch.equal(found["decoded"], expected["decoded"])


def test_a_chunk_that_is_damaged_in_the_middle_of_a_run(
    program: odsora.Program, copy: Bundle
) -> None:
    def watch(done: Progress) -> None:
        if done.component == "denoiser" and done.call == 2:
            truncate(weights_file(copy, "denoiser-00"))

    runner = Runner(copy, progress=watch)
    runner.memory_budget = runner.plan_run().peak_bytes // 2
    with pytest.raises(PackageError, match=r"denoiser-00\.mlpackage"):
        runner.run(program.examples)


def test_a_slow_disk_changes_nothing_but_the_time(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    sizes = [package.weight_bytes for package in bundle.component("denoiser").packages.values()]
    bandwidth = sum(sizes) / 0.5
    runner = Runner(bundle, storage=Storage(bandwidth=bandwidth))
    assert torch.equal(runner.run(program.examples)["decoded"], expected["decoded"])
    assert runner.summary.seconds >= 0.5
    assert runner.summary.stall_seconds > 0.4 * runner.summary.seconds


class Stopped(BaseException):
    """Not one that anyone expects."""


@pytest.mark.parametrize(
    "error", [SystemExit(1), Stopped(), OSError(errno.EIO, "broken"), ValueError("a bug")]
)
def test_whatever_ends_a_load_is_an_error_that_names_the_chunk(
    program: odsora.Program, bundle: Bundle, error: BaseException
) -> None:
    def before(package: str) -> None:
        if package == "denoiser-03":
            raise error

    runner = Runner(bundle, storage=WatchedStorage(before))
    with pytest.raises((RunError, PackageError), match="denoiser-03"):
        runner.run(program.examples)


class ShortOfMemory(WatchedStorage):
    """There is none for chunk `package`, so many times."""

    def __init__(self, package: str, times: int, error: Exception) -> None:
        super().__init__()
        self.package, self.left, self.error = package, times, error

    def blocks(self, path: Path) -> Iterator[tuple[int, memoryview]]:
        if self.left and self.package in str(path):
            self.left -= 1
            raise self.error
        yield from super().blocks(path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_where_memory_runs_out_less_is_loaded_ahead(
    program: odsora.Program, bundle: Bundle, expected: Tensors, error: Exception
) -> None:
    runner = Runner(bundle, storage=ShortOfMemory("denoiser-02", 1, error))
    budget = runner.plan_run().budget
    with pytest.warns(RuntimeWarning, match="memory ran out"):
        found = runner.run(program.examples)
    assert torch.equal(found["decoded"], expected["decoded"])
    assert runner.plan.budget < budget


def test_where_there_is_no_memory_at_all_the_run_ends(
    program: odsora.Program, bundle: Bundle
) -> None:
    runner = Runner(bundle, storage=ShortOfMemory("denoiser-02", 10**6, MemoryError()))
    with (
        pytest.warns(RuntimeWarning, match="memory ran out"),
        pytest.raises(RunError, match=r"no memory for the \d+ bytes that the run needs at least"),
    ):
        runner.run(program.examples)


def test_a_leap_while_a_chunk_is_read_that_is_not_needed_any_more(
    program: odsora.Program, bundle: Bundle, expected: Tensors
) -> None:
    """The denoiser leaves before its last steps: of those, at most what is ahead is read."""
    counted = WatchedStorage()
    runner = Runner(bundle, storage=counted)
    runner.memory_budget = runner.plan_run().peak_bytes * 2 // 3
    plan = runner.plan_run()
    assert torch.equal(runner.run(program.examples)["decoded"], expected["decoded"])
    uses = runner.summary.workload.uses
    steps = len({use.call for use in uses}) - 2
    assert steps < STEPS
    # Loads for the uses that ran: the first ones of the plan, and the decoder's.
    count = len(uses) - 1
    needed = sum(load.first_use < count for load in plan.loads) + 1
    assert needed <= len(counted.read) <= needed + plan.prefetch_depth
    assert len(counted.read) < len(plan.loads)


COMMAND = """
import sys
from odsora_compiler.cli import run
from odsora_compiler.runtime import runner, storage

class SlowDisk(storage.Storage):
    # Programs are read at full speed, the weights of a run in ten minutes.
    def __init__(self, checksums):
        super().__init__(bandwidth=float(bandwidth))

bandwidth = sys.argv.pop(1)
runner.Storage = SlowDisk
run.main()
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_at_once_and_leaves_nothing(
    bundle: Bundle, tmp_path: Path, number: signal.Signals
) -> None:
    size = sum(
        package.weight_bytes
        for component in bundle.manifest.components.values()
        for package in component.packages.values()
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", COMMAND, str(size / 600)),
            *(str(bundle.path), "--example", "-o", "out.safetensors", "--trace", "trace.json"),
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("plan"):
                    break
            threading.Event().wait(0.5)  # It runs now, and has minutes to go.
            assert process.poll() is None
            process.send_signal(number)
            out, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1, said
    assert "interrupted; nothing was left at out.safetensors" in said
    assert "Traceback" not in said and not out
    assert not list(tmp_path.iterdir())
