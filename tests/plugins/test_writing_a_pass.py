"""docs/writing-a-pass.md: its code, as it stands there, works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


def blocks() -> dict[str, str]:
    """File name → text, for the fenced blocks that name a file in their first line."""
    text = PAGE.read_text()
    found = re.findall(r"```(?:python|ini|toml)\n# file: (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("# file: "), "a block that names a file was not found"
    return dict(found)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The plugin of the page as an installed distribution: its files and its entry point."""
    for name, content in blocks().items():
        (tmp_path / name).write_text(content)
    # What `pip install -e .` would put beside the module, without asking a registry for setuptools.
    information = tmp_path / "odsora_tanh_gelu-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: odsora-tanh-gelu\nVersion: 0.1.0\n"
    )
    entry_points = re.search(r"\[options\.entry_points\]\n(.*)", blocks()["setup.cfg"], re.DOTALL)
    assert entry_points is not None
    group, *lines = entry_points[1].splitlines()
    text = f"[{group.split('=')[0].strip()}]\n" + "\n".join(line.strip() for line in lines) + "\n"
    (information / "entry_points.txt").write_text(text)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_tests_of_the_page_pass(plugin: Path) -> None:
    result = run(plugin, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_tanh_gelu.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def test_the_commands_of_the_page_work(plugin: Path) -> None:
    commands = re.findall(r"^odsora-compile (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 3
    outputs = [run(plugin, "-m", "odsora_compiler.cli.compile", *line.split()) for line in commands]
    for result in outputs:
        assert result.returncode == 0, result.stderr
    described, printed, compiled = (result.stdout for result in outputs)
    assert "leave alone GELUs" in described and "odsora-tanh-gelu" in described
    assert "approximate=tanh" in printed and "by tanh-gelu" in printed
    assert "model.odsora" in compiled
    assert (plugin / "model.odsora" / "manifest.json").is_file()
