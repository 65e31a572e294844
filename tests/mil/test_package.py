"""Opening packages: what they say about themselves, and what is said about damaged ones."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2
from mil_programs import OPSET, Case, case, conformance_test, convert_module, mb, save

from odsora_compiler.errors import OdsoraError, PackageError
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import BlobReference, Package


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


class Doubled(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(2 * x)


X = {"x": torch.linspace(-1, 1, 3 * 16).reshape(3, 16)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of two functions, `base` (the default) and `double`, of one weight."""
    folder = tmp_path_factory.mktemp("saved")
    convert_module(Layer(), X, folder / "a.mlpackage", "fp16")
    convert_module(Doubled(), X, folder / "b.mlpackage", "fp16")
    descriptor = ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(folder / "a.mlpackage"), "main", "base")
    descriptor.add_function(str(folder / "b.mlpackage"), "main", "double")
    descriptor.default_function_name = "base"
    ct.utils.save_multifunction(descriptor, str(folder / "both.mlpackage"))
    return folder / "both.mlpackage"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy.mlpackage"))


def model_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/model.mlmodel"


def weights_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def edit(package: Path, change: Callable[[Any], None]) -> None:
    model = Model_pb2.Model()
    model.ParseFromString(model_file(package).read_bytes())
    change(model)
    model_file(package).write_bytes(model.SerializeToString())


def body(model: Any, function: str = "base") -> Any:
    (block,) = model.mlProgram.functions[function].block_specializations.values()
    return block


def test_functions_and_their_signatures(saved: Path) -> None:
    package = Package.open(saved)
    assert list(package.functions) == ["base", "double"]
    assert package.default_function == "base"
    assert package.specification_version == 9
    base = package.function()
    assert base.name == "base"
    assert base.opset == "CoreML8"
    assert [(v.name, v.dtype, v.shape) for v in base.inputs] == [("x", "fp32", (3, 16))]
    (output,) = base.outputs
    assert (output.dtype, output.shape, output.torch_dtype) == ("fp16", (3, 24), torch.float16)


def test_functions_share_one_mapping_of_their_weights(saved: Path) -> None:
    package = Package.open(saved)
    one, two = (dict(f.blob_references()) for f in package.functions.values())
    (name,) = [n for n, r in one.items() if r.shape == (24, 16)]
    (other,) = [n for n, r in two.items() if r.shape == (24, 16)]
    first, second = package.tensor(one[name]), package.tensor(two[other])
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, Layer().linear.weight.half())


def test_converted_weights_are_shared_while_held_and_then_dropped(saved: Path) -> None:
    package = Package.open(saved)
    (reference,) = [r for _, r in package.function().blob_references() if r.shape == (24, 16)]
    held = package.tensor(reference, torch.float32)
    assert package.tensor(reference, torch.float32).data_ptr() == held.data_ptr()
    again = [Interpreter(package, name) for name in package.functions]
    for interpreter in again:
        interpreter.run(X)
    held[0, 0] = 100.0
    for interpreter in again:
        # Reads what the first holder reads, until everyone has let go.
        (out,) = interpreter.run(X).values()
        assert out.abs().max() > 10
        interpreter.release()
    del held
    assert package.tensor(reference, torch.float32)[0, 0] != 100.0


def test_both_functions_compute(saved: Path) -> None:
    package = Package.open(saved)
    for name, module in (("base", Layer()), ("double", Doubled())):
        (got,) = Interpreter(package, name).run(X).values()
        torch.testing.assert_close(got.float(), module(**X), rtol=2e-3, atol=2e-3)


def test_opening_reads_no_weights(copy: Path) -> None:
    weights_file(copy).unlink()
    package = Package.open(copy)
    assert len(list(package.function().blob_references())) == 2
    with pytest.raises(PackageError, match=r"weight\.bin is missing"):
        Interpreter(package)


def test_unknown_function_suggests_the_nearest(saved: Path) -> None:
    with pytest.raises(PackageError, match="'doubel'") as caught:
        Package.open(saved).function("doubel")
    assert "'double'" in caught.value.hint


def manifest_without_root(text: str) -> str:
    return json.dumps({**json.loads(text), "rootModelIdentifier": "nobody"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "copy.mlpackage is missing"),
        (lambda p: (p / "Manifest.json").unlink(), "Manifest.json is missing"),
        (lambda p: (p / "Manifest.json").write_text("{"), "Manifest.json cannot be read"),
        (lambda p: (p / "Manifest.json").write_text("[]"), "Manifest.json cannot be read"),
        (
            lambda p: (p / "Manifest.json").write_text(
                manifest_without_root((p / "Manifest.json").read_text())
            ),
            "Manifest.json cannot be read",
        ),
        (lambda p: model_file(p).unlink(), "model.mlmodel is missing"),
        (
            lambda p: model_file(p).write_bytes(model_file(p).read_bytes()[:-100]),
            "cannot be parsed",
        ),
        (lambda p: model_file(p).write_bytes(b"\xff" * 50), "cannot be parsed"),
        (lambda p: model_file(p).write_bytes(b""), "holds no ML program"),
        (lambda p: edit(p, lambda m: m.mlProgram.functions.clear()), "has no functions"),
    ],
)
def test_a_damaged_package_does_not_open(
    copy: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(copy)
    with pytest.raises(PackageError, match=message) as caught:
        Package.open(copy)
    assert str(copy) in str(caught.value)


def swap_offset(model: Any) -> None:
    for operation in body(model).operations:
        value = operation.attributes["val"]
        if value.HasField("blobFileValue"):
            value.blobFileValue.offset += 64
            return


def change_dtype(model: Any) -> None:
    for operation in body(model).operations:
        value = operation.attributes["val"]
        if value.HasField("blobFileValue"):
            value.type.tensorType.dataType = 11
            return


def leave_the_package(model: Any) -> None:
    for operation in body(model).operations:
        value = operation.attributes["val"]
        if value.HasField("blobFileValue"):
            value.blobFileValue.fileName = "@model_path/../../../secret"
            return


def forget_an_operation(model: Any) -> None:
    operations = body(model).operations
    (index,) = [k for k, op in enumerate(operations) if op.type == "linear"]
    del operations[index]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: weights_file(p).write_bytes(weights_file(p).read_bytes()[:-10]),
            "ends inside the blob",
        ),
        (lambda p: weights_file(p).write_bytes(b"\0" * 500), "has version 0"),
        (lambda p: edit(p, swap_offset), "has no blob at offset"),
        (lambda p: edit(p, change_dtype), "of type float16, the specification says .* of fp32"),
        (lambda p: edit(p, leave_the_package), "outside of itself"),
        (lambda p: edit(p, forget_an_operation), "uses a value that nothing computes before"),
        (
            lambda p: edit(
                p, lambda m: m.mlProgram.functions["base"].block_specializations.clear()
            ),
            "has no body for CoreML8",
        ),
        (
            lambda p: edit(p, lambda m: body(m).outputs.append("nothing")),
            "never computes nothing",
        ),
    ],
)
def test_a_damaged_function_is_refused_before_it_runs(
    copy: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(copy)
    with pytest.raises(PackageError, match=message) as caught:
        Interpreter(Package.open(copy))
    assert "copy.mlpackage" in str(caught.value)


def test_random_damage_never_ends_in_another_error(copy: Path) -> None:
    data = model_file(copy).read_bytes()
    seed = 0
    print(f"seed {seed}")
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 4])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        model_file(copy).write_bytes(bytes(damaged))
        try:
            Interpreter(Package.open(copy)).run(X)
            outcomes["unharmed"] += 1
        except OdsoraError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 150


def test_reading_needs_no_coremltools(saved: Path) -> None:
    program = (
        "import sys, torch\n"
        "from odsora_compiler.mil.interpreter import Interpreter\n"
        "from odsora_compiler.mil.package import Package\n"
        "Interpreter(Package.open(sys.argv[1])).run({'x': torch.zeros(3, 16)})\n"
        "assert 'coremltools' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(saved)], check=True)


def test_stateful_package_is_refused(tmp_path: Path) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(2,)), mb.StateTensorSpec((2,), dtype=types.fp16)],
        opset_version=OPSET,
    )
    def program(x: Any, memory: Any) -> Any:
        return mb.add(x=x, y=mb.cast(x=mb.read_state(input=memory), dtype="fp32"))

    save(program, tmp_path / "a.mlpackage")
    with pytest.raises(PackageError, match="keeps state in memory"):
        Interpreter(Package.open(tmp_path / "a.mlpackage"))


def test_values_may_stand_in_the_arguments_themselves(copy: Path) -> None:
    """The form newer converters write: no const operation, but a value bound to the argument."""

    def inline(model: Any) -> None:
        operations = body(model).operations
        consts = {
            op.outputs[0].name: op.attributes["val"] for op in operations if op.type == "const"
        }
        for operation in operations:
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.name in consts:
                        binding.value.CopyFrom(consts[binding.name])
        kept = [op for op in operations if op.type != "const"]
        del operations[:]
        operations.extend(kept)

    (before,) = Interpreter(Package.open(copy)).run(X).values()
    edit(copy, inline)
    package = Package.open(copy)
    assert "const" not in {op.type for op in package.function().block.operations}
    assert len(list(package.function().blob_references())) == 2
    (after,) = Interpreter(package).run(X).values()
    assert torch.equal(before, after)


def test_strings_and_lists_are_plain_python(copy: Path) -> None:
    def add_list(model: Any) -> None:
        from coremltools.converters.mil.backend.mil.helper import create_list_scalarvalue

        const = body(model).operations.add(type="const")
        const.outputs.add(name="names")
        const.attributes["val"].CopyFrom(create_list_scalarvalue(["b", "c"], str))

    edit(copy, add_list)
    last = Package.open(copy).function().block.operations[-1]
    value = last.attributes["val"]
    assert not isinstance(value, BlobReference)
    assert value.python() == ["b", "c"]


def constants(dtype: str, low: int, high: int) -> list[Case]:
    """A constant of a type, small enough to stand in the specification and too large for it."""
    numpy_type = types.nptype_from_builtin(types.string_to_builtin(dtype))
    cases = []
    for place, count in (("inline", 7), ("in_a_file", 37)):
        values = torch.linspace(low, high, count).round()
        cases.append(
            case(
                f"{dtype}_{place}",
                lambda f, x, v=values: mb.add(
                    x=x, y=mb.cast(x=mb.const(val=v.numpy().astype(numpy_type)), dtype="int32")
                ),
                lambda x, v=values: v.int(),
                x=torch.zeros(count, dtype=torch.int32),
            )
        )
    return cases


test_constant = conformance_test(
    [
        *constants("fp16", -9, 9),
        *constants("fp32", -9, 9),
        *constants("int8", -128, 127),
        *constants("uint8", 0, 255),
        *constants("int16", -(2**15), 2**15 - 1),
        *constants("uint16", 0, 2**16 - 1),
        *constants("int32", -(2**20), 2**20),
        *constants("bool", 0, 1),
        case(
            "scalars",
            lambda f, x: mb.select(cond=np.bool_(True), a=mb.add(x=x, y=f(1.5)), b=x),
            lambda x: x + 1.5,
            x=(3,),
        ),
        case(
            "empty",
            lambda f, x: mb.concat(values=(x, f(np.zeros((0, 3)))), axis=0),
            lambda x: x,
            x=(2, 3),
        ),
    ]
)
