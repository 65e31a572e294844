"""Workloads and devices for tests."""

from __future__ import annotations

import random
from dataclasses import replace

from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Chunk, Use, Workload

SIZE = 100  # bytes of a chunk of the even workload
FLOPS = 1000  # of a use of it


def even(chunks: int, calls: int, activation: int = 0) -> Workload:
    """`calls` calls of a network of equal chunks."""
    made = tuple(Chunk(f"net-{i:02d}", "net", SIZE, SIZE) for i in range(chunks))
    return Workload(
        made,
        tuple(
            Use(chunk, "base", call, FLOPS, activation)
            for call in range(calls)
            for chunk in range(chunks)
        ),
    )


def cut_finer(workload: Workload, parts: int) -> Workload:
    """The same, every chunk cut into so many."""
    chunks = tuple(
        Chunk(f"{c.name}.{part}", c.component, c.read_bytes // parts, c.resident_bytes // parts)
        for c in workload.chunks
        for part in range(parts)
    )
    uses = tuple(
        replace(use, chunk=use.chunk * parts + part, flops=use.flops // parts)
        for use in workload.uses
        for part in range(parts)
    )
    return Workload(chunks, uses)


def device(load_over_compute: float = 1.0, overhead: float = 0.0) -> DeviceProfile:
    """On which a use of `even` takes a second and a load `load_over_compute` of it."""
    rates = {"any": float(FLOPS)}
    return DeviceProfile("test", "made up", 10**6, SIZE / load_over_compute, overhead, rates)


def pipeline(seed: int, largest: int = 60) -> Workload:
    """Networks called one after another or in turns, with uneven chunks and two functions."""
    draw = random.Random(seed)
    chunks: list[Chunk] = []
    uses: list[Use] = []
    networks: list[list[int]] = []
    for number in range(draw.randint(1, 3)):
        first = len(chunks)
        for _ in range(draw.randint(1, 6)):
            size = draw.randint(0, largest)
            chunks.append(Chunk(f"c{len(chunks)}", f"n{number}", draw.randint(1, 50), size))
        networks.append(list(range(first, len(chunks))))
    calls = [network for network in networks for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.4:
        draw.shuffle(calls)
    cost = {(c, f): draw.randint(1, 3000) for c in range(len(chunks)) for f in ("base", "tdtm")}
    for call, network in enumerate(calls):
        function = draw.choice(("base", "tdtm"))
        for chunk in network:
            activation = draw.randint(0, largest)
            boundary = draw.randint(0, activation)
            uses.append(Use(chunk, function, call, cost[chunk, function], activation, boundary))
    return Workload(tuple(chunks), tuple(uses))
