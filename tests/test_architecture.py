"""The shape of the project: who may import whom, what is packaged, what is never used."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORK = ROOT / "odsora_compiler"

# Folder or module of the framework → those it may import. From the commands to the driver, from the
# driver to the stages, from the stages to the representation; `plugins` names types of `pipeline`.
ARROWS = {
    "errors": set(),
    "ir": {"errors"},
    "mil": {"errors"},
    "analysis": {"ir", "errors"},
    "planning": {"ir", "errors"},
    "frontend": {"ir", "errors"},
    "rewrite": {"analysis", "ir", "errors"},
    "plugins": {"pipeline", "errors"},
    "pipeline": {"plugins", "analysis", "ir", "errors"},
    "lowering": {"rewrite", "mil", "analysis", "ir", "errors"},
    "runtime": {"planning", "mil", "ir", "errors"},
    "driver": {"runtime", "lowering", "mil", "pipeline", "analysis", "ir", "errors"},
    "cli": {"driver", "runtime", "planning", "pipeline", "plugins", "frontend", "ir", "errors"},
    "__init__": {"driver", "runtime", "pipeline", "frontend", "ir"},
}
SOURCES = [
    path
    for folder in ("odsora_compiler", "passes", "plugins", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "build" not in path.parts
]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in the file it does; relative ones made absolute."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            yield ".".join(part for part in (base, node.module) if part)


def part_of(path: Path) -> str:
    parts = path.relative_to(FRAMEWORK).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("part", sorted({part_of(path) for path in FRAMEWORK.rglob("*.py")}))
def test_arrows_point_one_way(part: str) -> None:
    assert part in ARROWS, f"say in ARROWS what odsora_compiler.{part} may import"
    for path in FRAMEWORK.rglob("*.py"):
        if part_of(path) != part:
            continue
        for name in imports(path):
            if name.startswith("odsora_compiler."):
                target = name.split(".")[1]
                allowed = {part} | ARROWS[part]
                assert target in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_there_is_no_way_round() -> None:
    """Apart from `plugins`, which names types only, no two parts need each other."""
    arrows = {part: targets - {"plugins"} for part, targets in ARROWS.items() if part != "plugins"}
    done: set[str] = set()
    while len(done) < len(arrows):
        ready = {part for part, targets in arrows.items() if part not in done and targets <= done}
        assert ready, f"a circle among {sorted(set(arrows) - done)}"
        done |= ready


def test_plugins_import_the_pipeline_for_types_only() -> None:
    tree = ast.parse((FRAMEWORK / "plugins.py").read_text())
    guarded = [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and "pipeline" in (node.module or ""):
            assert node in guarded


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_never_imported(path: Path) -> None:
    names = set(imports(path))
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not roots & {"requests", "urllib", "http", "socket"}, "nothing talks to a network"
    if path.is_relative_to(FRAMEWORK):
        assert not roots & {"passes", "odsora_passes", "odsora_palettize", "examples"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "numpy.load", "np.load", "torch.save"), (
                f"line {node.lineno}: {called} reads or writes pickles"
            )


def test_every_package_folder_is_listed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in FRAMEWORK.rglob("__init__.py")
    }
    assert listed == folders | {"odsora_passes"}
    unmarked = {path.parent for path in FRAMEWORK.rglob("*.py")} - {
        path.parent for path in FRAMEWORK.rglob("__init__.py")
    }
    assert not unmarked, "folders with modules and without __init__.py"


@pytest.mark.parametrize("path", sorted(FRAMEWORK.rglob("__init__.py")), ids=str)
def test_importing_a_package_imports_nothing_large(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        assert not (
            isinstance(node, (ast.Import, ast.ImportFrom))
            and ast.unparse(node).split()[1].split(".")[0]
            in ("torch", "coremltools", "odsora_compiler")
        ), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "module",
    [
        "odsora_compiler",
        "odsora_compiler.cli.compile",
        "odsora_compiler.cli.run",
        "odsora_compiler.cli.plan",
        "odsora_compiler.plugins",
    ],
)
def test_commands_start_without_torch(module: str) -> None:
    script = (
        f"import sys, {module}; print([m for m in ('torch', 'coremltools') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_where_they_are_said_to_be() -> None:
    import odsora_compiler

    for name in odsora_compiler.__all__:
        assert getattr(odsora_compiler, name).__module__.startswith("odsora_compiler.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        odsora_compiler.nothing  # noqa: B018
