"""Weight templates against coremltools' own conversion of each function, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from torch import Tensor, nn

from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import LayeredWeights, TensorWeights
from odsora_compiler.lowering.convert import convert
from odsora_compiler.lowering.exported import exported_program
from odsora_compiler.lowering.interface import Names, Precision
from odsora_compiler.lowering.legalize import legalize
from odsora_compiler.lowering.link import Part, write_package
from odsora_compiler.lowering.quiet import quiet_coremltools
from odsora_compiler.lowering.template import (
    NoTemplateError,
    make_template,
    rounded,
    structure_key,
)

C = 32


class Block(nn.Module):
    """Attention, normalisation, rotation and MLP, with weights that are nowhere special."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C, bias=False)
        self.norm = nn.LayerNorm(C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.table = nn.Parameter(torch.empty(1, 2, C))
        self.freqs = nn.Parameter(torch.empty(C))
        random = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shift, scale = self.table.chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        angle = torch.arange(x.shape[1])[:, None] * self.freqs
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * angle.cos()
        x = x + self.proj(h)
        return {"out": x + self.down(F.gelu(self.up(x), approximate="tanh"))}


INPUTS = {"x": torch.randn(2, 6, C, generator=torch.Generator().manual_seed(9))}


@pytest.fixture
def legal(captured: Any) -> Callable[[int], Any]:
    """`legal(seed)`: a legalized block, its names prefixed by the seed, and its weights."""

    def make(seed: int, module: nn.Module | None = None) -> Any:
        function, weights = captured(module or Block(seed), INPUTS)
        for node in function.graph.find_nodes(op="get_attr"):
            node.target = f"block{seed}.{node.target}"
        renamed = {f"block{seed}.{name}": weights.load(name) for name in weights.names()}
        return legalize(function, LayeredWeights(TensorWeights(renamed)))

    return make


def package_bytes(folder: Path, part: Part) -> tuple[bytes, bytes]:
    write_package(folder, [part], part.name)
    data = folder / "Data" / "com.apple.CoreML"
    return (data / "model.mlmodel").read_bytes(), (data / "weights/weight.bin").read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_template_gives_the_bytes_of_coremltools_own_conversion(
    precision: Precision, legal: Any, tmp_path: Path
) -> None:
    first, first_weights = legal(1)
    template = make_template(first, first_weights, tmp_path, precision, {"x"})
    for seed in (1, 2):
        function, weights = legal(seed)
        ours = package_bytes(
            tmp_path / f"ours{seed}.mlpackage", template.part("base", function, weights, set())
        )
        with quiet_coremltools() as ct:
            half = precision == "fp16"
            model = ct.convert(
                exported_program(function, weights),
                inputs=[
                    ct.TensorType(
                        name=Names.made_up("in", 0),
                        shape=(2, 6, C),
                        dtype=torch.empty(0, dtype=torch.float16 if half else torch.float32)
                        .numpy()
                        .dtype,
                    )
                ],
                outputs=[ct.TensorType(name=Names.made_up("out", 0), dtype=float)],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
                package_dir=str(tmp_path / f"theirs{seed}.mlpackage"),
            )
        specification = with_our_names(model.get_spec(), function)
        Names(function).restore(specification)
        weights_file = tmp_path / f"theirs{seed}.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        theirs = package_bytes(
            tmp_path / f"relinked{seed}.mlpackage",
            Part.of_file("base", specification, weights_file),
        )
        assert ours[1] == weights_file.read_bytes()
        assert ours == theirs


def test_our_stages_give_what_ct_convert_gives(legal: Any, tmp_path: Path) -> None:
    function, weights = legal(3)
    converted = convert(function, weights, tmp_path / "ours", "fp16")
    with quiet_coremltools() as ct:
        model = ct.convert(
            exported_program(function, weights),
            outputs=[ct.TensorType(name=Names.made_up("out", 0), dtype=float)],
            inputs=[ct.TensorType(name=Names.made_up("in", 0), shape=(2, 6, C), dtype=float)],
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
        )
    specification = model.get_spec()
    specification.description.ClearField("metadata")
    specification.mlProgram.attributes.clear()
    assert converted.specification == with_our_names(specification, function)


def with_our_names(specification: Any, function: Function) -> Any:
    """coremltools numbers the linear operations; we name them, like others, after their nodes."""
    stems = [name for name in Names.operators(function) if name.endswith("_linear")]
    text = text_format.MessageToString(specification)
    text = re.sub(r"\blinear_(\d+)(?=_cast_fp16|\b)", lambda found: stems[int(found[1])], text)
    return text_format.Parse(text, type(specification)())


def test_key_ignores_names_and_values_but_not_structure(legal: Any, captured: Any) -> None:
    keys = {structure_key(*legal(seed), "fp16") for seed in (1, 2, 3)}
    assert len(keys) == 1

    class Wider(Block):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x)["out"] * 2}

    class Shifted(Block):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x + torch.arange(C) * 0.5)["out"]}

    class ShiftedMore(Block):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x + torch.arange(C) * 0.75)["out"]}

    for kind in (Wider, Shifted, ShiftedMore):
        keys.add(structure_key(*legal(1, kind(1)), "fp16"))
    keys.add(structure_key(*legal(1), "fp32"))
    keys.add(structure_key(*legal(1), "fp16", {"x"}))
    keys.add(structure_key(*legal(1), "fp16", (), {"out"}))
    assert len(keys) == 7


def one_weight(captured: Any, body: Callable[..., Tensor], weight: Tensor) -> Any:
    return legalize(*captured(body, {"x": INPUTS["x"]}, w=weight))


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x, w: F.linear(x, w), (24, C)),
        # coremltools makes a linear operation of it, of the transposed weight.
        (lambda x, w: x @ w + w[0], (C, 24)),
        (lambda x, w: F.linear(x, w[:12]) + F.linear(x, w[12:]), (24, C)),
    ],
    ids=["whole", "transposed", "halves"],
)
def test_how_a_weight_stands_in_the_package_is_found(
    body: Any, shape: tuple[int, ...], captured: Any, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(1)
    function, weights = one_weight(captured, body, torch.randn(shape, generator=random))
    template = make_template(function, weights, tmp_path, "fp16")
    part = template.part("base", function, weights, set())
    converted = convert(function, weights, tmp_path / "full", "fp16")
    Names(function).restore(converted.specification)
    full = Part.of_file("base", converted.specification, converted.weights)
    ours = package_bytes(tmp_path / "a.mlpackage", part)
    assert ours == package_bytes(tmp_path / "b.mlpackage", full)


def test_small_weights_have_no_template(captured: Any, tmp_path: Path) -> None:
    function, weights = one_weight(captured, lambda x, w: x * w, torch.full((1,), 3.0))
    with pytest.raises(NoTemplateError, match="weight 'w' has 1 elements"):
        make_template(function, weights, tmp_path, "fp16")


def test_weights_that_coremltools_computes_with_have_no_template(
    captured: Any, tmp_path: Path
) -> None:
    # coremltools multiplies the scale into the convolution's weight.
    random = torch.Generator().manual_seed(1)
    function, weights = legalize(
        *captured(
            lambda x, w, s: F.conv1d(x, w) * s,
            {"x": INPUTS["x"]},
            w=torch.randn(16, 6, 3, generator=random),
            s=torch.randn(1, 16, 1, generator=random),
        )
    )
    with pytest.raises(NoTemplateError, match="is computed from weights"):
        make_template(function, weights, tmp_path, "fp16")


def test_values_beyond_half_precision_need_a_full_conversion(captured: Any, tmp_path: Path) -> None:
    weight = torch.randn(5, C, generator=torch.Generator().manual_seed(1))
    function, weights = one_weight(captured, lambda x, w: F.linear(x, w), weight)
    template = make_template(function, weights, tmp_path, "fp16")
    weight = weight.clone()
    weight[2, 3] = 70000.0
    function, weights = one_weight(captured, lambda x, w: F.linear(x, w), weight)
    with pytest.raises(NoTemplateError, match="weight 'w' has values beyond"):
        template.part("base", function, weights, set())


@pytest.mark.parametrize("elements", [399, 400])
def test_tiny_values_are_rounded_as_coremltools_rounds_them(
    elements: int, captured: Any, tmp_path: Path
) -> None:
    weight = torch.randn(elements, generator=torch.Generator().manual_seed(1))
    weight[:6] = torch.tensor([1e-9, -1e-9, 0.0, -0.0, 5.9e-8, 1e-45])
    inputs = {"x": torch.randn(2, elements)}
    function, weights = legalize(*captured(lambda x, w: x + w, inputs, w=weight))
    template = make_template(function, weights, tmp_path, "fp16")
    converted = convert(function, weights, tmp_path / "full", "fp16")
    full = Part.of_file("base", converted.specification, converted.weights)
    ours = package_bytes(tmp_path / "a.mlpackage", template.part("base", function, weights, set()))
    assert ours[1] == package_bytes(tmp_path / "b.mlpackage", full)[1]
    assert (rounded(weight)[0] == 0) == (elements >= 400)
