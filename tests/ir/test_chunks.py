"""Cutting functions where their nodes are marked, and running the pieces one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.chunks import ChunkedFunction, evaluate_chunked, split
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.program import Chunk, Component, Plan

Outputs = dict[str, Tensor]


class Model(nn.Module):
    """A forward function and the layers it uses, as `self.a`, `self.b`, …"""

    def __init__(self, forward: Callable[..., Outputs], **layers: nn.Module) -> None:
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, **inputs: Tensor) -> Outputs:
        return self.steps(self, **inputs)


def captured(forward: Callable[..., Outputs], **inputs: Tensor) -> tuple[Component, Outputs]:
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in "abcd"}
    spec = odsora.ModelSpec(Model(forward, **layers), inputs=inputs)
    return odsora.capture(spec).components["model"], inputs


def mark(component: Component, **chunks: int | None) -> None:
    """Put nodes into the chunks given by name; the others go with the node before them."""
    current: int | None = 0
    known = {node.name for node in component.functions["base"].operators()}
    assert chunks.keys() <= known, f"{chunks.keys() - known} not among {sorted(known)}"
    for node in component.functions["base"].operators():
        current = chunks.get(node.name, current)
        if current is not None:
            node.meta["chunk"] = current
    count = 1 + max(node.meta.get("chunk", 0) for node in component.functions["base"].operators())
    component.plan = Plan(
        1, "fp16", "by hand", tuple(Chunk(1, {"base": 1}, "by hand") for _ in range(count))
    )


def names(specs: Any) -> list[str]:
    return [spec.name for spec in specs]


def check(component: Component, inputs: Outputs) -> ChunkedFunction:
    base = component.functions["base"]
    chunked = split(base, component)
    expected = evaluate(base, component.weights, inputs)
    results = evaluate_chunked(chunked, component.weights, inputs)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    return chunked


def residual(self: Any, x: Tensor) -> Outputs:
    first = self.a(x)
    return {"y": first + self.c(torch.relu(self.b(first)))}


X = torch.linspace(-1, 1, 16).reshape(2, 8)


def test_without_a_plan_the_function_is_one_chunk() -> None:
    component, inputs = captured(residual, x=X)
    chunked = check(component, inputs)

    (chunk,) = chunked.chunks
    assert (chunk.inputs, chunk.outputs) == (chunked.whole.inputs, chunked.whole.outputs)
    assert chunk.weight_names() == chunked.whole.weight_names()


def test_values_pass_by_name_and_skip_chunks() -> None:
    component, inputs = captured(residual, x=X)
    mark(component, linear=0, linear_1=1, linear_2=2)
    chunked = check(component, inputs)

    first, second, third = chunked.chunks
    assert (names(first.inputs), names(first.outputs)) == (["x"], ["linear"])
    assert (names(second.inputs), names(second.outputs)) == (["linear"], ["relu"])
    assert (names(third.inputs), names(third.outputs)) == (["relu", "linear"], ["y"])
    assert [chunk.weight_names() for chunk in chunked.chunks] == [
        [f"{layer}.weight", f"{layer}.bias"] for layer in "abc"
    ]
    assert chunked.last_uses() == [["x"], [], ["relu", "linear"]]
    assert chunked.outputs == {"y": "y"}
    for chunk in chunked.chunks:
        chunk.graph.lint()


def test_inputs_reach_later_chunks_without_passing_through_earlier_ones() -> None:
    def forward(self: Any, x: Tensor, z: Tensor) -> Outputs:
        return {"y": self.b(self.a(x)) + z}

    component, inputs = captured(forward, x=X, z=2 * X)
    mark(component, linear=0, linear_1=1)
    chunked = check(component, inputs)

    assert [names(chunk.inputs) for chunk in chunked.chunks] == [["x"], ["z", "linear"]]


def test_pieces_that_do_the_same_get_their_inputs_in_the_same_order() -> None:
    def forward(self: Any, x: Tensor, z: Tensor) -> Outputs:
        early, kept = self.a(x), self.b(z)
        early = self.c(early) * kept
        return {"y": self.d(early) * kept}

    component, inputs = captured(forward, x=X, z=2 * X)
    mark(component, linear=0, linear_2=1, linear_3=2)
    chunked = check(component, inputs)

    assert names(chunked.chunks[1].inputs) == ["linear", "linear_1"]
    assert names(chunked.chunks[2].inputs) == ["mul", "linear_1"]


def test_an_output_named_like_an_input_does_not_overwrite_it() -> None:
    def step(self: Any, x: Tensor) -> Outputs:
        moved = self.a(x)
        return {"moved": moved, "v": self.b(moved) - x}

    component, inputs = captured(step, x=X)
    component.functions["base"].output_node.meta["names"] = ("x", "v")
    mark(component, linear=0, linear_1=1)
    chunked = check(component, inputs)

    assert chunked.outputs == {"x": "x_", "v": "v"}
    assert names(chunked.chunks[1].inputs) == ["x", "x_"]


def test_outputs_of_early_chunks_are_kept_and_may_be_read_again() -> None:
    def forward(self: Any, x: Tensor) -> Outputs:
        early = self.a(x)
        return {"early": early, "twice": early, "late": self.b(early), "given": x}

    component, inputs = captured(forward, x=X)
    mark(component, linear=0, linear_1=1)
    chunked = check(component, inputs)

    assert chunked.outputs == {"early": "early", "twice": "early", "late": "late", "given": "x"}
    assert chunked.last_uses() == [[], []]


def test_values_without_a_chunk_are_made_where_they_are_used() -> None:
    def forward(self: Any, x: Tensor) -> Outputs:
        table = torch.cos(torch.arange(8) * self.d.bias)
        return {"y": self.b(self.a(x) * table) * table, "table": table}

    component, inputs = captured(forward, x=X)
    mark(component, arange=None, linear=0, linear_1=1)
    chunked = check(component, inputs)

    first, second = chunked.chunks
    assert names(first.outputs) == ["mul_1"]
    assert "d.bias" in first.weight_names()
    assert "d.bias" in second.weight_names()
    assert names(second.inputs) == ["mul_1"]
    assert set(names(second.outputs)) == {"y", "table"}


def test_a_chunk_may_have_no_part_of_a_function() -> None:
    component, inputs = captured(residual, x=X)
    mark(component, linear=0, linear_1=2)
    chunked = check(component, inputs)

    assert list(chunked.chunks[1].operators()) == []
    assert chunked.chunks[1].inputs == chunked.chunks[1].outputs == ()


def test_the_parts_of_one_operator_stay_with_it() -> None:
    def forward(self: Any, x: Tensor) -> Outputs:
        left, right = self.a(x).split(4, dim=-1)
        return {"y": self.b(torch.cat([right, left], dim=-1))}

    component, inputs = captured(forward, x=X)
    mark(component, linear=0, cat=1)
    check(component, inputs)
    mark(component, linear=0, getitem=1)
    with pytest.raises(VerificationError, match="splits 'split' from the node that takes its part"):
        split(component.functions["base"], component)


def test_a_node_added_after_cutting_is_named() -> None:
    component, _ = captured(residual, x=X)
    mark(component, linear=0, linear_1=1)
    (relu,) = [n for n in component.functions["base"].operators() if n.name == "relu"]
    del relu.meta["chunk"]

    with pytest.raises(VerificationError, match="'relu' belongs to no chunk, but needs 'linear_1'"):
        split(component.functions["base"], component)


def test_values_are_freed_after_their_last_use() -> None:
    def forward(self: Any, x: Tensor) -> Outputs:
        return {"y": self.d(self.c(self.b(self.a(x))))}

    component, inputs = captured(forward, x=X)
    mark(component, linear=0, linear_1=1, linear_2=2, linear_3=3)
    chunked = check(component, inputs)

    assert chunked.last_uses() == [["x"], ["linear"], ["linear_1"], ["linear_2"]]
