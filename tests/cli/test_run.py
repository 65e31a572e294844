"""odsora-run as a user meets it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODEL, InFolder, run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from odsora_compiler.cli.plan import app as plan_app
from odsora_compiler.runtime.runner import Runner


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {"x": torch.randn(2, 6, 32), "shift": torch.randn(32)}


def eager(given: dict[str, torch.Tensor]) -> torch.Tensor:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    spec = namespace["build"]()  # type: ignore[operator]
    with torch.no_grad():
        return spec.module.eval()(**given)["y"]


def test_outputs_are_those_of_the_model(bundle: Path, tmp_path: Path) -> None:
    save_file(inputs(), tmp_path / "in.safetensors")
    result = run("run", bundle, "--inputs", "in.safetensors", "-o", "out.safetensors", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found, expected = load_file(tmp_path / "out.safetensors")["y"], eager(inputs())
    assert found.dtype == torch.float32
    assert (
        torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9999
    )
    assert (found - expected).abs().max() < 1e-2


def test_the_signature_is_printed_without_inputs(bundle: Path, odsora_run: InFolder) -> None:
    result = odsora_run(bundle)
    assert "x: float32[2, 6, 32]" in result.stdout and "net.base" in result.stdout


def test_the_example_is_compared_with_pytorch(bundle: Path, odsora_run: InFolder) -> None:
    result = odsora_run(bundle, "--example")
    assert result.exit_code == 0 and "against PyTorch: relative" in result.stdout


def test_a_budget_is_kept_and_traced(bundle: Path, tmp_path: Path, odsora_run: InFolder) -> None:
    save_file(inputs(), tmp_path / "in.safetensors")
    result = odsora_run(
        *(bundle, "--inputs", "in.safetensors", "-o", "out.safetensors"),
        *("--memory-budget", "40kB", "--trace", "trace.json"),
    )
    assert result.exit_code == 0, result.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    counters = [sum(event["args"].values()) for event in events if event["ph"] == "C"]
    assert 0 < max(counters) <= 40_000
    lanes = [event["cat"] for event in events if event["ph"] == "X"]
    assert lanes.count("compute") == 4 and lanes.count("load") == 4 and lanes.count("evict") == 4
    unlimited = odsora_run(bundle, "--inputs", "in.safetensors", "-o", "all.safetensors")
    assert unlimited.exit_code == 0
    both = [load_file(tmp_path / name)["y"] for name in ("out.safetensors", "all.safetensors")]
    assert torch.equal(*both)


def test_a_run_is_measured_drawn_and_compared(
    bundle: Path, tmp_path: Path, odsora_run: InFolder
) -> None:
    result = odsora_run(bundle, "--example", "--timeline", "run.png")
    assert result.exit_code == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"net 1 of 1 calls; time [\d.]+ s, bound [\d.]+ s \(by this run's own loads and chunks\), "
        r"ratio [\d.]+, peak memory [\d.]+ kB, stalls [\d.]+ s",
        last,
    )
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    result = odsora_run(bundle, "--example", "--profile", "iphone15pro")
    assert "(by 'iphone15pro')" in result.stdout


def test_a_plan_of_odsora_plan_is_followed(
    bundle: Path, tmp_path: Path, odsora_run: InFolder
) -> None:
    def plan(*options: str) -> None:
        made = CliRunner().invoke(plan_app, [str(bundle), "--json", "plan.json", *options])
        assert made.exit_code == 0, made.output

    plan("--memory-budget", "60kB", "--executor", "mil")
    result = odsora_run(bundle, "--example", "--plan", "plan.json")
    assert result.exit_code == 0, result.stderr
    peak = float(result.stdout.split("peak memory ")[1].split(" kB")[0])
    assert peak <= 60
    refused = odsora_run(bundle, "--example", "--plan", "plan.json", "--memory-budget", "1GB")
    assert refused.exit_code == 2 and "a plan has a budget of its own" in refused.stderr
    # By the bytes of a phone, which holds half-precision weights as they are.
    plan("--memory-budget", "25kB", "--force")
    refused = odsora_run(bundle, "--example", "--plan", "plan.json")
    assert refused.exit_code == 1 and "odsora-plan --executor" in refused.stderr
    (tmp_path / "plan.json").write_text("{}")
    assert odsora_run(bundle, "--example", "--plan", "plan.json").exit_code == 1


def changed(bundle: Path, folder: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(bundle, folder / "copy.odsora"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("missing chunk", "is incomplete"),
        ("flipped byte", "checksum"),
        ("truncated", "truncated"),
        ("newer schema", "schema version 99"),
        ("no manifest", "not a bundle"),
        ("broken manifest", "not valid JSON"),
        ("outside", "outside"),
        ("component", "a component cannot be called '../net'"),
    ],
)
def test_damaged_bundles_are_refused(
    bundle: Path, tmp_path: Path, change: str, expected: str, odsora_run: InFolder
) -> None:
    copy = changed(bundle, tmp_path)
    manifest = copy / "manifest.json"
    data = json.loads(manifest.read_text())
    package = data["components"]["net"]["packages"]["net-02"]
    weights = next((copy / package["path"]).rglob("weight.bin"))
    if change == "missing chunk":
        shutil.rmtree(copy / package["path"])
    elif change == "flipped byte":
        content = bytearray(weights.read_bytes())
        content[130] ^= 1  # in the values of the first weight
        weights.write_bytes(content)
    elif change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "newer schema":
        manifest.write_text(json.dumps({**data, "schema": 99}))
    elif change == "no manifest":
        manifest.unlink()
    elif change == "broken manifest":
        manifest.write_text(manifest.read_text()[:-50])
    elif change == "component":
        data["components"]["../net"] = data["components"].pop("net")
        manifest.write_text(json.dumps(data))
    elif change == "outside":
        package["path"] = "../../etc"
        manifest.write_text(json.dumps(data))
    save_file(inputs(), tmp_path / "in.safetensors")
    result = odsora_run(copy, "--inputs", "in.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 1
    assert expected in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"x": torch.zeros(2, 6, 32)}, "missing input shift"),
        ({**inputs(), "extra": torch.zeros(1)}, "unknown input extra"),
        ({**inputs(), "x": torch.zeros(2, 7, 32)}, "Expected x: float32[2, 6, 32]"),
        ({**inputs(), "x": torch.zeros(2, 6, 32, dtype=torch.float64)}, "float64"),
    ],
)
def test_wrong_inputs_are_named(
    bundle: Path,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    expected: str,
    odsora_run: InFolder,
) -> None:
    save_file(tensors, tmp_path / "in.safetensors")
    result = odsora_run(bundle, "--inputs", "in.safetensors")
    assert result.exit_code == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--function", "bsae"], 2, "Did you mean 'base'?"),
        (["--memory-budget", "1kB"], 2, "the memory budget is 1000 bytes; chunk 'net-"),
        (["--memory-budget", "lots"], 2, "is not a size"),
        (["--executor", "tpu"], 2, "there is no executor 'tpu'"),
        (["--profile", "iphone15"], 2, "Did you mean 'iphone15pro'?"),
        (["--timeline", "run.bmp"], 2, "nothing can be drawn as '.bmp'"),
        (["--timeline", "t.png", "--trace", "t.png"], 2, "--trace and --timeline both name t.png"),
        (["--plan", "none.json"], 1, "none.json: not a plan"),
        (["--executor", "coreml"], 1, "needs macOS"),
        (["-o", "there/is/none.safetensors"], 2, "no such folder"),
        (["-o", ".", "--force"], 2, "is a folder"),
        (["--trace", "there/is/none.json"], 2, "no such folder"),
        (["--trace", "."], 2, "is a folder"),
    ],
)
def test_wrong_options_are_named(
    bundle: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    expected: str,
    odsora_run: InFolder,
) -> None:
    save_file(inputs(), tmp_path / "in.safetensors")
    result = odsora_run(bundle, "--inputs", "in.safetensors", *arguments)
    assert result.exit_code == code, result.stderr
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nothing.odsora"], "nothing.odsora: no such bundle"),
        (["file.odsora", "--example"], "file.odsora: not a bundle but a file"),
        (["b" * 300, "--example"], "b: File name too long"),
        (["BUNDLE", "--inputs", "none.safetensors"], "none.safetensors: no such file"),
        (["BUNDLE", "--inputs", "i" * 300], "i: File name too long"),
        (["BUNDLE", "--example", "-o", "o" * 300 + ".safetensors"], "File name too long"),
        (["BUNDLE", "--example", "--trace", "t" * 300], "File name too long"),
        (["BUNDLE", "--trace", "trace.json"], "nothing to compute for trace.json"),
    ],
)
def test_paths_that_cannot_be_are_named(
    bundle: Path, tmp_path: Path, arguments: list[str], expected: str, odsora_run: InFolder
) -> None:
    (tmp_path / "file.odsora").write_text("")
    given = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    result = odsora_run(*given)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file.odsora"]


def test_what_a_terminal_cannot_show_is_no_error(bundle: Path, tmp_path: Path) -> None:
    arguments = (bundle, "--example", "-o", "é.safetensors")
    done = run("run", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert "wrote \\xe9.safetensors" in done.stdout
    assert (tmp_path / "é.safetensors").is_file()


def test_an_output_is_not_overwritten_without_force(
    bundle: Path, tmp_path: Path, odsora_run: InFolder
) -> None:
    (tmp_path / "out.safetensors").write_text("precious")
    result = odsora_run(bundle, "--example", "-o", "out.safetensors")
    assert result.exit_code == 2 and "--force" in result.stderr
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_a_trace_replaces_nothing_without_force(
    bundle: Path, tmp_path: Path, odsora_run: InFolder
) -> None:
    (tmp_path / "trace.json").write_text("precious")
    result = odsora_run(bundle, "--example", "--trace", "trace.json")
    assert result.exit_code == 2 and "trace.json exists" in result.stderr
    assert (tmp_path / "trace.json").read_text() == "precious"
    assert odsora_run(bundle, "--example", "--trace", "trace.json", "--force").exit_code == 0
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_run_says_what_is_there(
    bundle: Path,
    tmp_path: Path,
    odsora_run: InFolder,
    monkeypatch: pytest.MonkeyPatch,
    there: bool,
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    keep = tmp_path / "keep.safetensors"
    if there:
        keep.write_text("precious")
    result = odsora_run(bundle, "--example", "-o", "keep.safetensors", "--force")
    said = "keep.safetensors was not changed" if there else "nothing was left at keep.safetensors"
    assert result.exit_code == 1 and f"interrupted; {said}" in result.stderr
    assert keep.exists() == there and (not there or keep.read_text() == "precious")


RETURNS_TWICE = """
import torch
import odsora_compiler as odsora


class Net(torch.nn.Module):
    def forward(self, x, count):
        y = x * 2
        return {"a": y, "b": y, "part": y[:1], "mean": y.mean(), "x": x, "more": count + 1}


def build():
    return odsora.ModelSpec(Net(), {"x": torch.randn(3, 4), "count": torch.tensor([4, 5])})
"""


def test_outputs_may_be_one_tensor_or_one_number_and_integers_must_fit(
    tmp_path: Path, odsora_run: InFolder
) -> None:
    (tmp_path / "twice.py").write_text(RETURNS_TWICE)
    made = run("compile", "twice.py", "-q", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = odsora_run("twice.odsora", "--example", "-o", "out.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "nan" not in result.stdout and "Warning" not in result.stderr
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["a"], found["b"]) and torch.equal(found["a"][:1], found["part"])
    assert found["mean"].shape == () and found["more"].tolist() == [5, 6]
    # Core ML has int32: another number must not be computed with instead.
    large = {"x": torch.zeros(3, 4), "count": torch.tensor([4, 2**32 + 5])}
    save_file(large, tmp_path / "large.safetensors")
    refused = odsora_run("twice.odsora", "--inputs", "large.safetensors")
    assert refused.exit_code == 1 and "'count' has integers from 4" in refused.stderr
