"""The workload of a bundle: which chunks its host uses in which order, and what they take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from odsora_compiler.ir.host_program import HostProgram, Operation, operator_results
from odsora_compiler.ir.inference import FAKE_MODE, fake_tensor, tensor_bytes
from odsora_compiler.ir.manifest import (
    CONSTANTS_NAME,
    ComponentEntry,
    FunctionEntry,
    Manifest,
)
from odsora_compiler.ir.weights import FileWeights, WeightStore
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Chunk, Use, Workload

# A call and most bytes the host held since the one before; None after the last one.
HeldCall = tuple[Operation | None, int]


def bundle_workload(folder: Path, profile: DeviceProfile, function: str | None = None) -> Workload:
    """What running the bundle in `folder` takes on a device: all its calls, early exits not taken.

    `function`: what to call instead of the function the host names, of components that have it.
    Raises `PackageError` where the bundle cannot be used, `UsageError` where none is there or none
    has the function.
    """
    manifest = Manifest.load(folder)
    manifest.check_function(function)
    host = HostProgram.from_data(manifest.host)
    calls = host_calls(host, manifest.components, FileWeights(folder / CONSTANTS_NAME))
    return entries_workload(manifest.components, calls, manifest.precision, profile, function)


def entries_workload(
    components: Mapping[str, ComponentEntry],
    calls: Sequence[HeldCall],
    precision: str,
    profile: DeviceProfile,
    function: str | None = None,
) -> Workload:
    """The workload of components as a manifest has them, called as `host_calls` says."""
    expansion = profile.weight_expansion.get(precision, 1.0)
    chunks: list[Chunk] = []
    index: dict[tuple[str, str], int] = {}
    for component, entry in components.items():
        for name, package in entry.packages.items():
            index[component, name] = len(chunks)
            chunks.append(
                Chunk(
                    name,
                    component,
                    sum(size for size, _ in package.files.values()),
                    math.ceil(package.weight_bytes * expansion),
                    entry.compute_units,
                )
            )
    uses: list[Use] = []
    for number, (call, held) in enumerate(calls):
        if call is None:
            uses[-1] = _with_held(uses[-1], held, profile)
            continue
        owner = components[call["component"]]
        name = owner.called(call["function"], function)
        entry_of = owner.function(name)
        for chunk, (inside, peak) in zip(entry_of.chunks, _chunk_bytes(entry_of), strict=True):
            uses.append(
                Use(
                    index[call["component"], chunk.package],
                    name,
                    number,
                    chunk.flops,
                    math.ceil((held + peak) * profile.activation_expansion),
                    math.ceil((held + inside) * profile.activation_expansion),
                )
            )
    return Workload(tuple(chunks), tuple(uses))


def host_calls(
    host: HostProgram, components: Mapping[str, ComponentEntry], constants: WeightStore
) -> list[HeldCall]:
    """Calls in order, each with most bytes the host held since the one before; at last, None.

    Values are computed in shape only; exits are not taken, so that this is the longest way. How
    `components` are cut makes no difference.
    """
    calls: list[HeldCall] = []
    values = {value: fake_tensor(spec.shape, spec.dtype) for spec, value in host.inputs}
    most = 0
    for item in host.operations:
        do = item["do"]
        if do == "call":
            most = max(most, sum(map(tensor_bytes, values.values())))
            calls.append((item, most))
            most = 0
            called = components[item["component"]].function(item["function"])
            made = {spec.name: fake_tensor(spec.shape, spec.torch_dtype) for spec in called.outputs}
            values.update({value: made[name] for name, value in item["outputs"].items()})
        elif do == "merge":
            values[item["out"]] = values[item["default"]]
        elif do == "constant":
            spec = constants.spec(item["name"])
            values[item["out"]] = fake_tensor(tuple(spec.shape), spec.dtype)
        elif do == "random":
            values[item["out"]] = fake_tensor(tuple(item["shape"]), getattr(torch, item["dtype"]))
        elif do != "exit":
            with FAKE_MODE:
                values.update(operator_results(item, values))
        most = max(most, sum(map(tensor_bytes, values.values())))
        for name in item.get("free", ()):
            values.pop(name, None)
    return [*calls, (None, most)]


def _with_held(use: Use, held: int, profile: DeviceProfile) -> Use:
    """A use after which the host holds `held` bytes, with nothing else to follow."""
    most = max(use.activation_bytes, math.ceil(held * profile.activation_expansion))
    return Use(use.chunk, use.function, use.call, use.flops, most, use.boundary_bytes)


def _chunk_bytes(entry: FunctionEntry) -> Iterator[tuple[int, int]]:
    """Per chunk: bytes of values of earlier chunks before it, and most bytes while it runs.

    The function's own inputs are the caller's; a chunk that takes them may make copies.
    """
    last_read = {item.name: n for n, call in enumerate(entry.chunks) for item in call.inputs}
    last_read |= dict.fromkeys(entry.results.values(), len(entry.chunks))
    held: dict[str, int] = {}
    for number, call in enumerate(entry.chunks):
        own = {item.name for item in call.inputs}
        passing = sum(size for name, size in held.items() if name not in own)
        most = passing + max(
            call.activation_bytes, sum(item.bytes for item in (*call.inputs, *call.outputs))
        )
        before = sum(held.values())
        held |= {item.name: item.bytes for item in call.outputs}
        if number == len(entry.chunks) - 1:
            # Outputs may be converted while the values they are made of are still there.
            most = max(most, sum(held.values()) + sum(item.bytes for item in entry.outputs))
        yield before, max(most, before)
        held = {name: size for name, size in held.items() if last_read.get(name, -1) > number}
