"""Compressed weights: look-up tables in the package, as coremltools would write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.weights import EncodedWeights, LookupTable
from odsora_compiler.lowering.quiet import quiet_coremltools

C = 32
X = {"x": torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0))}


def table(bits: int, groups: int = 1, axis: int = 0, scale: float = 0.2) -> LookupTable:
    random = torch.Generator().manual_seed(bits + groups)
    indices = torch.randint(0, 1 << bits, (2 * C, C), generator=random).to(torch.uint8)
    values = torch.randn(groups, 1 << bits, generator=random) * scale
    return LookupTable(bits, indices, values, axis)


def body(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).relu()


@pytest.fixture
def encoded(captured: Any) -> Any:
    def make(compressed: LookupTable, function: Any = body) -> Any:
        graph, weights = captured(
            function,
            X,
            w=torch.zeros(2 * C, C),
            b=torch.randn(2 * C, generator=torch.Generator().manual_seed(5)),
        )
        return graph, EncodedWeights(weights, {"w": compressed})

    return make


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("bits", "groups", "axis"),
    [
        (1, 1, 0),
        (2, 1, 0),
        (3, 4, 0),
        (4, 1, 0),
        (4, 8, 0),
        (4, 2, 1),
        (5, 1, 0),
        (6, 2, 0),
        (8, 1, 0),
    ],
)
def test_compressed_weight_computes_what_its_table_says(
    bits: int, groups: int, axis: int, precision: str, encoded: Any, lowered: Any, run: Any
) -> None:
    function, weights = encoded(table(bits, groups, axis))
    report = lowered(function, weights, precision)
    assert report.dense == ()
    expected = evaluate(function, weights, X)["out"]
    got = run(report, X)["out"]
    tolerance = 1e-5 if precision == "fp32" else 4e-3
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    stored = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 8: 8}[bits]
    lut = groups * (1 << stored) * 4
    assert report.weight_bytes <= 2 * C * C * stored // 8 + lut + 2 * C * 4 + 512


def test_operation_is_the_one_coremltools_makes(encoded: Any, lowered: Any, tmp_path: Path) -> None:
    function, weights = encoded(table(4))
    report = lowered(function, weights, "fp16")
    dense = lowered(function, weights._dense, "fp16")
    with quiet_coremltools() as ct:
        from coremltools.optimize import coreml as optimize

        ours = _specification(report.path)
        model = _single(ct, _specification(dense.path), dense.path)
        config = optimize.OptimizationConfig(
            global_config=optimize.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=100)
        )
        theirs = optimize.palettize_weights(model, config).get_spec()
    (mine,) = _tables(ours.mlProgram.functions["base"])
    (other,) = _tables(theirs.mlProgram.functions["main"])
    for name in ("indices", "lut"):
        (a,), (b,) = mine.inputs[name].arguments, other.inputs[name].arguments
        assert a.value.type == b.value.type
        assert a.value.WhichOneof("value") == b.value.WhichOneof("value")
        assert a.value.blobFileValue.fileName == b.value.blobFileValue.fileName
    assert set(mine.inputs) == set(other.inputs)
    assert set(mine.attributes) == set(other.attributes)
    assert mine.outputs[0].type == other.outputs[0].type


def _specification(path: Path) -> Any:
    from coremltools.proto import Model_pb2

    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    return Model_pb2.Model.FromString(file.read_bytes())


def _single(ct: Any, specification: Any, path: Path) -> Any:
    """The multifunction specification as one of a single function, which can be palettized."""
    made = type(specification)()
    made.CopyFrom(specification)
    (function,) = made.description.functions
    made.description.input.extend(function.input)
    made.description.output.extend(function.output)
    made.description.ClearField("functions")
    made.description.ClearField("defaultFunctionName")
    made.mlProgram.functions["main"].CopyFrom(made.mlProgram.functions.pop("base"))
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    return ct.models.MLModel(made, weights_dir=str(weights), skip_model_load=True)


def _tables(function: Any) -> list[Any]:
    (block,) = function.block_specializations.values()
    return [item for item in block.operations if item.type == "constexpr_lut_to_dense"]


def test_compressed_weight_that_stands_transposed_is_written_dense(
    encoded: Any, lowered: Any, run: Any
) -> None:
    def transposed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.cat([x, x], -1) @ w + b[:C]

    function, weights = encoded(table(4), transposed)
    report = lowered(function, weights, "fp32")
    assert report.dense == ("w",)
    got = run(report, X)["out"]
    torch.testing.assert_close(got, evaluate(function, weights, X)["out"], rtol=1e-4, atol=1e-4)


def test_table_beyond_half_precision_is_written_dense(encoded: Any, lowered: Any) -> None:
    function, weights = encoded(table(4, scale=1e6))
    report = lowered(function, weights, "fp16")
    assert report.dense == ("w",)
    assert "weight 'w' has values beyond half precision" in report.functions["base"].reason


def test_table_of_too_many_bits_is_refused(encoded: Any, lowered: Any) -> None:
    function, weights = encoded(replace(table(4), bits=9))
    with pytest.raises(LoweringError, match="weight 'w' has a look-up table of 9 bits"):
        lowered(function, weights, "fp16")
