"""Capturing modules: what becomes an input, an output, a constant, and what stays whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from odsora_compiler.errors import CaptureError, UsageError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import fingerprint, save_program

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class Applied(nn.Module):
    """A function as a module, so that a test says what it is about in one line."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def captured(module: nn.Module, **inputs: Any) -> Program:
    """The program of `module`, checked to give what the module gives, bit for bit."""
    program = capture(ModelSpec(module, inputs))
    with torch.no_grad():
        leaves = pytree.tree_leaves(_plain(module.eval()(**inputs)))
    expected = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    found = list(evaluate_program(program, program.examples).values())
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True)
    )
    return program


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else value


def base(program: Program) -> Function:
    return program.component("model").function("base")


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in base(program).operators()]


def names(specs: Any) -> list[str]:
    return [spec.name for spec in specs]


# ------------------------------------------------------------------ inputs


class TakesMuch(nn.Module):
    def forward(
        self, a: torch.Tensor, b: torch.Tensor, double: bool, how: str, scale: float, n: Any = None
    ) -> torch.Tensor:
        assert n is None
        assert how == "minus"
        return (a - b) * scale * (2 if double else 1)


def test_numbers_booleans_strings_and_none_are_bound() -> None:
    program = captured(TakesMuch(), a=X, b=X + 1, double=True, how="minus", scale=0.5, n=None)
    assert names(program.inputs) == ["a", "b"]


def test_inputs_keep_their_order_and_identity_whatever_the_signature_says() -> None:
    program = captured(TakesMuch(), b=X[:1] * 3, double=False, how="minus", scale=1.0, a=X)
    assert names(program.inputs) == ["b", "a"]
    assert program.inputs[0].shape == (1, 4)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    program = captured(Applied(lambda a, b: a - 2 * b), a=X, b=X)
    other = evaluate_program(program, {"a": X, "b": X + 1})["output"]
    assert torch.equal(other, X - 2 * (X + 1))


def test_tensors_in_trees_are_inputs_named_by_their_path() -> None:
    program = captured(
        Applied(lambda cond, x: cond["pair"][0] * cond["one"] + x - cond["pair"][1]),
        cond={"pair": (X, X * 2), "one": X[0]},
        x=X,
    )
    assert names(program.inputs) == ["cond_pair_0", "cond_pair_1", "cond_one", "x"]


def test_two_inputs_with_one_flattened_name_are_refused() -> None:
    with pytest.raises(CaptureError, match="two inputs of the model are both called 'a_b'"):
        capture(ModelSpec(Applied(lambda a, a_b: a["b"] + a_b), {"a": {"b": X}, "a_b": X}))


def test_inputs_may_be_called_like_python_builtins() -> None:
    program = captured(
        Applied(lambda input, type, mask: input * type + mask), input=X, type=X + 1, mask=X + 2
    )
    assert names(program.inputs) == ["input", "type", "mask"]


def test_an_unused_input_stays_in_the_signature() -> None:
    program = captured(Applied(lambda x, unused: x * 2), x=X, unused=X[0])
    assert names(program.inputs) == ["x", "unused"]
    assert program.inputs[1].shape == (4,)


def test_examples_are_the_tensors_given() -> None:
    program = captured(Applied(lambda x: x.sin()), x=X)
    assert torch.equal(program.examples["x"], X)


def test_axes_reach_the_signature_and_the_facts() -> None:
    spec = ModelSpec(Applied(lambda x, y: x + y), {"x": X, "y": X}, {"x": "b c", "y": "_ (h w)"})
    program = capture(spec)
    assert [item.axes for item in program.inputs] == ["b c", "_ (h w)"]
    assert program.facts == {"axis b", "axis c", "axis h", "axis w"}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"z": "b c"}, "axes name an input 'z'"),
        ({"x": "b c d"}, "names 3 dimensions, the tensor has 2"),
        ({"x": "b b"}, "names b twice"),
        ({"x": "b c*"}, "cannot read 'b c\\*' at 'c\\*'"),
        ({"x": "b (c"}, "cannot read"),
        ({"x": "b (c _)"}, "unnamed part"),
    ],
)
def test_wrong_axes_are_refused(axes: Mapping[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(ModelSpec(Applied(lambda x: x * 2), {"x": X}, axes))


# ------------------------------------------------------------------ outputs


@dataclasses.dataclass
class Sample:
    sample: torch.Tensor
    extra: Any


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x + 2), ["output_0", "output_1"]),
        (lambda x: [x + 1, (x + 2, x + 3)], ["output_0", "output_1_0", "output_1_1"]),
        (lambda x: {"v": x + 1, "w": (x + 2,)}, ["v", "w_0"]),
        (lambda x: {"x": x + 1}, ["output_x"]),
        (lambda x: {"v": x + 1, "count": 3, "nothing": None}, ["v"]),
        (lambda x: Sample(x + 1, x + 2), ["sample", "extra"]),
        (lambda x: Sample(x + 1, {"a": x}), ["sample", "extra_a"]),
    ],
    ids=["bare", "tuple", "nested", "dict", "like an input", "numbers", "dataclass", "deep"],
)
def test_outputs_are_named_by_where_they_stand(function: Any, expected: list[str]) -> None:
    assert names(captured(Applied(function), x=X).outputs) == expected


def test_outputs_may_be_inputs_or_each_other() -> None:
    def function(x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * 2
        return {"y": y, "same": y, "view": y.view(-1), "through": x, "copy": x.clone()}

    program = captured(Applied(function), x=X)
    assert names(program.outputs) == ["y", "same", "view", "through", "copy"]
    assert operators(program) == ["aten.mul.Tensor", "aten.view.default"]


def test_a_model_that_computes_nothing_is_a_program() -> None:
    assert operators(captured(Applied(lambda x: x), x=X)) == []


def test_two_outputs_with_one_flattened_name_are_refused() -> None:
    function = lambda x: {"a": {"b": x + 1}, "a_b": x + 2}  # noqa: E731
    with pytest.raises(CaptureError, match="two outputs of the model are both called 'a_b'"):
        capture(ModelSpec(Applied(function), {"x": X}))


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(ModelSpec(Applied(lambda x: None), {"x": X}))


# ------------------------------------------------------------------ operators


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.layer = nn.LayerNorm(8)
        self.group = nn.GroupNorm(2, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.group(self.layer(self.proj(x)))
        y = F.silu(F.gelu(y, approximate="tanh"))
        heads = self.dropout(y).view(2, 4, 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads).detach().clone()
        return y.transpose(1, 2).contiguous().reshape(2, 4, 8).to(torch.float32).float()


def test_large_operators_stay_whole_and_copies_go() -> None:
    torch.manual_seed(0)
    found = operators(captured(Layers(), x=torch.randn(2, 4, 8)))
    for whole in (
        "aten.linear.default",
        "aten.layer_norm.default",
        "aten.group_norm.default",
        "aten.gelu.default",
        "aten.silu.default",
        "aten.scaled_dot_product_attention.default",
    ):
        assert found.count(whole) == 1
    meaningless = ("clone", "alias", "detach", "_assert", "contiguous", "_to_copy", "dropout")
    assert [name for name in found if any(word in name for word in meaningless)] == []


def test_casts_that_change_the_type_stay() -> None:
    function = lambda x: (x.half().type_as(x), x.to(torch.int32), x.bool())  # noqa: E731
    program = captured(Applied(function), x=X)
    assert operators(program).count("aten._to_copy.default") == 4
    assert [str(spec.dtype) for spec in program.outputs] == [
        "torch.float32",
        "torch.int32",
        "torch.bool",
    ]


def test_views_of_permuted_values_do_not_depend_on_memory() -> None:
    function = lambda x: (x.T.contiguous().view(-1), x.T.reshape(2, 4), x.expand(3, 2, 4).flatten())  # noqa: E731
    captured(Applied(function), x=X)


def test_the_module_is_traced_as_in_evaluation() -> None:
    # `captured` compares with the module in evaluation mode, where dropout does nothing.
    program = captured(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9)).train(), input=X)
    assert "aten.dropout.default" not in operators(program)


# ------------------------------------------------------------------ weights and constants


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.arange(4.0)
        self.register_buffer("kept", torch.full((4,), 2.0))
        self.register_buffer("table", torch.full((4,), 3.0), persistent=False)
        self.parameter = nn.Parameter(torch.full((4,), 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        literal = torch.tensor([7.0, 8.0, 9.0, 10.0])
        return x * self.plain + self.kept * self.table - self.parameter / literal


def test_parameters_buffers_and_lifted_constants_are_weights() -> None:
    program = captured(Holder(), x=X)
    weights = program.component("model").weights
    used = base(program).weight_names()
    assert {"plain", "kept", "table", "parameter"} < set(used)
    (literal,) = set(used) - {"plain", "kept", "table", "parameter"}
    assert weights.load(literal).tolist() == [7.0, 8.0, 9.0, 10.0]
    assert weights.load("table").tolist() == [3.0] * 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)) + self.again(self.embed(tokens + 1))


def test_a_shared_parameter_is_one_weight() -> None:
    program = captured(Tied(), tokens=torch.tensor([1, 2, 4]))
    assert len(base(program).weight_names()) == 1
    assert len([n for n in base(program).graph.nodes if n.op == "get_attr"]) == 1


# ------------------------------------------------------------------ provenance


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.proj(x))  # a line of its own


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.exp()


def test_provenance_names_module_and_the_models_own_line() -> None:
    program = captured(Outer(), x=X)
    nodes = {node.name: node.meta["provenance"] for node in base(program).operators()}
    lines = Path(__file__).read_text().splitlines()
    place = f"test_capture.py:{1 + lines.index(_line_of('a line of its own', lines))} in forward"
    assert (nodes["linear"].module, nodes["linear"].source) == ("blocks.0.proj", place)
    assert (nodes["tanh_1"].module, nodes["tanh_1"].source) == ("blocks.1", place)
    assert nodes["exp"].module == ""
    assert str(nodes["exp"]).startswith("(test_capture.py:")


def _line_of(text: str, lines: list[str]) -> str:
    return next(line for line in lines if line.endswith(f"# {text}"))


# ------------------------------------------------------------------ saved programs


def test_a_saved_program_is_a_model(tmp_path: Path) -> None:
    program = captured(Outer(), x=X)
    save_program(program, tmp_path / "saved")
    assert fingerprint(capture(tmp_path / "saved")) == fingerprint(program)


def test_a_saved_program_takes_no_options(tmp_path: Path) -> None:
    save_program(captured(Outer(), x=X), tmp_path / "saved")
    with pytest.raises(UsageError, match="has its options and weights in it"):
        capture(tmp_path / "saved", {"depth": 2})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec(lambda x: x, {"x": X}), "is a function, not a torch.nn.Module"),  # type: ignore[arg-type]
        (ModelSpec(Outer(), X), "is a Tensor, not a mapping"),  # type: ignore[arg-type]
        (ModelSpec(Outer(), {"y": X}), "unexpected keyword argument|missing"),
        (ModelSpec(Outer(), {"x": X[:, :3]}), "test_capture.py:.* in forward: `return torch.tanh"),
    ],
    ids=["no module", "no mapping", "wrong name", "wrong shape"],
)
def test_a_spec_that_cannot_run_says_why(spec: ModelSpec, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(spec)
