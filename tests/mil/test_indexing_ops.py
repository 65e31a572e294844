"""Gathers and scatters against numpy loops and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mil_programs import Case, build_package, case, conformance_test, mb, numbers

from odsora_compiler.errors import RunError
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.ops.table import OPS
from odsora_compiler.mil.package import Package

X = numbers(4, 5, 6)
INTS = torch.arange(24, dtype=torch.int32).reshape(4, 6)
MODES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "update": lambda old, new: new,
}


def at(data: np.ndarray, index: object, updates: np.ndarray, mode: str) -> None:
    """Apply updates one after another, repeated positions included."""
    for position in np.ndindex(*np.broadcast_shapes(*(np.shape(i) for i in index))):
        where = tuple(
            np.broadcast_to(i, np.shape(updates)[: len(position)])[position] for i in index
        )
        data[where] = MODES[mode](data[where], updates[position])


def scatter_case(mode: str) -> Case:
    # Repeated positions, but for updates, where the order would matter.
    indices = torch.tensor([3, 0, 1] if mode == "update" else [3, 0, 3])

    def expect(data: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        out = data.numpy().copy()
        moved = np.moveaxis(out, 1, 0)
        at(moved, (indices.numpy(),), np.moveaxis(updates.numpy(), 1, 0), mode)
        return torch.tensor(out)

    return case(
        f"scatter_{mode}",
        lambda f, data, updates: mb.scatter(
            data=data, indices=np.int32(indices), updates=updates, axis=-2, mode=mode
        ),
        expect,
        data=(2, 5, 3),
        updates=numbers(2, 3, 3).sign() * 2,
    )


def scatter_along_case(mode: str) -> Case:
    indices = torch.tensor([[0, 2, 1], [4, 0, 3]] if mode == "update" else [[0, 2, 1], [4, 2, 1]])

    def expect(data: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        out = data.numpy().copy()
        at(out, (indices.numpy(), np.arange(3)[None, :]), updates.numpy(), mode)
        return torch.tensor(out)

    return case(
        f"scatter_along_{mode}",
        lambda f, data, updates: mb.scatter_along_axis(
            data=data, indices=np.int32(indices), updates=updates, axis=0, mode=mode
        ),
        expect,
        data=(5, 3),
        updates=numbers(2, 3).sign() * 2,
    )


def scatter_nd_case(mode: str) -> Case:
    indices = torch.tensor([[0, 1], [2, 3], [1, 1] if mode == "update" else [0, 1]])

    def expect(data: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        out = data.numpy().copy()
        at(out, (indices[:, 0].numpy(), indices[:, 1].numpy()), updates.numpy(), mode)
        return torch.tensor(out)

    return case(
        f"scatter_nd_{mode}",
        lambda f, data, updates: mb.scatter_nd(
            data=data, indices=np.int32(indices), updates=updates, mode=mode
        ),
        expect,
        data=(3, 4, 2),
        updates=numbers(3, 2).sign() * 2,
    )


def test_scatter_of_nothing_changes_nothing() -> None:
    """As where no element fits a condition: the positions come out of `non_zero`."""
    data = numbers(3, 4, 2)
    for depth in (1, 2, 3):
        indices = torch.empty(0, depth, dtype=torch.int32)
        updates = torch.empty(0, *data.shape[depth:], dtype=data.dtype)
        out = OPS["scatter_nd"].function(data, indices, updates, "update")
        assert torch.equal(out, data)


def take(x: torch.Tensor, indices: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.tensor(np.take(x.numpy(), indices.numpy(), axis))


CASES = [
    case(
        "gather",
        lambda f, x, i: mb.gather(x=x, indices=i),
        lambda x, i: take(x, i, 0),
        x=X,
        i=torch.tensor([[3, 0], [1, 1]]),
    ),
    case(
        "gather_axis",
        lambda f, x, i: mb.gather(x=x, indices=i, axis=-1),
        lambda x, i: take(x, i, 2),
        x=X,
        i=torch.tensor([5, 0, 2]),
    ),
    case(
        "gather_of_negative",
        lambda f, x, i: mb.gather(x=x, indices=i, axis=1),
        lambda x, i: take(x, i, 1),
        x=X,
        i=torch.tensor([-1, 0, -5]),
    ),
    case(
        "gather_uint16",
        lambda f, x: mb.gather(x=x, indices=np.array([3, 2, 2], np.uint16), axis=0),
        lambda x: x[[3, 2, 2]],
        x=X,
    ),
    case(
        "gather_scalar",
        lambda f, x: mb.gather(x=x, indices=2, axis=1),
        lambda x: x[:, 2],
        x=X,
    ),
    case(
        "gather_int",
        lambda f, x: mb.gather(x=x, indices=[1, 0], axis=0),
        lambda x: x[[1, 0]],
        x=INTS,
    ),
    case(
        "gather_batches",
        lambda f, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        lambda x, i: torch.stack([row[:, index.long()] for row, index in zip(x, i, strict=True)]),
        x=(2, 3, 5),
        i=torch.tensor([[4, 0], [1, 2]]),
    ),
    case(
        "gather_two_batches",
        lambda f, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=2),
        lambda x, i: torch.stack(
            [
                torch.stack([r[k.long()] for r, k in zip(a, b, strict=True)])
                for a, b in zip(x, i, strict=True)
            ]
        ),
        x=(2, 3, 5, 2),
        i=torch.tensor([[[4], [0], [1]], [[2], [2], [3]]]),
    ),
    case(
        "gather_along_axis",
        lambda f, x, i: mb.gather_along_axis(x=x, indices=i, axis=-1),
        lambda x, i: torch.tensor(np.take_along_axis(x.numpy(), i.numpy(), -1)),
        x=(3, 5),
        i=torch.tensor([[4, 0, 2, 1], [1, 1, 0, 3], [0, 4, 4, 2]]),
    ),
    case(
        "gather_nd",
        lambda f, x, i: mb.gather_nd(x=x, indices=i),
        lambda x, i: torch.stack([x[3, 0], x[1, 4], x[0, 0]]),
        x=X,
        i=torch.tensor([[3, 0], [1, 4], [0, 0]]),
    ),
    case(
        "gather_nd_batches",
        lambda f, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
        lambda x, i: torch.stack([x[0, 2], x[1, 0], x[2, 4], x[3, 3]]),
        x=X,
        i=torch.tensor([[2], [0], [4], [3]]),
    ),
    *(make(mode) for make in (scatter_case, scatter_along_case, scatter_nd_case) for mode in MODES),
]

test_operation = conformance_test(CASES)


def test_validated_index_outside_of_the_axis_is_an_error(tmp_path: Path) -> None:
    checked = case(
        "checked",
        lambda f, x, i: mb.gather(x=x, indices=i, axis=0, validate_indices=True),
        lambda x, i: x[i],
        x=(3, 2),
        i=torch.tensor([0, 3]),
    )
    build_package(tmp_path / "a.mlpackage", [checked], "fp32")
    interpreter = Interpreter(Package.open(tmp_path / "a.mlpackage"))
    inputs = {f"checked_{name}": value for name, value in checked.inputs.items()}
    with pytest.raises(RunError, match=r"operation gather .* outside of 0 to 2"):
        interpreter.run(inputs)
