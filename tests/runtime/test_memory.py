"""Runs in other processes that have no more memory than the budget and what a program takes.

Two networks: one of large values and hardly a weight, then one that is called twice and has 268 MB
of fp16 weights, which are 537 MB in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from odsora_compiler.runtime.execution import PROGRAM_BYTES

pytestmark = pytest.mark.timeout(120, func_only=True)

COMPILE = """
import sys
import torch
import odsora_compiler as odsora

WIDTH, DEPTH, ROWS, MANY, NARROW = 4096, 8, 64, 65536, 64

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(NARROW, NARROW)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(self.layer(x)) + x
        return x.reshape(-1, WIDTH)[:ROWS]

class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = (torch.nn.utils.skip_init(torch.nn.Linear, WIDTH, WIDTH) for _ in range(DEPTH))
        self.layers = torch.nn.ModuleList(layers)
        for layer in self.layers:
            layer.weight.data.copy_(torch.randn(WIDTH) / WIDTH**0.5)
            layer.bias.data.zero_()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x

def sample(c, x):
    x = c.wide(x=x)
    for _ in range(2):
        x = c.stack(x=x)
    return x

torch.manual_seed(0)
x = torch.randn(MANY, NARROW)
spec = odsora.PipelineSpec(
    {
        "wide": odsora.ModelSpec(Wide(), {"x": x}),
        "stack": odsora.ModelSpec(Stack(), {"x": torch.randn(ROWS, WIDTH)}),
    },
    sample,
    {"x": x},
)
program = odsora.run_passes(odsora.capture(spec), "cidl{budget=34MB}")
odsora.lower(program, sys.argv[1], verify="structure")
"""

RUN = """
import hashlib, json, os, resource, sys, warnings
bundle, limit, group, budget = sys.argv[1:]
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # As in odsora-run.
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))

import torch
from odsora_compiler.runtime.bundle import Bundle
from odsora_compiler.runtime.runner import Runner

def status(key):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024

from odsora_compiler.errors import UsageError

runner = Runner(Bundle(bundle), memory_budget=1)
inputs, _ = runner.bundle.examples()
try:
    runner.plan_run()
except UsageError as error:
    least = int(error.hint.removeprefix("Give at least ").split()[0])
runner.memory_budget = int(budget) or None
runner.plan_run()
if int(limit) and not group:
    # PyTorch's threads have their stacks now.
    torch.randn(512, 512) @ torch.randn(512, 512)
    data = status("VmData") + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    (found,) = runner.run(inputs).values()
print(json.dumps({
    "digest": hashlib.sha256(found.numpy().tobytes()).hexdigest(),
    "peak": status("VmHWM"),
    "counted": runner.summary.peak_bytes,
    "least": least,
    "told": [str(each.message) for each in told if each.category is RuntimeWarning],
}))
"""


def start(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
    )


def run(bundle: Path, budget: int = 0, limit: int = 0, group: str = "") -> dict[str, Any]:
    done = start(RUN, bundle, limit, group, budget)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("memory") / "stack.odsora"
    done = start(COMPILE, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def free(bundle: Path) -> dict[str, Any]:
    """A run that has all the memory it wants."""
    return run(bundle)


@pytest.fixture(scope="module")
def least(free: dict[str, Any]) -> int:
    """The least budget, as the error says it."""
    found = int(free["least"])
    # Not more than two chunks of a layer each, and twice the input with what is made of it.
    assert found <= 2 * 4 * 4096 * 4097 + 2 * 3 * 65536 * 64 * 4
    return found


@contextmanager
def memory_group(limit: int) -> Iterator[str]:
    """A cgroup whose processes have `limit` bytes together; "" where none can be made."""
    group = made_group(limit)
    if group is None:
        yield ""
        return
    try:
        yield str(group)
    finally:
        remove_group(group)


def made_group(limit: int) -> Path | None:
    for file, root in (
        ("memory.limit_in_bytes", "/sys/fs/cgroup/memory"),  # version 1
        ("memory.max", "/sys/fs/cgroup"),  # version 2
    ):
        folder = Path(root) / f"odsora-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / file).exists():
                (folder / file).write_text(str(limit))
                return folder
        except OSError:
            pass
        remove_group(folder)
    return None


def remove_group(group: Path) -> None:
    for _ in range(1000):
        try:
            group.rmdir()
            return
        except OSError:  # Its last process is not quite gone.
            threading.Event().wait(0.01)


@pytest.mark.parametrize("times", [1, 3])
def test_a_hard_limit_of_the_budget_and_the_program_is_enough(
    bundle: Path, free: dict[str, Any], least: int, times: int
) -> None:
    budget = times * least
    with memory_group(budget + PROGRAM_BYTES) as group:
        # Where there are no groups: beside the budget, the stack of the thread that loads, and the
        # block it reads into.
        found = run(bundle, budget, budget + (16 << 20), group)
    assert found["digest"] == free["digest"] and not found["told"]
    assert found["counted"] <= budget
    assert found["peak"] - PROGRAM_BYTES <= budget
    assert free["counted"] > 1.5 * budget and free["peak"] > budget + PROGRAM_BYTES


def test_the_limit_is_one(bundle: Path, least: int) -> None:
    """With another budget the run is killed."""
    with memory_group(least + PROGRAM_BYTES) as group:
        if not group:
            pytest.skip("no cgroup can be made here")
        done = start(RUN, bundle, 0, group, 0)
    assert done.returncode == -9


def test_what_cannot_be_had_is_done_without(bundle: Path, free: dict[str, Any], least: int) -> None:
    """A run without a budget where the system refuses memory: it makes do with what there is."""
    found = run(bundle, 0, 3 * least)
    assert found["digest"] == free["digest"]
    assert any("memory ran out" in text for text in found["told"])
    assert found["counted"] < free["counted"] and found["peak"] < free["peak"] - least
