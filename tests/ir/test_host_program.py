"""The host program: a list of operations that does what the graph says, and leaves early."""

from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch
from small_programs import aten, new_function, returns, small_program

from odsora_compiler.errors import PackageError, RunError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.host import call_component, early_exit, first_true, random_tensor
from odsora_compiler.ir.host_program import HostProgram
from odsora_compiler.ir.inference import fake_tensor
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.weights import WeightSpec


def looping_host(limit: float) -> Function:
    """x ← 2·x three times with a call before each; leaves with −x where max(x) > `limit`."""
    host = new_function(x=(2, 4))
    editor = Editor(host, "")
    x, exits = host.placeholders[0], []
    for _ in range(3):
        with host.graph.inserting_before(host.output_node):
            called = host.graph.call_function(call_component, ("net", "base"), {"x": x})
        called.meta["val"] = {"a": fake_tensor((2, 4), torch.float32)}
        a = editor.call(operator.getitem, called, "a")
        x = editor.call(aten.mul.Tensor, a, 2.0)
        large = editor.call(aten.gt.Scalar, editor.call(aten.amax.default, x), limit)
        exits.append(editor.call(early_exit, large, editor.call(aten.neg.default, x)))
    return returns(host, y=editor.call(first_true, exits, x))


def run(host: HostProgram, seed: int = 0) -> tuple[torch.Tensor, int]:
    """The output on ones, and how many calls were made."""
    calls = 0

    def call(item: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        assert (item["component"], item["function"]) == ("net", "base")
        return {"a": given["x"]}

    return host.run({"x": torch.ones(2, 4)}, {}, call, seed)["y"], calls


@pytest.mark.parametrize(("limit", "value", "calls"), [(1.5, -2, 1), (3.0, -4, 2), (99.0, 8, 3)])
def test_an_exit_leaves_out_what_follows(limit: float, value: float, calls: int) -> None:
    found, made = run(HostProgram.of(looping_host(limit)))
    assert torch.equal(found, torch.full((2, 4), value))
    assert made == calls


def test_it_is_json_and_comes_back() -> None:
    made = HostProgram.of(looping_host(3.0))
    data = json.loads(json.dumps(made.to_data()))
    again = HostProgram.from_data(data)
    assert again.to_data() == data
    assert (again.inputs, again.outputs) == (made.inputs, made.outputs)
    assert torch.equal(run(again)[0], run(made)[0])


def test_every_value_is_freed_once_and_none_too_early() -> None:
    made = HostProgram.of(looping_host(99.0))
    freed = [name for item in made.operations for name in item.get("free", ())]
    assert len(freed) == len(set(freed))
    kept = {value for _, value in made.outputs}
    assert not kept & set(freed)
    produced = {value for _, value in made.inputs}
    for item in made.operations:
        out = item.get("outputs", item.get("out", {}))
        produced |= {out} if isinstance(out, str) else set(out.values())
    assert produced == kept | set(freed)


def test_an_input_may_have_the_name_of_a_python_function() -> None:
    host = new_function(input=(2,))
    returns(host, output=Editor(host, "").call(aten.neg.default, host.placeholders[0]))
    found = HostProgram.of(host).run({"input": torch.ones(2)}, {}, lambda item, given: {})
    assert torch.equal(found["output"], -torch.ones(2))


def test_items_of_an_operator_and_constants() -> None:
    host = new_function(x=(2, 4))
    editor = Editor(host, "")
    halves = editor.call(aten.split.Tensor, host.placeholders[0], 2, 1)
    table = editor.weight("table", WeightSpec((2, 2), torch.float32))
    right = editor.call(aten.add.Tensor, editor.call(operator.getitem, halves, 1), table)
    made = HostProgram.of(returns(host, y=right))
    x, constant = torch.arange(8.0).view(2, 4), torch.full((2, 2), 10.0)
    found = made.run({"x": x}, {"table": constant}, lambda item, given: {})
    assert torch.equal(found["y"], x[:, 2:] + 10)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_random_numbers_follow_the_seed(kind: str) -> None:
    host = new_function(x=(2, 4))
    editor = Editor(host, "")
    drawn = [editor.call(random_tensor, kind, [2, 4], torch.float32, seed) for seed in (0, 1)]
    made = HostProgram.from_data(HostProgram.of(returns(host, a=drawn[0], b=drawn[1])).to_data())

    def results(seed: int) -> dict[str, torch.Tensor]:
        return made.run({"x": torch.ones(2, 4)}, {}, lambda item, given: {}, seed)

    first, again, other = results(7), results(7), results(8)
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])
    assert bool((first["a"] < 0).any()) == (kind == "normal")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["operations"][1].update(do="aten.nothing.here"), "damaged host program"),
        (lambda d: d["operations"][1].update(do="os.system.default"), "damaged host program"),
        (lambda d: d["operations"][0].pop("function"), "function"),
        (lambda d: d["operations"].pop(0), "which nothing before it makes"),
        (lambda d: d["outputs"][0].update(value="nowhere"), "nothing makes the output"),
        (lambda d: d["inputs"][0].update(dtype="Tensor"), "unknown type"),
    ],
)
def test_damaged_data_is_refused(spoil: Any, message: str) -> None:
    data = json.loads(json.dumps(HostProgram.of(looping_host(3.0)).to_data()))
    spoil(data)
    with pytest.raises(PackageError, match=message):
        HostProgram.from_data(data)


def test_inputs_are_checked() -> None:
    made = HostProgram.of(looping_host(3.0))
    with pytest.raises(RunError, match="the host program: missing input x"):
        made.run({}, {}, lambda item, given: {})


def test_the_reference_runs_the_same_list() -> None:
    program = small_program()
    outputs = evaluate_program(program, program.examples)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "a": (2, 4),
        "b": (2, 4),
    }
