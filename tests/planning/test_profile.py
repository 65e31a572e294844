"""Device profiles: what they compute, where they come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from odsora_compiler.errors import UsageError
from odsora_compiler.planning.profile import DeviceProfile, find_profile, profile_names
from odsora_compiler.planning.workload import Chunk, Use

GOOD = {
    "name": "board",
    "source": "made up",
    "memory": 1000,
    "read_bandwidth": 100.0,
    "load_overhead": 0.5,
    "compute_rates": {"any": 10.0, "cpu_only": 2.0},
    "call_overhead": 0.25,
    "chunk_seconds": {"c.tdtm": 7.0},
}


def test_seconds() -> None:
    profile = DeviceProfile.from_data(GOOD, "board.json")
    gpu, cpu = Chunk("c", "n", 200, 400), Chunk("d", "n", 200, 400, "cpu_only")
    assert profile.load_seconds(gpu) == 2.5
    assert profile.compute_seconds(Use(0, "base", 0, 40, 0), gpu) == 4.25
    assert profile.compute_seconds(Use(0, "tdtm", 0, 40, 0), gpu) == 7
    assert profile.compute_seconds(Use(0, "tdtm", 0, 40, 0), cpu) == 20.25


def test_compute_units_without_a_rate_are_named() -> None:
    profile = DeviceProfile.from_data({**GOOD, "compute_rates": {"cpu_only": 2}}, "board.json")
    with pytest.raises(UsageError, match="no rate for the compute units 'cpu_and_gpu'"):
        profile.compute_seconds(Use(0, "base", 0, 40, 0), Chunk("c", "n", 1, 1))


@pytest.mark.parametrize("name", profile_names())
def test_profiles_that_come_with_it_state_their_source(name: str) -> None:
    profile = find_profile(name)
    assert profile.name == name
    assert any(word in profile.source for word in ("arXiv", "Measured", "Assumed, not measured"))
    assert "assumed" in profile.source, "says what was not measured"


def test_the_phone_of_the_paper() -> None:
    """Its published times come out of the profile, as far as its source says they do."""
    phone = find_profile("iphone15pro")
    assert phone.memory == 3_300_000_000
    encoder = Chunk("t5", "text_encoder", 18_000_000_000, 0, "cpu_only")
    assert phone.load_seconds(encoder) == pytest.approx(27, rel=0.1)
    denoiser = Chunk("stdit", "denoiser", 4_500_000_000, 0)
    assert phone.load_seconds(denoiser) == pytest.approx(6, rel=0.1)
    steps = phone.compute_seconds(Use(0, "base", 0, 30 * 12_755_917_907_291, 0), denoiser)
    assert steps == pytest.approx(566.8, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read_bandwith": 1}, "Did you mean 'read_bandwidth'"),
        ({"memory": 0}, "'memory' must be a number, more than 0"),
        ({"read_bandwidth": "fast"}, "'read_bandwidth' must be a number"),
        ({"load_overhead": -1}, "'load_overhead' must be a number, 0 or more"),
        ({"compute_rates": {}}, "compute_rates is empty"),
        ({"compute_rates": {"any": True}}, "compute_rates.any"),
        ({"chunk_seconds": 3}, "'chunk_seconds' must be an object"),
        ({"source": ""}, "'source' must be a text"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UsageError, match=message):
        find_profile(str(path))


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    path.write_text(json.dumps({key: GOOD[key] for key in GOOD if key != "memory"}))
    with pytest.raises(UsageError, match="'memory' is missing"):
        find_profile(str(path))
    path.write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        find_profile(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        find_profile(str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="Did you mean 'iphone15pro'"):
        find_profile("iphone15")
