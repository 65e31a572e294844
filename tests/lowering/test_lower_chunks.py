"""The lowering stage on a chunked STDiT3: packages, reports, numbers, and what rules are for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from odsora_compiler.errors import LoweringError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.ir.chunks import split
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.evaluate import evaluate
from odsora_compiler.ir.program import Chunk, Component, Plan, Program
from odsora_compiler.ir.weights import LayeredWeights, TensorWeights
from odsora_compiler.lowering.chunks import (
    ChunkSource,
    LoweringSettings,
    PackageReport,
    lower_chunks,
)
from odsora_compiler.lowering.rules import DEFAULT_RULES
from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package

aten = torch.ops.aten
MODEL = Path(__file__).parents[2] / "examples" / "open_sora" / "stdit3.py"
DEPTH = 4


@pytest.fixture(scope="module")
def program() -> Program:
    """A small STDiT3 cut into one block pair a chunk, with a second function `scaled`.

    Timesteps are large, as the sampler's are: half precision is coarse there.
    """
    options = {"depth": DEPTH, "hidden_size": 96, "num_heads": 2, "latent_frames": 4, "batch": 2}
    made = capture(MODEL, options)
    made.examples["timestep"] = torch.tensor([997.3, 513.7])
    made.examples["height"] = torch.tensor([720.0])
    made.examples["width"] = torch.tensor([1280.0])
    (component,) = made.components.values()
    random = torch.Generator().manual_seed(3)
    component.weights = LayeredWeights(
        TensorWeights(
            {
                name: component.weights.load(name)
                + 0.02 * torch.randn(component.weights.spec(name).shape, generator=random)
                for name in component.weights.names()
                if name != "rope.freqs"
            }
        ),
        component.weights,
    )
    scaled = component.derive("scaled")
    editor = Editor(scaled, "test")
    for node in list(scaled.operators()):
        if node.target is aten.silu.default:
            half = editor.after(node).call(aten.mul.Tensor, node, 0.5)
            editor.replace(node, half, [user for user in node.users if user is not half])
    for function in component.functions.values():
        _cut(function)
    component.plan = Plan(0, "fp16", "", tuple(Chunk(0, {}, "") for _ in range(DEPTH)))
    return made


def _cut(function: Any) -> None:
    here = 0
    constant: set[Any] = set()
    for node in function.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(used in constant for used in node.all_input_nodes)
        ):
            constant.add(node)
        elif node.op == "call_function":
            found = re.search(r"spatial_blocks\.(\d+)", node.meta["provenance"].module)
            here = max(here, int(found[1])) if found else here
            node.meta["chunk"] = here


def sources(component: Component) -> list[ChunkSource]:
    cut = {name: split(function, component) for name, function in component.functions.items()}
    (whole, *_) = component.functions.values()
    outside = {spec.name for spec in (*whole.inputs, *whole.outputs)}
    result = []
    for index in range(DEPTH):
        functions = {name: chunked.chunks[index] for name, chunked in cut.items()}
        names = {
            spec.name
            for function in functions.values()
            for spec in (*function.inputs, *function.outputs)
        }
        result.append(ChunkSource(f"chunk{index}", functions, frozenset(names - outside)))
    return result


def run_all(reports: list[PackageReport], program: Program, function: str) -> torch.Tensor:
    values = dict(program.examples)
    for report in reports:
        given = {
            item.name: values[item.name].to(item.dtype)
            for item in report.functions[function].interface.inputs
        }
        values |= Interpreter(Package.open(report.path), function).run(given)
    return values["v"].float()


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def result(request: Any, program: Program, tmp_path_factory: Any) -> Any:
    (component,) = program.components.values()
    lines: list[str] = []
    reports = lower_chunks(
        sources(component),
        component.weights,
        tmp_path_factory.mktemp(request.param),
        LoweringSettings(request.param),
        lines.append,
    )
    return request.param, reports, lines


def test_chunks_compute_what_the_model_computes(result: Any, program: Program) -> None:
    precision, reports, _ = result
    (component,) = program.components.values()
    for name, function in component.functions.items():
        expected = evaluate(function, component.weights, program.examples)["v"]
        got = run_all(reports, program, name)
        error = (got - expected).abs().max() / expected.abs().max()
        cosine = torch.cosine_similarity(got.flatten().double(), expected.flatten().double(), dim=0)
        assert error < (1e-5 if precision == "fp32" else 1e-2)
        assert cosine > (0.9999999 if precision == "fp32" else 0.9999)


def test_equal_chunks_are_converted_once(result: Any) -> None:
    _, reports, lines = result
    made = [
        {name: function.template for name, function in report.functions.items()}
        for report in reports
    ]
    # `scaled` differs from `base` where silu is: before the first block only.
    assert made[1] == made[2] == {"base": "chunk1/base", "scaled": "chunk1/base"}
    assert made[0] == {"base": "", "scaled": ""}
    assert reports[0].functions["base"].reason == "its structure occurs once"
    assert [line.split(":")[0] for line in lines] == [report.name for report in reports]


def test_functions_of_a_package_share_its_weights(result: Any, program: Program) -> None:
    precision, reports, _ = result
    (component,) = program.components.values()
    elements = sum(
        component.weights.spec(name).elements for name in component.functions["base"].weight_names()
    )
    stored = sum(report.weight_bytes for report in reports)
    assert stored < 1.05 * elements * (2 if precision == "fp16" else 4)
    for report in reports:
        assert (
            report.weight_bytes
            == (report.path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        )


def test_interface_keeps_names_and_says_dtypes(result: Any, program: Program) -> None:
    precision, reports, _ = result
    crossing = torch.float16 if precision == "fp16" else torch.float32
    first = reports[0].functions["base"].interface
    assert {item.name: item.dtype for item in first.inputs} == {
        "z": torch.float32,
        "timestep": torch.float32,
        "y": torch.float32,
        "mask": torch.int32,
        "fps": torch.float32,
        "height": torch.float32,
        "width": torch.float32,
    }
    flags = [item for item in first.outputs if item.dtype == torch.int32]
    assert len(flags) == 1  # the text mask, a boolean
    assert {item.dtype for item in first.outputs if item not in flags} == {crossing}
    last = reports[-1].functions["base"].interface
    assert [(item.name, item.dtype) for item in last.outputs] == [("v", torch.float32)]
    for report in reports:
        for name, function in report.functions.items():
            package = Package.open(report.path).function(name)
            described = [(item.name, item.torch_dtype, item.shape) for item in package.inputs]
            assert described == [
                (item.name, item.dtype, item.shape) for item in function.interface.inputs
            ]


def test_operations_can_be_traced_back_to_nodes(result: Any, program: Program) -> None:
    _, reports, _ = result
    for report in reports[:2]:
        operators = report.functions["base"].operators
        block = Package.open(report.path).function("base").block
        linears = [item for item in block.operations if item.type == "linear"]
        assert linears
        leaving = {item.name for item in report.functions["base"].interface.outputs}
        for operation in linears:
            name = operation.outputs[0].name.removesuffix("_cast_fp16")
            assert name in leaving or operators[name].startswith("linear")
        names = [name for name, _ in Package.open(report.path).function("base").blob_references()]
        assert any("_blocks_" in name and "attn_qkv_weight" in name for name in names)


def test_same_program_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    (component,) = program.components.values()
    contents = []
    for folder in ("one", "two"):
        reports = lower_chunks(sources(component)[1:3], component.weights, tmp_path / folder)
        contents.append(
            [
                file.read_bytes()
                for report in reports
                for file in sorted(report.path.rglob("*"))
                if file.is_file()
            ]
        )
    assert contents[0] == contents[1]
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "chunk1.mlpackage",
        "chunk2.mlpackage",
    }


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        ("tanh-gelu", lambda x: F.gelu(x, approximate="tanh")),
        ("alpha", lambda x: torch.add(x, x * x, alpha=3)),
    ],
)
def test_without_its_rule_the_package_is_silently_wrong(
    rule: str, body: Any, captured: Any, lowered: Any, run: Any
) -> None:
    inputs = {"x": torch.linspace(-3, 3, 50).view(5, 10)}
    function, weights = captured(body, inputs)
    expected = evaluate(function, weights, inputs)["out"]
    rules = [item for item in DEFAULT_RULES if item.name != rule]
    wrong = run(lowered(function, weights, "fp32", rules=rules), inputs)["out"]
    right = run(lowered(function, weights, "fp32"), inputs)["out"]
    assert (wrong - expected).abs().max() > 1e-4
    assert (right - expected).abs().max() < 1e-5


def test_tanh_gelu_is_core_mls_own(captured: Any, lowered: Any) -> None:
    inputs = {"x": torch.randn(3, 10)}
    function, weights = captured(lambda x: F.gelu(x, approximate="tanh"), inputs)
    report = lowered(function, weights, "fp16")
    operations = Package.open(report.path).function("base").block.operations
    assert [item.type for item in operations if item.type not in ("const", "cast")] == ["gelu"]
    (mode,) = (item for item in operations if item.outputs[0].name.endswith("mode_0"))
    assert mode.attributes["val"].python() == "TANH_APPROXIMATION"  # type: ignore[union-attr]


def test_angles_stay_in_single_precision_across_chunks(
    captured: Any, tmp_path: Path, run: Any
) -> None:
    """The first chunk hands an angle to the second: it is not rounded, though it might be."""
    inputs = {"t": torch.tensor([997.3, 513.7])}
    first, weights = captured(lambda t: t[:, None] * torch.linspace(1, 0.01, 16), inputs)
    angle = evaluate(first, weights, inputs)["out"]
    second, more = captured(lambda out: torch.cos(out) + out.sin(), {"out": angle})
    chunks = [
        ChunkSource("a", {"base": first}, frozenset({"out"})),
        ChunkSource("b", {"base": second}, frozenset({"out"})),
    ]
    second.output_node.meta["names"] = ("result",)
    one, two = lower_chunks(chunks, LayeredWeights(weights, more), tmp_path)
    (crossing,) = one.functions["base"].interface.outputs
    assert crossing.dtype == torch.float32
    got = run(two, run(one, inputs))["result"]
    assert (got - (angle.cos() + angle.sin())).abs().max() < 3e-3


def test_scalar_inputs_and_outputs_become_vectors_of_one(
    captured: Any, lowered: Any, run: Any
) -> None:
    inputs = {"x": torch.tensor(2.5), "y": torch.randn(3)}
    function, weights = captured(lambda x, y: (x * y).sum(), inputs)
    report = lowered(function, weights, "fp32")
    (out,) = report.functions["base"].interface.outputs
    assert out.shape == (1,)
    got = run(report, inputs)["out"]
    torch.testing.assert_close(got, (inputs["x"] * inputs["y"]).sum()[None])


@pytest.mark.parametrize("body", [lambda x: (x, x * 2), lambda x: (x * 2,) * 2])
def test_outputs_that_are_inputs_or_other_outputs(
    body: Any, captured: Any, lowered: Any, run: Any
) -> None:
    inputs = {"x": torch.randn(3, 4)}

    class Several(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            one, two = body(x)
            return {"one": one, "two": two}

    function, weights = captured(Several(), inputs)
    got = run(lowered(function, weights, "fp32"), inputs)
    for name, expected in zip(("one", "two"), body(inputs["x"]), strict=True):
        torch.testing.assert_close(got[name], expected)


def test_unknown_operator_names_node_source_and_function(captured: Any, lowered: Any) -> None:
    inputs = {"x": torch.randn(4, 4)}
    function, weights = captured(lambda x: torch.linalg.svdvals(x), inputs)
    with pytest.raises(
        LoweringError, match=r"function 'base': coremltools cannot convert '.*svd.*py:"
    ):
        lowered(function, weights)


def test_coremltools_is_silent_and_its_settings_are_restored(
    captured: Any, lowered: Any, capfd: Any
) -> None:
    import logging

    level = logging.getLogger("coremltools").level
    inputs = {"x": torch.randn(4, 4)}
    lowered(*captured(lambda x: x * torch.arange(4), inputs), "fp16")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("coremltools").level == level
    from coremltools.converters.mil.frontend.torch import ops

    assert ops._tqdm.__name__ == "tqdm"
