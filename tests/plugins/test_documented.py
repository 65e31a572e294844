"""A hook or a pass without documentation or without a test fails the build."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from odsora_compiler.pipeline.base import Pass
from odsora_compiler.pipeline.options import option_fields
from odsora_compiler.plugins import Hooks, load_registry

ROOT = Path(__file__).parents[2]
HOOKS = [name for name, item in vars(Hooks).items() if hasattr(item, "odsora_spec")]
PASSES = {name: entry.cls for name, entry in load_registry().items()}


def test_there_is_something_to_look_at() -> None:
    assert "odsora_passes" in HOOKS
    assert {"tdtm", "cidl", "palettize"} <= set(PASSES)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented_and_tested(name: str) -> None:
    text = inspect.getdoc(getattr(Hooks, name)) or ""
    assert len(text.split()) > 20, f"hook {name} is not documented"
    tests = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert any(f"def {name}" in path.read_text() for path in tests), f"no test implements {name}"


@pytest.mark.parametrize("cls", PASSES.values(), ids=list(PASSES))
def test_a_pass_is_documented(cls: type[Pass]) -> None:
    text = inspect.cleandoc(cls.__doc__ or "")
    # A dataclass without a docstring is given its signature as one.
    assert not text.startswith(f"{cls.__name__}("), f"pass {cls.name} is not documented"
    assert len(text.split()) > 20, f"pass {cls.name} is not documented"
    assert text.splitlines()[0].endswith("."), "the first line stands alone in --list-passes"
    for key, field in option_fields(cls).items():
        assert field.metadata.get("help"), f"option {key} of {cls.name} has no help text"


@pytest.mark.parametrize("cls", PASSES.values(), ids=list(PASSES))
def test_a_pass_has_a_test_file_that_runs_it(cls: type[Pass]) -> None:
    source = Path(inspect.getfile(cls))
    plugin = source.parents[1] if source.is_relative_to(ROOT / "plugins") else None
    folder = plugin / "tests" if plugin else ROOT / "tests" / "passes"
    file = folder / f"test_{source.stem}.py"
    assert file.is_file(), f"{source.name} has no {file.relative_to(ROOT)}"
    assert cls.name in file.read_text()
    functions = [
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert functions, f"{file.name} tests nothing"


def test_every_built_in_pass_file_is_registered() -> None:
    modules = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    registered = {Path(inspect.getfile(cls)).stem for cls in PASSES.values()}
    with_passes = {
        name
        for name in modules
        if any(
            inspect.isclass(item)
            and issubclass(item, Pass)
            and item.__module__.endswith(f".{name}")
            for item in vars(importlib.import_module(f"odsora_passes.{name}")).values()
        )
    }
    assert with_passes <= registered
