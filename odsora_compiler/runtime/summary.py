"""What a run took, and what it could not have been faster than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from odsora_compiler.planning.bound import lower_bound
from odsora_compiler.planning.profile import DeviceProfile
from odsora_compiler.planning.simulate import Timeline
from odsora_compiler.planning.workload import Chunk, Workload


@dataclass(frozen=True)
class RunSummary:
    """`workload`: what was executed; `budget`: bytes it had; `timeline`: measured. `load_seconds`
    by chunk and `compute_seconds` by "CHUNK.FUNCTION" are means.

    `profile`: of a device that the run is compared with; None takes what the run itself needed for
    each load and each use of a chunk, so that the ratio says what the schedule lost.
    """

    workload: Workload
    budget: int
    timeline: Timeline
    load_seconds: Mapping[str, float]
    compute_seconds: Mapping[str, float]
    profile: DeviceProfile | None = None

    @property
    def seconds(self) -> float:
        """From the beginning of the run to its end."""
        return self.timeline.seconds

    @cached_property
    def bound_seconds(self) -> float:
        """What no schedule of these uses in this budget could beat."""
        budget = max(self.budget, self.workload.least_budget)
        return lower_bound(self.workload, self.profile or self.measured, budget).seconds

    @property
    def ratio(self) -> float:
        """Time over bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    @property
    def peak_bytes(self) -> int:
        """Most bytes of weights and activations at once, as plans count them."""
        return self.timeline.peak_bytes

    @property
    def stall_seconds(self) -> float:
        """How long computing waited for chunks."""
        return self.timeline.total("stall")

    @property
    def measured(self) -> DeviceProfile:
        """A profile of what this run needed for its loads and uses."""
        return _MeasuredProfile(
            "this run",
            "Measured in one run: mean times of loads and uses.",
            self.budget,
            read_bandwidth=float("inf"),
            load_overhead=0.0,
            compute_rates={"any": float("inf")},
            chunk_seconds=self.compute_seconds,
            load_seconds_of=self.load_seconds,
        )


@dataclass(frozen=True)
class _MeasuredProfile(DeviceProfile):
    """That knows every load. `load_seconds_of`: by chunk."""

    load_seconds_of: Mapping[str, float] = field(default_factory=dict)

    def load_seconds(self, chunk: Chunk) -> float:
        return self.load_seconds_of.get(chunk.name, 0.0)
