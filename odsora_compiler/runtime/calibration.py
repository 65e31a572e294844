"""Measuring the machine this runs on: a device profile for the planner.

Reading is measured from a file whose pages were dropped from the cache, computing by the chunks of
a bundle where one is given, else by matrix products.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from odsora_compiler.mil.memory import Buffers
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.runtime.executors import MilExecutor
from odsora_compiler.runtime.storage import Storage

if TYPE_CHECKING:
    from odsora_compiler.ir.manifest import ChunkCall, ComponentEntry
    from odsora_compiler.runtime.bundle import Bundle

_FILE_BYTES = 128 << 20
_BLOCK = 1 << 20
_REPEATS = 3
# The interpreter holds fp16 weights as fp32.
_WEIGHT_EXPANSION = {"fp16": 2.0, "fp32": 1.0}


def calibrate(bundle: Bundle | None, folder: Path, say: Callable[[str], None]) -> DeviceProfile:
    """Measure reading from `folder`'s storage and computing with torch, on this machine.

    With a bundle, every chunk of another structure is run on random inputs; the seconds of each are
    in the profile. Takes a few seconds, or as long as running every distinct chunk some times.
    """
    bandwidth, cold = _read_bandwidth(folder)
    say(f"reading: {bandwidth / 1e9:.2f} GB/s{'' if cold else ' (of cached pages)'}")
    seconds: dict[str, float] = {}
    if bundle is None:
        rate, overhead = _product_rate(), 0.0
        how = "matrix products of 1024x1024 in fp32; overhead of a load not measured"
    else:
        rate, overhead = _run_chunks(bundle, bandwidth, seconds, say)
        how = f"the chunks of {bundle.manifest.name} on random inputs, second run"
    say(f"computing: {rate / 1e9:.1f} GFLOP/s, {overhead * 1e3:.1f} ms a load beside reading")
    threads = torch.get_num_threads()
    return DeviceProfile(
        platform.node() or "this machine",
        f"Measured by odsora-plan --calibrate on {time.strftime('%Y-%m-%d')}, "
        f"{platform.machine()}, torch {torch.__version__} with {threads} threads. read_bandwidth: "
        f"preadv of {_FILE_BYTES >> 20} MB in blocks of 1 MB "
        f"{'after dropping cached pages' if cold else 'which may have been cached'}, and fp16 to "
        f"fp32; median of {_REPEATS}. compute_rates: {how}. memory: available when measured. "
        "Expansions: of the interpreter of packages (--executor mil).",
        _available_memory(),
        bandwidth,
        overhead,
        {"any": rate},
        0.0,
        seconds,
        _WEIGHT_EXPANSION,
        MilExecutor.activation_expansion,
    )


def drop_cached_pages(file: int) -> bool:
    """Let the system forget what it has read of an open, written-back file; False if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read_bandwidth(folder: Path) -> tuple[float, bool]:
    half = torch.zeros(_FILE_BYTES // 2, dtype=torch.float16)
    full = torch.zeros(_FILE_BYTES // 2, dtype=torch.float32)
    buffer = memoryview(half.numpy().view("uint8").data)
    found = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".calibrate-") as stream:
        for start in range(0, _FILE_BYTES, _BLOCK):
            stream.write(os.urandom(_BLOCK) if start == 0 else buffer[start : start + _BLOCK])
        stream.flush()
        os.fsync(stream.fileno())
        for _ in range(_REPEATS):
            cold = drop_cached_pages(stream.fileno())
            begin = time.perf_counter()
            for start in range(0, _FILE_BYTES, _BLOCK):
                os.preadv(stream.fileno(), [buffer[start : start + _BLOCK]], start)
            full.copy_(half)
            found.append(_FILE_BYTES / (time.perf_counter() - begin))
    return statistics.median(found), cold


def _product_rate() -> float:
    size = 1024
    left, right = torch.rand(size, size), torch.rand(size, size)
    return 2 * size**3 / statistics.median(_time(lambda: left @ right) for _ in range(9))


def _run_chunks(
    bundle: Bundle, bandwidth: float, seconds: dict[str, float], say: Callable[[str], None]
) -> tuple[float, float]:
    """FLOP a second over all that was run, and seconds of a load beside reading."""
    flops, spent = 0, 0.0
    overheads: list[float] = []
    for name, component in bundle.manifest.components.items():
        for structure, calls in _by_structure(component).items():
            chunk = calls[0][1]
            path = bundle.package_path(name, chunk.package)
            size = component.packages[chunk.package].weight_bytes
            with torch.no_grad():
                loading, times = _time_chunk(path, calls[0][0], chunk)
            overheads.append(max(loading - size / bandwidth, 0.0))
            typical = statistics.median(times)
            flops, spent = flops + chunk.flops, spent + typical
            seconds.update({f"{call.package}.{function}": typical for function, call in calls})
            say(f"{chunk.package}.{structure[0]}: {typical * 1e3:.1f} ms, for {len(calls)} like it")
    return flops / spent, statistics.median(overheads)


def _by_structure(
    component: ComponentEntry,
) -> Mapping[tuple[str, str], list[tuple[str, ChunkCall]]]:
    found: dict[tuple[str, str], list[tuple[str, ChunkCall]]] = {}
    for function, entry in component.functions.items():
        for call in entry.chunks:
            key = function, component.packages[call.package].structure
            found.setdefault(key, []).append((function, call))
    return found


def _time_chunk(path: Path, function: str, chunk: ChunkCall) -> tuple[float, list[float]]:
    """Seconds of a load, and of runs."""
    inputs = {
        item.name: torch.randn(item.shape).to(item.torch_dtype)
        if item.torch_dtype.is_floating_point
        else torch.ones(item.shape, dtype=item.torch_dtype)
        for item in chunk.inputs
    }
    package = MilExecutor().open(path)
    try:
        loading = _time(lambda: package.load([function], Storage(), Buffers(), lambda: False))
        package.run(function, inputs)
        times = [_time(lambda: package.run(function, inputs)) for _ in range(_REPEATS)]
    finally:
        package.release()
    return loading, times


def _time(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _available_memory() -> int:
    """Bytes a process could have now; all there are where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
