"""Models that cannot become a graph: each is refused with the line at fault and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from odsora_compiler.errors import CaptureError
from odsora_compiler.frontend.capture import capture

HEAD = """
import torch
from torch import nn
from odsora_compiler import ModelSpec

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x, n):
"""
TAIL = """
def build():
    return ModelSpec(Model(), {"x": torch.ones(2, 4), "n": torch.tensor([3])})
"""

Write = Callable[[str], Path]


@pytest.fixture
def model_file(tmp_path: Path) -> Write:
    def write(body: str) -> Path:
        path = tmp_path / "model_under_test.py"
        lines = "\n".join(f"        {line}" for line in body.strip().splitlines())
        path.write_text(HEAD + lines + "\n" + TAIL)
        return path

    return write


def line_of(path: Path, text: str) -> int:
    lines = path.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


@pytest.mark.parametrize(
    ("culprit", "body", "says"),
    [
        ("n.item()", "k = n.item()\nreturn x * k", "instead of .item()"),
        ("float(n)", "k = float(n)\nreturn x * k", "instead of .item()"),
        ("int(n)", "k = int(n)\nreturn x[:, :k]", "instead of .item()"),
        ("n.tolist()", "k = n.tolist()\nreturn x * k[0]", "instead of .item()"),
        ("if x.sum()", "if x.sum() > 0:\n    return x\nreturn -x", "torch.where"),
        ("while n", "while n > 0:\n    n = n - 1\nreturn x * n", "torch.where"),
        ("x[x > 0]", "y = x[x > 0]\nreturn y.sum()", "torch.where"),
        ("nonzero", "y = n.nonzero()\nreturn y", "torch.where"),
        ("randn_like", "y = torch.randn_like(x)\nreturn x + y", "as an input"),
        ("as_strided", "y = x.T.as_strided((2, 2), (1, 2))\nreturn y", "reshape"),
        ("x.numpy()", "y = torch.from_numpy(x.numpy() * 2)\nreturn x + y", "tensor operators"),
        ("x.no_such_method", "return x.no_such_method()", "must run"),
    ],
)
def test_the_line_is_named(model_file: Write, culprit: str, body: str, says: str) -> None:
    path = model_file(body)
    with pytest.raises(CaptureError) as caught:
        capture(path)
    assert f"model_under_test.py:{line_of(path, culprit)} in forward" in caught.value.message
    assert str(path) in caught.value.message
    assert says in caught.value.hint


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.count.add_(1)\nreturn x + self.count", "changes its buffer count"),
        ("x.mul_(2)\nreturn x", "changes its input x"),
    ],
)
def test_models_that_write_to_what_they_are_given_are_refused(
    model_file: Write, body: str, message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model_file(body))


def test_nothing_of_pytorch_own_reports_reaches_the_user(
    model_file: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError):
        capture(model_file("if x.sum() > 0:\n    return x\nreturn -x"))
    assert capfd.readouterr() == ("", "")


def test_attention_with_dropout_is_refused(model_file: Write) -> None:
    attention = "nn.functional.scaled_dot_product_attention"
    with pytest.raises(CaptureError, match="draws random numbers"):
        capture(model_file(f"return {attention}(x[None], x[None], x[None], dropout_p=0.5)"))
    program = capture(model_file(f"return {attention}(x[None], x[None], x[None], dropout_p=0.0)"))
    assert program.outputs[0].shape == (1, 2, 4)


def test_layers_that_drop_out_in_training_only_draw_nothing() -> None:
    from odsora_compiler.frontend.spec import ModelSpec

    module = nn.LSTM(4, 4, num_layers=2, dropout=0.5)
    program = capture(ModelSpec(module, {"input": torch.ones(2, 1, 4)}))
    assert program.outputs[0].shape == (2, 1, 4)


def test_operators_of_other_libraries_are_refused() -> None:
    from odsora_compiler.frontend.spec import ModelSpec

    @torch.library.custom_op("odsora_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    with pytest.raises(CaptureError, match=r"odsora_test\.twice\.default is not an operator"):
        capture(ModelSpec(Uses(), {"x": torch.ones(2)}))
