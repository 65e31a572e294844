"""Saving, loading and printing programs; damage is refused, no code is run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_programs import aten, new_function, planned_program, returns, small_program
from torch import nn

from odsora_compiler.errors import PackageError, UsageError, WeightsError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.frontend.spec import ModelSpec
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host import single_call_host
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import (
    fingerprint,
    function_fingerprint,
    function_from_data,
    function_to_data,
    load_program,
    program_text,
    save_program,
)
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import EncodedWeights, LookupTable, TensorWeights


def round_trip(program: Program, folder: Path) -> Program:
    """The program saved and loaded, checked to be the same in every respect."""
    loaded = load_program(save_program(program, folder))
    verify_program(loaded)
    assert fingerprint(loaded) == fingerprint(program)
    assert program_text(loaded) == program_text(program)
    assert (loaded.facts, loaded.history) == (program.facts, program.history)
    found = evaluate_program(loaded, loaded.examples)
    expected = evaluate_program(program, program.examples)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) or value.isnan().any()
    return loaded


def of_function(function: Function) -> Program:
    examples = {spec.name: torch.ones(spec.shape, dtype=spec.dtype) for spec in function.inputs}
    component = Component("net", {"base": function}, TensorWeights({}), examples=examples)
    return Program("net", {"net": component}, single_call_host("net", function), dict(examples))


# ------------------------------------------------------------------ every stage


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.second(self.first(x)) + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        parts = x.split((1, 3), dim=1)
        return {"parts": parts[1].masked_fill(y[:, 1:] > 0, -math.inf), "y": y}


def test_a_captured_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    program = capture(ModelSpec(Tied(), {"x": x, "y": x}, {"x": "b c"}))
    loaded = round_trip(program, tmp_path / "p")
    assert [str(spec) for spec in loaded.inputs] == [str(spec) for spec in program.inputs]


def test_every_stage_after_it(tmp_path: Path) -> None:
    program = small_program()
    component = program.component("net")
    component.derive("variant")
    program.redirect("net", "base", "variant")
    program.history.append("tdtm{steps=3}")
    program.facts.add("axis b")
    round_trip(program, tmp_path / "derived")
    planned = planned_program()
    loaded = round_trip(planned, tmp_path / "planned")
    assert loaded.component("net").plan == planned.component("net").plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
def test_compressed_weights(tmp_path: Path, dtype: torch.dtype, axis: int) -> None:
    program = small_program()
    component = program.component("net")
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 4, (8, 4), dtype=torch.uint8, generator=generator)
    table = LookupTable(2, indices, torch.randn(2, 4, generator=generator).to(dtype), axis)
    dense = fingerprint(program)
    component.weights = EncodedWeights(component.weights, {"w": table})
    assert fingerprint(program) != dense
    loaded = round_trip(program, tmp_path / "p").component("net").weights
    found = loaded.encoding("w")
    assert found is not None
    assert (found.bits, found.axis) == (2, axis)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.table, table.table)
    assert found.table.dtype == dtype
    assert loaded.encoding("bias") is None
    assert loaded.spec("w").dtype == torch.float32
    assert torch.equal(loaded.load("w"), component.weights.load("w"))


def test_only_weights_that_are_used_are_saved(tmp_path: Path) -> None:
    program = small_program()
    component = program.component("net")
    tensors = {name: component.weights.load(name) for name in component.weights.names()}
    component.weights = TensorWeights({**tensors, "unused": torch.zeros(1 << 20)})
    loaded = load_program(save_program(program, tmp_path / "p"))
    assert sorted(loaded.component("net").weights.names()) == ["bias", "w"]


def test_inputs_that_share_an_example(tmp_path: Path) -> None:
    function = new_function(x=(2,), y=(2,))
    editor = Editor(function, "")
    returns(function, z=editor.call(aten.add.Tensor, *function.placeholders))
    program = of_function(function)
    program.examples["y"] = program.examples["x"]
    round_trip(program, tmp_path / "p")


# ------------------------------------------------------------------ arguments of every kind


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten.clamp.default, (math.nan, math.inf), {}),
        (aten.clamp.default, (None, -math.inf), {}),
        (aten.mul.Scalar, (-0.0,), {}),
        (aten.mul.Scalar, (1e-45,), {}),
        (aten.mul.Scalar, (True,), {}),
        (aten.mul.Scalar, (0.1 + 0.2,), {}),
        (aten._to_copy.default, (), {"dtype": torch.bfloat16}),
        (aten.clone.default, (), {"memory_format": torch.preserve_format}),
        (aten.empty_like.default, (), {"layout": torch.strided, "device": torch.device("cpu")}),
        (aten.gelu.default, (), {"approximate": "tanh"}),
        (aten.permute.default, ([1, 0],), {}),
        (aten.sum.dim_IntList, ([-1], True), {"dtype": torch.float64}),
    ],
)
def test_arguments_survive(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = new_function(x=(2, 2))
    made = Editor(function, "").call(target, function.placeholders[0], *args, **kwargs)
    returns(function, y=made)
    text = json.dumps(function_to_data(function))
    again = function_from_data(json.loads(text))
    assert json.dumps(function_to_data(again)) == text
    (node,) = again.operators()
    assert node.target is target
    # repr, because NaN is not equal to itself and True is equal to 1.
    assert repr(list(node.args[1:])) == repr(list(args)) or list(node.args[1:]) == list(args)
    assert dict(node.kwargs) == kwargs


def test_operators_with_several_results_survive(tmp_path: Path) -> None:
    import operator

    function = new_function(x=(4, 4))
    editor = Editor(function, "")
    best = editor.call(aten.topk.default, function.placeholders[0], 2)
    items = [editor.call(operator.getitem, best, index) for index in range(2)]
    joined = editor.call(aten.cat.default, [items[0], items[0]], 1)
    returns(function, values=joined, indices=items[1])
    round_trip(of_function(function), tmp_path / "p")


# ------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize(
    "change",
    [
        lambda f: setattr(f.placeholders[0], "name", "z"),
        lambda f: f.placeholders[0].meta.update(axes="c b"),
        lambda f: next(f.operators()).meta.update(chunk=1),
        lambda f: f.output_node.meta.update(names=("b", "a")),
        lambda f: Editor(f, "p").call(aten.neg.default, f.placeholders[0]),
    ],
)
def test_every_change_changes_the_fingerprint(change: Callable[[Function], Any]) -> None:
    program = small_program()
    function = program.component("net").function("base")
    before = fingerprint(program), function_fingerprint(function)
    change(function)
    assert fingerprint(program) != before[0]
    assert function_fingerprint(function) != before[1]


def test_equal_programs_have_equal_fingerprints() -> None:
    program = small_program()
    assert fingerprint(program) == fingerprint(small_program()) == fingerprint(program.copy())
    copied = program.component("net").derive("other")
    assert function_fingerprint(copied) == function_fingerprint(
        program.component("net").function("base")
    )


# ------------------------------------------------------------------ printing


def test_the_text_has_everything_a_reader_needs() -> None:
    program = planned_program()
    program.history.append("cidl{budget=1MB}")
    text = program_text(program)
    for part in (
        "program net  [cidl{budget=1MB}]",
        "function net.base",
        'x = input x: float32[2, 4] "b c"',
        "w = weight w: float32[8, 4]",
        "|0  linear = aten.linear.default(x, w, bias): float32[2, 8]",
        "|1  split = aten.split.Tensor(linear, 4, 1): (float32[2, 4], float32[2, 4])",
        "# net.proj (net.py:3 in forward)",
        "return a=getitem, b=tanh",
        "function host",
        "call_component(net, base, x=x): {a: float32[2, 4], b: float32[2, 4]}",
    ):
        assert part in text


def test_the_text_may_be_limited_to_functions() -> None:
    program = small_program()
    program.component("net").derive("variant")
    assert "function net.variant from base" in program_text(program, {"variant"})
    assert "function net.base" not in program_text(program, {"variant"})


# ------------------------------------------------------------------ damage


def edit_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "program.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def nodes(data: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data["components"]["net"]["functions"]["base"]["nodes"]
    return found


def linear(data: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in nodes(data) if node["name"] == "linear")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("components"),
        lambda d: d.pop("facts"),
        lambda d: d["components"]["net"].pop("plan"),
        lambda d: d["components"].update(net=[]),
        lambda d: d["components"]["net"]["plan"].update(chunks=[{"weight": 3}]),
        lambda d: d["components"].update(other=d["components"]["net"]),
        lambda d: nodes(d).insert(0, {"name": "n"}),
        lambda d: linear(d).update(args=[{"node": "nobody"}]),
        lambda d: linear(d).update(args=[{"code": "print(1)"}]),
        lambda d: linear(d).update(args=[{"dtype": "load"}]),
        lambda d: linear(d).update(val=["float33", 2]),
        lambda d: linear(d).update({"from": ["only"]}),
        lambda d: linear(d).update(target="aten.no_such_thing.default"),
        lambda d: linear(d).update(target="aten.linear"),
        lambda d: linear(d).update(target=3),
    ],
)
def test_a_damaged_graph_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = save_program(planned_program(), tmp_path / "p")
    edit_json(folder, change)
    with pytest.raises(PackageError):
        load_program(folder)


@pytest.mark.parametrize(
    "target",
    [
        "os.system.default",
        "builtins.eval.default",
        "torchvision.nms.default",
        "aten.from_file.default",
        "aten.linear.__class__",
        "aten.__init__.x",
    ],
)
def test_operators_that_are_not_pytorch_arithmetic_are_refused(tmp_path: Path, target: str) -> None:
    folder = save_program(small_program(), tmp_path / "p")
    edit_json(folder, lambda data: linear(data).update(target=target))
    with pytest.raises(PackageError):
        load_program(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "program.json").unlink(), "not a saved program"),
        (lambda f: (f / "program.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "program.json").write_text("[]"), "schema version None"),
        (lambda f: edit_json(f, lambda d: d.update(schema=9)), "schema version 9, this release"),
        (lambda f: (f / "examples.safetensors").unlink(), "no such file"),
        (
            lambda f: (f / "weights/net/weights-00000.safetensors").write_bytes(b"1"),
            "not a complete",
        ),
        (lambda f: (f / "weights/net/weights-00000.safetensors").unlink(), "no .safetensors"),
        (lambda f: (f / "weights/net/encodings.json").unlink(), "damaged saved weights"),
        (lambda f: (f / "weights/net/encodings.json").write_text("{}"), "damaged"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = save_program(small_program(), tmp_path / "p")
    spoil(folder)
    with pytest.raises(PackageError, match=message):
        load_program(folder)


def test_nothing_is_saved_over(tmp_path: Path) -> None:
    folder = save_program(small_program(), tmp_path / "p")
    with pytest.raises(UsageError, match="cannot be saved there"):
        save_program(small_program(), folder)
    load_program(folder)


UNSAFE_NAMES = [
    "../../esc",
    "a/b",
    "a\\b",
    "",
    ".",
    "..",
    ".hidden",
    "dot.",
    "a\n",
    "/tmp/x",
    "C:x",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_name_that_is_a_path_is_neither_saved_nor_loaded(tmp_path: Path, name: str) -> None:
    program = small_program()
    component = program.component("net")
    component.name = name
    program.components = {name: component}
    with pytest.raises(UsageError, match="cannot be called"):
        save_program(program, tmp_path / "deep" / "er" / "p")
    assert list(tmp_path.iterdir()) == []
    folder = save_program(small_program(), tmp_path / "p")
    data = json.loads((folder / "program.json").read_text())
    data["components"] = {name: data["components"]["net"]}
    (folder / "program.json").write_text(json.dumps(data))
    with pytest.raises(PackageError, match="cannot be called") as caught:
        load_program(folder)
    assert repr(name) in caught.value.message


@pytest.mark.parametrize("name", ["my model", "ü", "u\u0308", "v1.2-final_(1)", "3d"])
def test_names_of_ordinary_files_are_saved(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(
        "import torch\nimport odsora_compiler as odsora\n"
        "def build():\n"
        "    return odsora.ModelSpec(torch.nn.Linear(2, 2), {'input': torch.ones(1, 2)})\n"
    )
    program = capture(tmp_path / f"{name}.py")
    assert list(round_trip(program, tmp_path / "p").components) == [name]


def test_a_failure_leaves_no_part_of_a_program(tmp_path: Path) -> None:
    program = small_program()
    program.component("net").weights = TensorWeights({"w": torch.zeros(8, 4)})
    with pytest.raises(WeightsError, match="bias"):
        save_program(program, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
