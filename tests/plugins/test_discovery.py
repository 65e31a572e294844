"""Plugins are found through real entry points of real distributions: folders with a .dist-info."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odsora_compiler.errors import PluginError, UsageError
from odsora_compiler.plugins import load_registry

Install = Callable[..., None]

PASS = """
from dataclasses import dataclass
from typing import ClassVar
from odsora_compiler.pipeline.base import Pass
from odsora_compiler.plugins import hookimpl

@dataclass(frozen=True)
class Made(Pass):
    \"\"\"A pass of a plugin.\"\"\"
    name: ClassVar[str] = "{name}"

    def run(self, program, context):
        pass

@hookimpl
def odsora_passes():
    return [Made]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module, whose entry point is named like the module."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    installed: list[str] = []

    def install(distribution: str, module: str, code: str) -> None:
        installed.append(module)
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        with open(info / "entry_points.txt", "a") as file:
            file.write(f"[odsora.plugins]\n{module} = {module}\n")

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def told() -> list[str]:
    return []


def test_passes_of_the_project_are_found(told: list[str]) -> None:
    registry = load_registry(report=told.append)
    assert registry["cidl"].distribution == registry["tdtm"].distribution == "odsora-compiler"
    assert registry["palettize"].distribution == "odsora-palettize"
    assert list(registry) == sorted(registry)
    assert told == []


def test_a_distribution_adds_its_pass(install: Install, told: list[str]) -> None:
    install("good-plugin", "good_plugin", PASS.format(name="good"))
    registry = load_registry(report=told.append)
    assert registry["good"].distribution == "good-plugin"
    assert registry.find("good").name == "good"
    assert told == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: .*no_such_module_at_all"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (
            PASS.format(name="bad") + "\n@hookimpl\ndef odsora_no_such_hook():\n    pass\n",
            "odsora_no_such_hook",
        ),
        (
            PASS.format(name="bad").replace("odsora_passes()", "odsora_passes(x)"),
            "can not be found in the hookspec",
        ),
        (PASS.format(name="bad").replace("return [Made]", "return [Made, 1 / 0]"), "ZeroDivision"),
        (PASS.format(name="bad").replace("return [Made]", "return 3"), "TypeError"),
        (PASS.format(name="bad").replace("return [Made]", "raise SystemExit(1)"), "SystemExit"),
        (PASS.format(name="bad").replace("return [Made]", "return [Made()]"), "no pass class"),
        (PASS.format(name="bad").replace("return [Made]", "return [int]"), "no pass class"),
        (PASS.format(name="two words"), "no usable name: 'two words'"),
        (
            PASS.format(name="bad").replace("    name: ClassVar", "    nom: ClassVar"),
            "no usable name",
        ),
        (PASS.format(name="bad").replace("(frozen=True)", ""), r"no @dataclass\(frozen=True\)"),
        (
            PASS.format(name="bad")
            .replace("@dataclass(frozen=True)", "from odsora_compiler.pipeline.base import option")
            .replace("    def run", "    level: int = option(1, 'how much')\n\n    def run"),
            r"no @dataclass\(frozen=True\)",
        ),
    ],
    ids=lambda value: None if "\n" in value else value,
)
def test_a_plugin_that_fails_is_reported_and_the_others_load(
    install: Install, told: list[str], code: str, reason: str
) -> None:
    install("a-first", "a_first_plugin", PASS.format(name="first"))
    install("b-bad", "b_bad_plugin", code)
    install("c-last", "c_last_plugin", PASS.format(name="last"))
    registry = load_registry(report=told.append)
    assert {"first", "last", "cidl"} <= set(registry)
    assert "bad" not in registry
    (line,) = told
    assert registry.skipped == (line,)
    assert re.search(f"(?s)b_bad_plugin.*is left out: .*{reason}", line)
    assert "b-bad" in line


def test_two_distributions_with_one_pass_name(install: Install) -> None:
    install("one-plugin", "one_plugin", PASS.format(name="same"))
    install("other-plugin", "other_plugin", PASS.format(name="same"))
    with pytest.raises(PluginError) as caught:
        load_registry()
    assert "pass 'same' is registered by both one-plugin and other-plugin" in caught.value.message
    assert "ODSORA_PLUGINS=" in caught.value.hint


def test_a_plugin_cannot_take_a_built_in_name(install: Install) -> None:
    install("zz-plugin", "zz_plugin", PASS.format(name="cidl"))
    with pytest.raises(
        PluginError, match="'cidl' is registered by both odsora-compiler and zz-plugin"
    ):
        load_registry()


def test_one_class_from_two_distributions_is_one_pass(install: Install) -> None:
    install("one-plugin", "shared_plugin", PASS.format(name="same"))
    again = "from shared_plugin import Made\nfrom odsora_compiler.plugins import hookimpl\n"
    again += "@hookimpl\ndef odsora_passes():\n    return [Made]\n"
    install("other-plugin", "again_plugin", again)
    assert "same" in load_registry()


@pytest.mark.parametrize(
    ("setting", "present", "absent"),
    [
        ("", {"cidl", "tdtm"}, {"palettize", "good"}),
        ("good_plugin", {"cidl", "good"}, {"palettize"}),
        (" good_plugin , palettize ", {"cidl", "good", "palettize"}, set()),
    ],
)
def test_odsora_plugins_chooses(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    told: list[str],
    setting: str,
    present: set[str],
    absent: set[str],
) -> None:
    install("good-plugin", "good_plugin", PASS.format(name="good"))
    monkeypatch.setenv("ODSORA_PLUGINS", setting)
    names = set(load_registry(report=told.append))
    assert present <= names
    assert not absent & names
    assert told == []


def test_a_plugin_switched_off_is_not_even_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    install("bad-plugin", "bad_plugin", "raise AssertionError('imported')")
    monkeypatch.setenv("ODSORA_PLUGINS", "")
    load_registry(report=told.append)
    assert told == []
    assert "bad_plugin" not in sys.modules


def test_a_name_that_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setenv("ODSORA_PLUGINS", "palletize")
    load_registry(report=told.append)
    assert told == [
        "ODSORA_PLUGINS names 'palletize', which is not installed. Did you mean 'palettize'?"
    ]


def test_an_unknown_pass_suggests_names_of_plugins(install: Install) -> None:
    install("good-plugin", "good_plugin", PASS.format(name="sharpen"))
    assert "sharpen" in load_registry()
    with pytest.raises(UsageError) as caught:
        load_registry().find("sharpn")
    assert "'sharpen'" in caught.value.hint


def test_a_command_reports_and_goes_on(tmp_path: Path, install: Install) -> None:
    install("bad-plugin", "bad_plugin", "1 / 0")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = "from odsora_compiler.plugins import load_registry; print(*load_registry())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert "cidl" in done.stdout.split()
    assert "odsora: plugin 'bad_plugin' of bad-plugin is left out: ZeroDivisionError" in done.stderr
