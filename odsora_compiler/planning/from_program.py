"""The workload of a program that is not lowered yet, in whichever way its components are cut."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host_program import HostProgram
from odsora_compiler.ir.manifest import ComponentEntry, Feature, FunctionEntry
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.weights import TensorWeights
from odsora_compiler.planning.from_bundle import HeldCall, entries_workload, host_calls
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.workload import Workload


class ProgramWorkloads:
    """Workloads of `program`, lowered to `precision`, on a device."""

    def __init__(self, program: Program, precision: str, profile: DeviceProfile) -> None:
        self._program = program
        self._precision = precision
        self._profile = profile

    def workload(self, entries: Mapping[str, ComponentEntry]) -> Workload:
        """All calls of the host, early exits not taken.

        `entries`: for every component that is called, what the manifest will say of it.
        """
        return entries_workload(entries, self._calls, self._precision, self._profile)

    def groups(self) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
        """Components that take turns, with the numbers of their calls; most are alone.

        Chunks of different groups are never needed in memory at the same time.
        """
        last = {call["component"]: number for number, (call, _) in enumerate(self._calls) if call}
        groups: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        names: dict[str, None] = {}
        numbers: list[int] = []
        for number, (call, _) in enumerate(self._calls):
            if call is None:
                continue
            names[call["component"]] = None
            numbers.append(number)
            if max(last[name] for name in names) == number:
                groups.append((tuple(names), tuple(numbers)))
                names, numbers = {}, []
        return groups

    @cached_property
    def _calls(self) -> list[HeldCall]:
        program = self._program
        signatures = {
            name: ComponentEntry(
                {key: _signature(function) for key, function in component.functions.items()}, {}
            )
            for name, component in program.components.items()
        }
        host = HostProgram.of(program.host)
        return host_calls(host, signatures, TensorWeights(program.constants))


def _signature(function: Function) -> FunctionEntry:
    inputs, outputs = (
        tuple(map(Feature.of, specs)) for specs in (function.inputs, function.outputs)
    )
    return FunctionEntry(inputs, outputs, (), {})
