"""Running functions: rounding, lifetimes, callbacks, and errors that name what is wrong."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2
from mil_programs import OPSET, mb, save

from odsora_compiler.errors import RunError, UnsupportedOpError
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.ops.table import OPS
from odsora_compiler.mil.package import Package


def packaged(path: Path, program: Any, *specs: Any) -> Package:
    """Save a MIL program as it is and open it."""
    made = mb.program(input_specs=list(specs), opset_version=OPSET)(program)
    save(made, path, pass_pipeline=ct.PassPipeline.EMPTY)
    return Package.open(path)


def half(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.fp16)


def there_and_back(x: Any) -> Any:
    up = mb.add(x=x, y=np.float16(1), name="up")
    return mb.sub(x=up, y=np.float16(1), name="back")


def test_storage_rounds_after_every_operation_and_fp32_never(tmp_path: Path) -> None:
    package = packaged(tmp_path / "a.mlpackage", there_and_back, half(3))
    x = torch.tensor([2**-12, 2**-10, 3 * 2**-11]).half()
    stored = Interpreter(package).run({"x": x})["back"]
    assert stored.dtype == torch.float16
    assert stored.tolist() == [0.0, 2**-10, 2**-9]
    wide = Interpreter(package, compute="fp32").run({"x": x})["back"]
    assert wide.dtype == torch.float32
    assert torch.equal(wide, x.float())


def test_storage_overflows_where_fp16_does(tmp_path: Path) -> None:
    def program(x: Any) -> Any:
        return mb.mul(x=mb.square(x=x), y=np.float16(2**-10), name="out")

    package = packaged(tmp_path / "a.mlpackage", program, half(2))
    x = {"x": torch.tensor([10.0, 1000.0])}
    assert Interpreter(package).run(x)["out"].tolist() == [100 / 1024, float("inf")]
    assert Interpreter(package, compute="fp32").run(x)["out"].tolist() == [100 / 1024, 1e6 / 1024]


def test_every_value_is_shown_by_name_in_order(tmp_path: Path) -> None:
    def program(x: Any) -> Any:
        first, second = mb.split(x=mb.log(x=x, name="logarithm"), num_splits=2, axis=0, name="s")
        return mb.add(x=first, y=second, name="sum")

    package = packaged(tmp_path / "a.mlpackage", program, half(2, 3))
    seen: list[tuple[str, str, torch.Tensor]] = []
    inputs = {"x": torch.tensor([[1.0, 2.0, 3.0], [4.0, -1.0, 6.0]])}
    Interpreter(package).run(inputs, on_value=lambda *value: seen.append(value))
    assert [(name, kind) for name, kind, _ in seen] == [
        ("logarithm", "log"),
        ("s_0", "split"),
        ("s_1", "split"),
        ("sum", "add"),
    ]
    first_nan = next(name for name, _, tensor in seen if tensor.isnan().any())
    assert first_nan == "logarithm"


def test_values_are_dropped_after_their_last_use(tmp_path: Path) -> None:
    def program(x: Any) -> Any:
        value = x
        for step in range(4):
            value = mb.add(x=value, y=np.float16(1), name=f"step_{step}")
        unused = mb.mul(x=x, y=np.float16(2), name="unused")
        del unused
        return mb.mul(x=value, y=np.float16(2), name="out")

    package = packaged(tmp_path / "a.mlpackage", program, half(3))
    alive: dict[str, Any] = {}
    found: dict[str, list[str]] = {}

    def watch(name: str, kind: str, tensor: torch.Tensor) -> None:
        found[name] = [other for other, reference in alive.items() if reference() is not None]
        alive[name] = weakref.ref(tensor)

    Interpreter(package).run({"x": torch.zeros(3)}, on_value=watch)
    assert found["step_3"] == ["step_2"]
    assert found["out"] == ["step_3"]


def test_runs_repeat_and_leave_inputs_and_weights_alone(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16)

    def program(x: Any) -> Any:
        same = mb.linear(x=mb.identity(x=x), weight=weight, name="out")
        return same, mb.identity(x=x, name="same"), mb.const(val=weight, name="weight")

    package = packaged(tmp_path / "a.mlpackage", program, half(4, 8))
    interpreter = Interpreter(package)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    kept = x.clone()
    first = interpreter.run({"x": x})
    interpreter.release()
    second = interpreter.run({"x": x})
    assert torch.equal(x, kept)
    for name in ("out", "same"):
        assert torch.equal(first[name], second[name])
    torch.testing.assert_close(first["out"], x @ torch.tensor(weight).T, rtol=2e-3, atol=2e-3)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_weights_leave_memory(tmp_path: Path) -> None:
    size, layers = 1024, 6
    weights = [np.full((size, size), 0.001 * k, np.float16) for k in range(1, layers + 1)]

    def program(x: Any) -> Any:
        for weight in weights:
            x = mb.linear(x=x, weight=weight)
        return mb.identity(x=x, name="out")

    interpreter = Interpreter(packaged(tmp_path / "a.mlpackage", program, half(1, size)))
    inputs = {"x": torch.ones(1, size)}
    before = anonymous_bytes()
    first = interpreter.run(inputs)["out"]
    held = anonymous_bytes() - before
    interpreter.release()
    left = anonymous_bytes() - before
    fp32_bytes = 4 * layers * size**2
    assert held > 0.9 * fp32_bytes
    assert left < 0.1 * fp32_bytes
    assert torch.equal(interpreter.run(inputs)["out"], first)


@pytest.mark.parametrize("go", [1, 0])
def test_cond_runs_the_branch_taken(tmp_path: Path, go: int) -> None:
    def program(x: Any, go: Any) -> Any:
        shared = mb.add(x=x, y=np.float16(1), name="shared")
        # A branch's own constants and its outer values; `shared` is used nowhere else.
        out = mb.cond(
            pred=mb.cast(x=mb.squeeze(x=go), dtype="bool"),
            _true_fn=lambda: mb.mul(x=shared, y=np.float16(3)),
            _false_fn=lambda: mb.sub(x=mb.square(x=shared), y=x),
        )
        return mb.identity(x=out, name="out")

    package = packaged(
        tmp_path / "a.mlpackage", program, half(3), mb.TensorSpec(shape=(1,), dtype=types.int32)
    )
    x = torch.tensor([1.0, 2.0, 3.0])
    kinds: list[str] = []
    interpreter = Interpreter(package)
    inputs = {"x": x, "go": torch.tensor([go])}
    out = interpreter.run(inputs, on_value=lambda name, kind, value: kinds.append(kind))["out"]
    assert out.tolist() == ((x + 1) * 3 if go else (x + 1) ** 2 - x).tolist()
    assert ("square" in kinds) != bool(go)
    assert torch.equal(interpreter.run(inputs)["out"], out)


def test_missing_operations_are_all_named_before_anything_runs(tmp_path: Path) -> None:
    def program(x: Any) -> Any:
        shape = mb.shape(x=x)
        noise = mb.random_normal(
            shape=shape, mean=np.float16(0), stddev=np.float16(1), name="noise"
        )
        more = mb.random_normal(shape=shape, mean=np.float16(0), stddev=np.float16(1), name="more")
        coin = mb.random_bernoulli(shape=shape, prob=np.float16(0.5), name="coin")
        return mb.add(x=mb.add(x=noise, y=more), y=mb.add(x=coin, y=x))

    package = packaged(tmp_path / "a.mlpackage", program, half(2))
    with pytest.raises(UnsupportedOpError) as caught:
        Interpreter(package)
    message = str(caught.value)
    assert "random_normal (noise and 1 more)" in message
    assert "random_bernoulli (coin)" in message
    assert "function main of package" in message
    assert "a.mlpackage" in message


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    def program(x: Any, count: Any) -> Any:
        return mb.add(x=x, y=mb.cast(x=count, dtype="fp16"), name="out")

    path = tmp_path_factory.mktemp("adder") / "a.mlpackage"
    return Interpreter(
        packaged(path, program, half(2, 3), mb.TensorSpec(shape=(3,), dtype=types.int32))
    )


def test_inputs_are_converted_within_their_kind(adder: Interpreter) -> None:
    out = adder.run({"x": torch.ones(2, 3, dtype=torch.float64), "count": torch.arange(3)})["out"]
    assert out.dtype == torch.float16
    assert out.tolist() == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ({"x": torch.ones(2, 3)}, "lacks its input 'count'", "x, count"),
        (
            {"x": torch.ones(2, 3), "count": torch.arange(3), "xx": torch.ones(1)},
            "has no input 'xx'",
            "'x'",
        ),
        ({"x": torch.ones(3, 2), "count": torch.arange(3)}, r"'x' .* has shape \[3, 2\]", "[2, 3]"),
        ({"x": torch.ones(2, 3), "count": torch.ones(3)}, "'count' .* is torch.float32", "int32"),
        (
            {"x": torch.ones(2, 3).bool(), "count": torch.arange(3)},
            "'x' .* is torch.bool",
            "fp16",
        ),
    ],
)
def test_wrong_inputs_are_named(
    adder: Interpreter, inputs: dict[str, torch.Tensor], message: str, hint: str
) -> None:
    with pytest.raises(RunError, match=message) as caught:
        adder.run(inputs)
    assert hint in caught.value.hint
    assert "function main of package" in caught.value.message


def test_an_output_of_another_shape_than_declared_is_an_error(tmp_path: Path) -> None:
    packaged(tmp_path / "a.mlpackage", there_and_back, half(3))
    file = tmp_path / "a.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    (up,) = [op for op in block.operations if op.outputs[0].name == "up"]
    up.outputs[0].type.tensorType.dimensions[0].constant.size = 4
    file.write_bytes(model.SerializeToString())
    interpreter = Interpreter(Package.open(tmp_path / "a.mlpackage"))
    with pytest.raises(RunError, match=r"operation add \(up\) of function main .* declares \[4\]"):
        interpreter.run({"x": torch.zeros(3)})


def test_a_wrong_compute_type_is_refused(adder: Interpreter) -> None:
    with pytest.raises(ValueError, match="fp64"):
        Interpreter(adder.package, compute="fp64")  # type: ignore[arg-type]


def test_every_operation_has_a_conformance_case() -> None:
    text = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    missing = [op for op in OPS if f"mb.{op}(" not in text and f'"{op}"' not in text]
    assert not missing
