"""The editor keeps values, provenance, names, order and signatures right."""

from __future__ import annotations

import operator

import pytest
import torch
from small_programs import aten, small_program
from torch import fx

from odsora_compiler.errors import PassError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Provenance
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.verify import verify_program
from odsora_compiler.ir.weights import LayeredWeights, TensorWeights, WeightSpec


@pytest.fixture
def program() -> Program:
    return small_program()


@pytest.fixture
def editor(program: Program) -> Editor:
    return Editor(program.component("net").function("base"), "mypass")


def node(editor: Editor, name: str) -> fx.Node:
    return next(item for item in editor.graph.nodes if item.name == name)


def order(editor: Editor) -> list[str]:
    return [item.name for item in editor.graph.nodes]


def test_new_nodes_know_their_shape_and_where_they_come_from(editor: Editor) -> None:
    made = editor.after(node(editor, "linear")).call(aten.mean.dim, node(editor, "linear"), [1])
    assert (tuple(made.meta["val"].shape), made.meta["val"].dtype) == ((2,), torch.float32)
    assert made.meta["provenance"] == Provenance("net.proj", "net.py:3 in forward", ("mypass",))


def test_like_gives_the_provenance(editor: Editor) -> None:
    node(editor, "tanh").meta["provenance"] = Provenance("other", "", ("first",))
    made = editor.call(aten.neg.default, node(editor, "getitem"), like=node(editor, "tanh"))
    assert made.meta["provenance"] == Provenance("other", "", ("first", "mypass"))


def test_before_and_after_place_nodes_in_the_order_they_are_made(editor: Editor) -> None:
    x = node(editor, "x")
    editor.before(node(editor, "linear"))
    first, second = editor.call(aten.neg.default, x), editor.call(aten.abs.default, x)
    place = order(editor).index(first.name)
    assert order(editor)[place:][:3] == [first.name, second.name, "linear"]
    editor.after(node(editor, "linear"))
    third = editor.call(aten.neg.default, node(editor, "linear"))
    fourth = editor.call(aten.abs.default, third)
    assert order(editor)[place + 2 :][:3] == ["linear", third.name, fourth.name]


def test_after_an_input_means_after_all_inputs(editor: Editor) -> None:
    graph = editor.graph
    with graph.inserting_before(node(editor, "w")):
        graph.create_node("placeholder", "late").meta["val"] = node(editor, "x").meta["val"]
    made = editor.after(node(editor, "x")).call(aten.neg.default, node(editor, "x"))
    assert order(editor)[:3] == ["x", "late", made.name]


def test_names_stay_distinct(editor: Editor) -> None:
    for _ in range(3):
        editor.call(aten.tanh.default, node(editor, "getitem"))
    assert len(set(order(editor))) == len(order(editor))


def test_arguments_an_operator_refuses_are_named(editor: Editor) -> None:
    with pytest.raises(PassError) as caught:
        editor.call(aten.mm.default, node(editor, "x"), node(editor, "linear"))
    text = str(caught.value)
    for part in ("mypass", "aten.mm.default", "x[2, 4]", "linear[2, 8]", "function 'base'"):
        assert part in text


def test_a_weight_is_read_through_the_store(program: Program, editor: Editor) -> None:
    component = program.component("net")
    table = torch.full((4,), 2.0)
    component.weights = LayeredWeights(component.weights, TensorWeights({"table": table}))
    tanh = node(editor, "tanh")
    editor.after(tanh)
    scaled = editor.call(aten.mul.Tensor, tanh, editor.weight("table", WeightSpec.of(table)))
    before = evaluate_program(program, program.examples)
    editor.replace(tanh, scaled)
    verify_program(program)
    after = evaluate_program(program, program.examples)
    assert torch.equal(after["b"], before["b"] * 2)
    assert torch.equal(after["a"], before["a"])


def test_replace_spares_what_the_new_node_is_made_from(program: Program, editor: Editor) -> None:
    """The usual shape of a rewrite: the new value is computed from the old one in several steps."""
    linear = node(editor, "linear")
    editor.after(linear)
    doubled = editor.call(aten.mul.Tensor, linear, 2.0)
    shifted = editor.call(aten.add.Tensor, doubled, linear)
    before = evaluate_program(program, program.examples)
    editor.replace(linear, shifted)
    verify_program(program)
    assert doubled.args[0] is linear
    assert shifted.args[1] is linear
    assert node(editor, "split").args[0] is shifted
    after = evaluate_program(program, program.examples)
    torch.testing.assert_close(after["a"], before["a"] * 3)


def test_replace_for_some_users_only(editor: Editor) -> None:
    other = editor.after(node(editor, "x")).call(aten.neg.default, node(editor, "x"))
    second = editor.before(editor.function.output_node).call(aten.abs.default, node(editor, "x"))
    editor.replace(node(editor, "x"), other, users=[second])
    assert second.args[0] is other
    assert node(editor, "linear").args[0] is node(editor, "x")


def test_replace_reaches_the_outputs(program: Program, editor: Editor) -> None:
    other = editor.call(aten.relu.default, node(editor, "getitem_1"))
    editor.replace(node(editor, "tanh"), other)
    assert editor.function.results["b"] is other
    assert [str(spec) for spec in editor.function.outputs] == [
        "a: float32[2, 4]",
        "b: float32[2, 4]",
    ]
    assert editor.erase_dead() == 1
    verify_program(program)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (aten.sum.dim_IntList, ([1],), "it is \\(\\(2,\\), torch.float32\\), not \\(\\(2, 4\\)"),
        (aten._to_copy.default, (), "torch.float16"),
        (aten.split.Tensor, (2, 1), "cannot replace"),
    ],
)
def test_replace_refuses_another_shape_or_type(
    editor: Editor, target: object, args: tuple[object, ...], message: str
) -> None:
    kwargs = {"dtype": torch.float16} if target is aten._to_copy.default else {}
    made = editor.call(target, node(editor, "getitem"), *args, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(PassError, match=message):
        editor.replace(node(editor, "tanh"), made)
    assert editor.function.results["b"] is node(editor, "tanh")


def test_replace_compares_every_part_of_several_values(editor: Editor) -> None:
    narrow = editor.after(node(editor, "linear")).call(
        aten.split.Tensor, node(editor, "linear"), 2, 1
    )
    with pytest.raises(PassError, match=r"'split_tensor.*' cannot replace 'split'"):
        editor.replace(node(editor, "split"), narrow)


def test_replace_refuses_a_user_that_comes_first(editor: Editor) -> None:
    late = editor.call(aten.neg.default, node(editor, "getitem_1"))
    with pytest.raises(PassError, match="for 'tanh', which comes before it"):
        editor.replace(node(editor, "getitem_1"), late)
    # The same from a value that does not come from the old one.
    other = editor.call(aten.neg.default, node(editor, "getitem"))
    with pytest.raises(PassError, match="which comes before it"):
        editor.replace(node(editor, "getitem_1"), other, users=[node(editor, "tanh")])


def test_set_argument(program: Program, editor: Editor) -> None:
    editor.set_argument(node(editor, "getitem"), 1, 1)
    verify_program(program)
    assert node(editor, "getitem").meta["provenance"].passes == ("mypass",)
    values = evaluate_program(program, program.examples)
    assert torch.equal(values["b"], values["a"].tanh())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, 2, "changes the shape of 'split'"),
        (2, 7, "refuses 7"),
        (3, 1, "no positional argument 3"),
    ],
)
def test_set_argument_refuses_what_does_not_fit(
    editor: Editor, index: int, value: int, message: str
) -> None:
    split = node(editor, "split")
    with pytest.raises(PassError, match=message):
        editor.set_argument(split, index, value)
    assert split.args == (node(editor, "linear"), 4, 1)


def test_erase_dead_takes_all_that_reaches_no_output(program: Program, editor: Editor) -> None:
    count = len(order(editor))
    unused = editor.call(aten.neg.default, editor.weight("w", WeightSpec((8, 4), torch.float32)))
    editor.call(aten.abs.default, unused)
    assert editor.erase_dead() == 3
    assert len(order(editor)) == count
    assert editor.erase_dead() == 0
    verify_program(program)


def test_an_unused_input_is_not_dead(editor: Editor) -> None:
    function = editor.function
    function.output_node.args = ((),)
    function.output_node.meta["names"] = ()
    editor.erase_dead()
    assert [item.op for item in editor.graph.nodes] == ["placeholder", "output"]


def test_copy_maps_inputs_and_takes_changes(editor: Editor) -> None:
    x = editor.after(node(editor, "x")).call(aten.neg.default, node(editor, "x"))
    mapping = {node(editor, "x"): x}
    editor.before(editor.function.output_node)
    same = editor.copy(node(editor, "linear"), lambda item: mapping.get(item, item))
    assert same.args[0] is x
    assert same.meta["provenance"] == node(editor, "linear").meta["provenance"].by("mypass")
    half = editor.copy(
        node(editor, "split"), lambda item: same, args=(node(editor, "linear"), 8, 1)
    )
    assert half.args == (same, 8, 1)
    assert [tuple(part.shape) for part in half.meta["val"]] == [(2, 8)]


def test_host_graphs_are_edited_alike(program: Program) -> None:
    editor = Editor(program.host, "mypass")
    (a,) = [item for item in program.host.operators() if item.args[1:] == ("a",)]
    assert a.target is operator.getitem
    editor.replace(a, editor.after(a).call(aten.mul.Tensor, a, 2.0))
    verify_program(program)
    with pytest.raises(PassError, match="cannot replace"):
        editor.replace(program.calls()[0], a)
