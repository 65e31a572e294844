"""Packages: shared weights, compared with coremltools' own linker; the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odsora_compiler.errors import LoweringError
from odsora_compiler.lowering.convert import convert
from odsora_compiler.lowering.interface import Names
from odsora_compiler.lowering.legalize import legalize
from odsora_compiler.lowering.link import Part, write_package
from odsora_compiler.lowering.quiet import quiet_coremltools
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package

C = 64
X = {"x": torch.randn(3, C, generator=torch.Generator().manual_seed(0))}
WEIGHT = torch.randn(C, C, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(C, C, generator=torch.Generator().manual_seed(2))


def base(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def variant(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(x, v).relu(), w)


@pytest.fixture
def part(captured: Any, tmp_path: Path) -> Callable[..., Part]:
    """`part(name, body, **weights)`: a converted function; weights in `tmp_path`/name."""

    def make(name: str, body: Callable[..., Tensor], **weights: Tensor) -> Part:
        function, store = legalize(*captured(body, X, **weights))
        converted = convert(function, store, tmp_path / name, "fp16")
        Names(function).restore(converted.specification)
        return Part.of_file(name, converted.specification, converted.weights)

    return make


def test_functions_share_equal_weights(part: Any, tmp_path: Path) -> None:
    parts = [part("base", base, w=WEIGHT), part("tdtm", variant, w=WEIGHT, v=OTHER)]
    size = write_package(tmp_path / "p.mlpackage", parts, "base")
    assert 2 * 2 * C * C < size < 2 * 2 * C * C + 1000
    package = Package.open(tmp_path / "p.mlpackage")
    assert package.default_function == "base"
    for name, expected in (
        ("base", base(X["x"], WEIGHT)),
        ("tdtm", variant(X["x"], WEIGHT, OTHER)),
    ):
        got = Interpreter(package, name).run(X)["out"]
        assert (got - expected).abs().max() < 2e-2 * expected.abs().max()
    places = {
        name: {reference.offset for _, reference in package.functions[name].blob_references()}
        for name in ("base", "tdtm")
    }
    # Each has a bias of zeros, too, that coremltools gives a linear operation.
    assert len(places["base"]) == 2 and len(places["tdtm"]) == 3 and places["base"] < places["tdtm"]


def test_equal_to_coremltools_own_multifunction_package(part: Any, tmp_path: Path) -> None:
    parts = [part("base", base, w=WEIGHT), part("tdtm", variant, w=WEIGHT, v=OTHER)]
    for item in parts:
        write_single(tmp_path / f"{item.name}.mlpackage", item)
    with quiet_coremltools() as ct:
        descriptor = ct.utils.MultiFunctionDescriptor()
        for item in parts:
            descriptor.add_function(str(tmp_path / f"{item.name}.mlpackage"), "main", item.name)
        descriptor.default_function_name = "base"
        ct.utils.save_multifunction(descriptor, str(tmp_path / "theirs.mlpackage"))
    write_package(tmp_path / "ours.mlpackage", parts, "base")
    ours, theirs = (
        tmp_path / f"{name}.mlpackage" / "Data" / "com.apple.CoreML" for name in ("ours", "theirs")
    )
    expected = specification_in(theirs)
    expected.description.ClearField("metadata")
    expected.mlProgram.attributes.clear()
    assert specification_in(ours) == expected
    weights = "weights/weight.bin"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()


def specification_in(data: Path) -> Any:
    with quiet_coremltools():
        from coremltools.proto import Model_pb2
    return Model_pb2.Model.FromString((data / "model.mlmodel").read_bytes())


def write_single(path: Path, part: Part) -> None:
    """A package as coremltools has it for one function: nameless, in the model's description."""
    with quiet_coremltools() as ct:
        model = ct.models.MLModel(
            part.specification,
            weights_dir=str(path.parent / part.name),
            skip_model_load=True,
        )
        model.save(str(path))


def test_same_functions_give_the_same_bytes(part: Any, tmp_path: Path) -> None:
    digests = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "p.mlpackage"
        write_package(
            path, [part("base", base, w=WEIGHT), part("b2", variant, w=WEIGHT, v=OTHER)], "b2"
        )
        files = sorted(file for file in path.rglob("*") if file.is_file())
        digests.append(
            [
                (
                    file.relative_to(path),
                    oct(file.stat().st_mode)[-3:],
                    hashlib.sha256(file.read_bytes()).hexdigest(),
                )
                for file in files
            ]
        )
    assert digests[0] == digests[1]
    assert [(str(name), mode) for name, mode, _ in digests[0]] == [
        ("Data/com.apple.CoreML/model.mlmodel", "644"),
        ("Data/com.apple.CoreML/weights/weight.bin", "644"),
        ("Manifest.json", "644"),
    ]


def test_manifest_is_read_by_coremltools(part: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.mlpackage"
    write_package(path, [part("base", base, w=WEIGHT)], "base")
    with quiet_coremltools() as ct:
        model = ct.models.MLModel(str(path), skip_model_load=True, function_name="base")
        assert [item.name for item in model.get_spec().description.functions] == ["base"]
        assert Path(model.weights_dir).is_dir()
    manifest = json.loads((path / "Manifest.json").read_text())
    assert len(manifest["itemInfoEntries"]) == 2


def test_unknown_default_is_refused(part: Any, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="default function 'tdtm'"):
        write_package(tmp_path / "p.mlpackage", [part("base", base, w=WEIGHT)], "tdtm")
