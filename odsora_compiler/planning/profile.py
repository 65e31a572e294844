"""What is known of a device: how fast it reads and computes, and what a program may hold there.

Profiles are JSON files with these fields; those of `profiles/` beside this file go by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from odsora_compiler.errors import UsageError, nearest
from odsora_compiler.planning.workload import Chunk, Use

_FOLDER = Path(__file__).parent / "profiles"
_ANY = "any"


@dataclass(frozen=True)
class DeviceProfile:
    """A device, and the executor that runs there.

    `read_bandwidth`: bytes of a package read and made ready a second. `load_overhead`: seconds a
    load takes besides. `compute_rates`: FLOP a second by a component's compute units ("cpu_only",
    …; "any" for those not named). `call_overhead`: seconds a use takes besides. `memory`: bytes a
    program can have. `chunk_seconds`: "CHUNK.FUNCTION" → seconds of one use, where measured, which
    then counts and not the rate. `weight_expansion`: bytes of memory a byte of weights takes once
    loaded, by precision; `activation_expansion` the same of activations. `source`: where the
    numbers are from, and what was assumed.
    """

    name: str
    source: str
    memory: int
    read_bandwidth: float
    load_overhead: float
    compute_rates: Mapping[str, float]
    call_overhead: float = 0.0
    chunk_seconds: Mapping[str, float] = field(default_factory=dict)
    weight_expansion: Mapping[str, float] = field(default_factory=dict)
    activation_expansion: float = 1.0

    def load_seconds(self, chunk: Chunk) -> float:
        """Seconds of one load."""
        return self.load_overhead + chunk.read_bytes / self.read_bandwidth

    def compute_seconds(self, use: Use, chunk: Chunk) -> float:
        """Seconds of one use. Raises `UsageError` where no rate for its compute units is known."""
        measured = self.chunk_seconds.get(f"{chunk.name}.{use.function}")
        if measured is not None:
            return measured
        rate = self.compute_rate(chunk.compute_units, chunk.component)
        return self.call_overhead + use.flops / rate

    def compute_rate(self, compute_units: str, component: str) -> float:
        """FLOP a second; raises `UsageError` naming `component` where no rate is known."""
        rate = self.compute_rates.get(compute_units, self.compute_rates.get(_ANY))
        if rate is None:
            raise UsageError(
                f"profile '{self.name}' has no rate for the compute units '{compute_units}' "
                f"of component '{component}'",
                f"Add it to compute_rates, or a rate for '{_ANY}'.",
            )
        return rate

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any, where: str) -> DeviceProfile:
        """The inverse of `to_data`. Raises `UsageError`, naming `where` and the field."""
        if not isinstance(data, dict):
            raise UsageError(f"{where}: a profile is a JSON object")
        known = {item.name for item in fields(cls)}
        needed = set(known) - {
            "call_overhead",
            "chunk_seconds",
            "weight_expansion",
            "activation_expansion",
        }
        for key in data:
            if key not in known:
                raise UsageError(f"{where}: unknown field '{key}'", nearest(key, known))
        missing = sorted(needed - data.keys())
        if missing:
            raise UsageError(f"{where}: field '{missing[0]}' is missing", "See odsora-plan --help.")
        profile = cls(**data)
        profile._check(where)
        return profile

    def _check(self, where: str) -> None:
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UsageError(f"{where}: field '{name}' must be a text")
        positive = {"memory": self.memory, "read_bandwidth": self.read_bandwidth}
        positive["activation_expansion"] = self.activation_expansion
        nonnegative: dict[str, Any] = {
            "load_overhead": self.load_overhead,
            "call_overhead": self.call_overhead,
        }
        for key in ("compute_rates", "weight_expansion", "chunk_seconds"):
            table = getattr(self, key)
            if not isinstance(table, Mapping):
                raise UsageError(f"{where}: field '{key}' must be an object of numbers")
            target = nonnegative if key == "chunk_seconds" else positive
            target.update({f"{key}.{name}": value for name, value in table.items()})
        for name, value in {**positive, **nonnegative}.items():
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not right or not (value > 0 or (value == 0 and name in nonnegative)):
                least = "0 or more" if name in nonnegative else "more than 0"
                raise UsageError(f"{where}: field '{name}' must be a number, {least}")
        if not self.compute_rates:
            raise UsageError(f"{where}: compute_rates is empty", f"Give a rate for '{_ANY}'.")


def profile_names() -> list[str]:
    """The profiles that go by name."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def find_profile(name: str) -> DeviceProfile:
    """The profile of that name, or of the file of that path; raises `UsageError`."""
    if name in profile_names():
        path = _FOLDER / f"{name}.json"
    elif name.endswith(".json") or "/" in name:
        path = Path(name)
    else:
        raise UsageError(
            f"there is no profile '{name}'",
            f"{nearest(name, profile_names())} Or give the path of a profile's .json.",
        )
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    return DeviceProfile.from_data(data, str(path))
