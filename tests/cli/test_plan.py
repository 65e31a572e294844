"""odsora-plan as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import InFolder
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from odsora_compiler.cli.plan import app
from odsora_compiler.planning.from_bundle import bundle_workload
from odsora_compiler.planning.plan import SchedulePlan
from odsora_compiler.planning.profile import find_profile


@pytest.fixture
def odsora_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InFolder:
    """odsora-plan in this process, in an empty folder; asserts that there is no traceback."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> CommandResult:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return call


def test_a_plan_is_printed_and_written_without_running(
    bundle: Path, tmp_path: Path, odsora_plan: InFolder
) -> None:
    result = odsora_plan(
        *(bundle, "--memory-budget", "30kB", "--json", "plan.json", "--timeline", "plan.png")
    )
    assert result.exit_code == 0, result.output
    assert "net.odsora in 30.0 kB on iphone15pro" in result.stdout
    assert "net.base" in result.stdout and "ratio 1.0" in result.stdout
    for lane in ("load", "compute", "stall", "memory"):
        assert any(line.strip().startswith(lane) for line in result.stdout.splitlines())
    plan = SchedulePlan.load(tmp_path / "plan.json")
    plan.check(bundle_workload(bundle, find_profile("iphone15pro")))
    assert plan.budget == 30_000 and 0 < plan.peak_bytes <= 30_000
    assert len(plan.loads) == 4
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_devices_memory_is_the_default_budget(bundle: Path, odsora_plan: InFolder) -> None:
    result = odsora_plan(bundle)
    assert result.exit_code == 0 and "in 3.3 GB" in result.stdout


def test_a_budget_too_small_names_the_least_and_that_works(
    bundle: Path, odsora_plan: InFolder
) -> None:
    refused = odsora_plan(bundle, "--memory-budget", "1kB")
    assert refused.exit_code == 2 and "the memory budget is 1000 bytes" in refused.stderr
    least = refused.stderr.partition("Give at least ")[2].split()[0]
    assert odsora_plan(bundle, "--memory-budget", least).exit_code == 0
    assert odsora_plan(bundle, "--memory-budget", int(least) - 1).exit_code == 2


def test_this_machine_is_measured_with_the_bundles_chunks(
    bundle: Path, tmp_path: Path, odsora_plan: InFolder
) -> None:
    result = odsora_plan(bundle, "--calibrate", "-o", "here.json")
    assert result.exit_code == 0, result.output
    profile = find_profile(str(tmp_path / "here.json"))
    assert "Measured by odsora-plan --calibrate" in profile.source
    assert 1e6 < profile.read_bandwidth < 1e12 and profile.memory > 1e8
    assert set(profile.chunk_seconds) == {f"net-0{i}.base" for i in range(4)}
    assert all(0 < seconds < 10 for seconds in profile.chunk_seconds.values())
    planned = odsora_plan(bundle, "--profile", "here.json", "--memory-budget", "60kB")
    assert planned.exit_code == 0, planned.output
    # fp16 weights are held as fp32 by the interpreter.
    workload = bundle_workload(bundle, profile)
    weights = bundle_workload(bundle, find_profile("iphone15pro")).weight_bytes
    assert workload.weight_bytes == 2 * weights


def test_without_a_bundle_a_profile_goes_to_stdout(odsora_plan: InFolder) -> None:
    result = odsora_plan("--calibrate", "-q")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["compute_rates"]["any"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["BUNDLE", "--profile", "iphone15"], 2, "Did you mean 'iphone15pro'?"),
        (["BUNDLE", "--profile", "none.json"], 2, "none.json: cannot be read"),
        (["BUNDLE", "--memory-budget", "lots"], 2, "is not a size"),
        (["BUNDLE", "--function", "bsae"], 2, "Did you mean 'base'?"),
        (["BUNDLE", "--timeline", "plan.jpeg2"], 2, "nothing can be drawn as '.jpeg2'"),
        (["BUNDLE", "--json", "there/is/none.json"], 2, "no such folder"),
        (["BUNDLE", "-o", "here.json"], 2, "-o is for --calibrate"),
        (["BUNDLE", "--calibrate", "--json", "plan.json"], 2, "makes no plan"),
        ([], 2, "no bundle"),
        (["nothing.odsora"], 2, "nothing.odsora: no such bundle"),
    ],
)
def test_wrong_options_are_named(
    bundle: Path, arguments: list[str], code: int, expected: str, odsora_plan: InFolder
) -> None:
    given = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    result = odsora_plan(*given)
    assert result.exit_code == code, result.output
    assert expected in result.stderr


def test_a_plan_is_not_overwritten_without_force(
    bundle: Path, tmp_path: Path, odsora_plan: InFolder
) -> None:
    (tmp_path / "plan.json").write_text("precious")
    refused = odsora_plan(bundle, "--json", "plan.json")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert odsora_plan(bundle, "--json", "plan.json", "--force").exit_code == 0
