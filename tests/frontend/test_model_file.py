"""Model files: finding `build`, typing its options, and what is said when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from odsora_compiler.errors import CaptureError, UsageError
from odsora_compiler.frontend.capture import capture, capture_file
from odsora_compiler.frontend.model_file import parse_options
from odsora_compiler.ir.reference import evaluate_program

MODEL = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import nn

if TYPE_CHECKING:
    import odsora_compiler as odsora


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def build(by: float = 2.0, width: int = 4) -> odsora.ModelSpec:
    import odsora_compiler as odsora
    return odsora.ModelSpec(Scale(by), {"x": torch.ones(1, width)}, {"x": "b c"})
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "scale.py"
        path.write_text(text)
        return path

    return write


def test_build_gets_its_options(write: Write) -> None:
    program = capture(write(MODEL), {"by": 3.0, "width": 5})
    assert program.name == "scale"
    assert evaluate_program(program, program.examples)["output"].tolist() == [[3.0] * 5]


def test_options_as_text_are_typed_by_the_signature(write: Write) -> None:
    program = capture_file(write(MODEL), {"by": "3", "width": "5"})
    assert evaluate_program(program, program.examples)["output"].tolist() == [[3.0] * 5]


def test_a_model_file_may_import_its_neighbours_even_late(write: Write, tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_scale.py").write_text("BY = 7.0\n")
    before = list(sys.path)
    late = MODEL.replace(
        "return odsora.", "from neighbour_of_scale import BY as by\n    return odsora."
    )
    program = capture(write(late))
    assert evaluate_program(program, program.examples)["output"].tolist() == [[7.0] * 4]
    assert sys.path == before


@pytest.mark.parametrize("wrong", ["bild(by", "build_(by"])
def test_a_file_without_build(write: Write, wrong: str) -> None:
    with pytest.raises(UsageError, match=r"scale\.py: the file has no function 'build'"):
        capture(write(MODEL.replace("build(by", wrong)))


def test_a_missing_file_suggests_its_neighbour(write: Write) -> None:
    path = write(MODEL)
    with pytest.raises(UsageError) as caught:
        capture(path.with_name("scal.py"))
    assert "no such model file" in caught.value.message
    assert "'scale.py'" in caught.value.hint


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\0\1")
    with pytest.raises(UsageError, match="not a Python file"):
        capture(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_thing\n", r"raised ModuleNotFoundError: .*no_such_thing.* \(line 1\)"),
        ("x = 1\nx.y\n", r"raised AttributeError: .* \(line 2\)"),
        ("def build(:\n", "raised SyntaxError: .*line 1"),
        ("raise SystemExit(0)\n", "raised SystemExit: 0"),
        (
            "def build():\n    raise RuntimeError('no luck')\n",
            r"build\(\) raised .*no luck \(line 2\)",
        ),
        ("def build():\n    exit(3)\n", r"build\(\) raised SystemExit: 3"),
        ("def build():\n    return 3\n", "returned int, not a ModelSpec"),
    ],
)
def test_a_file_that_fails_is_named_with_the_line(write: Write, text: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(write(text))
    assert "scale.py" in caught.value.message


def test_an_unknown_option_gets_the_nearest_name(write: Write) -> None:
    for wrong in (lambda p: capture(p, {"widht": 5}), lambda p: capture_file(p, {"widht": "5"})):
        with pytest.raises(UsageError) as caught:
            wrong(write(MODEL))
        assert "build() has no option 'widht'" in caught.value.message
        assert "'width'" in caught.value.hint


def test_a_required_option_is_asked_for(write: Write) -> None:
    path = write(MODEL.replace("by: float = 2.0", "by: float"))
    with pytest.raises(UsageError, match="needs a value for by") as caught:
        capture(path)
    assert "--set by=" in caught.value.hint
    capture_file(path, {"by": "1.5"})


def typed(
    *,
    count: int = 1,
    rate: float = 0.5,
    flag: bool = False,
    name: str = "a",
    size: tuple[int, int] = (1, 2),
    sizes: tuple[int, ...] = (),
    words: list[str] = [],  # noqa: B006
    maybe: float | None = None,
    either: int | str = 1,
    choice: Literal["a", "b", 3] = "a",
    path: Path = Path(),
    guessed=4,
    unnamed=None,
    unknown: NoSuchType = None,  # type: ignore[name-defined]  # noqa: F821
) -> None:
    """A build with an option of every type."""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "3", 3),
        ("count", "-3", -3),
        ("rate", "3", 3.0),
        ("rate", "1e-3", 1e-3),
        ("flag", "true", True),
        ("flag", "False", False),
        ("name", "12", "12"),
        ("name", "true", "true"),
        ("size", "3,4", (3, 4)),
        ("size", "(3, 4)", (3, 4)),
        ("sizes", "5", (5,)),
        ("sizes", "1,2,3", (1, 2, 3)),
        ("words", "a,b", ["a", "b"]),
        ("words", "a", ["a"]),
        ("maybe", "none", None),
        ("maybe", "2", 2.0),
        ("either", "2", 2),
        ("either", "two", "two"),
        ("choice", "b", "b"),
        ("choice", "3", 3),
        ("path", "x/y", Path("x/y")),
        ("guessed", "5", 5),
        ("unnamed", "2.5", 2.5),
        ("unnamed", "text", "text"),
        ("unknown", "[1, 2]", [1, 2]),
    ],
)
def test_texts_become_values_of_the_declared_type(name: str, text: str, value: Any) -> None:
    found = parse_options(typed, {name: text})[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "says", "example"),
    [
        ("count", "many", "takes int", "count=1"),
        ("count", "2.5", "takes int", "count=1"),
        ("count", "true", "takes int", "count=1"),
        ("rate", "fast", "takes float", "rate=0.5"),
        ("flag", "1", "takes bool", "flag=False"),
        ("size", "1,2,3", "takes tuple\\[int, int\\]", "size=1,2"),
        ("sizes", "1,b", "takes tuple\\[int, ...\\]", "sizes="),
        ("maybe", "fast", "takes float | None", "maybe=0.5"),
        ("choice", "c", "takes typing.Literal", "choice=a"),
        ("guessed", "many", "takes int", "guessed=4"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_an_example(
    name: str, text: str, says: str, example: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_options(typed, {name: text})
    assert f"'{text}'" in caught.value.message
    assert f"--set {example}" in caught.value.hint


def test_a_build_of_any_options_gets_them_as_they_look() -> None:
    def build(**options: Any) -> None:
        """Takes anything."""

    found = parse_options(build, {"a": "1", "b": "true", "c": "text"})
    assert found == {"a": 1, "b": True, "c": "text"}


def test_torch_is_the_same_after_loading(write: Write) -> None:
    register = torch.nn.Module.register_parameter
    with pytest.raises(CaptureError):
        capture(write("1 / 0\n"))
    assert torch.nn.Module.register_parameter is register
