"""The pass `palettize`: which weights it takes, what it makes of them, and what it declares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odsora_palettize.palettize import Palettize
from odsora_palettize.tables import find_table
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.errors import PassError, UsageError
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import fingerprint, load_program, save_program
from odsora_compiler.ir.weights import LookupTable
from odsora_compiler.pipeline.manager import run_passes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, padding=1)
        self.large = nn.Linear(64, 96)
        self.small = nn.Linear(96, 8)
        self.table = nn.Embedding(70, 64)
        self.unused = nn.Linear(96, 96)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(x).mean((2, 3)).repeat(1, 4)
        return self.small(torch.tanh(self.large(self.table(tokens) + pooled[:, :64])))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 8, 8), "tokens": torch.tensor([3, 69])}
    return odsora.capture(odsora.ModelSpec(Net(), inputs))


def run(program: Program, passes: str, told: list[str] | None = None) -> Program:
    return run_passes(
        program, passes, tell=(told.append if told is not None else lambda text: None)
    )


def encoded(component: Component) -> dict[str, LookupTable]:
    found = {name: component.weights.encoding(name) for name in component.used_weights()}
    return {name: table for name, table in found.items() if table is not None}


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


# ------------------------------------------------------------------ which weights


def test_large_weights_are_taken_and_small_ones_left(program: Program) -> None:
    tables = encoded(run(program, "palettize").component("model"))
    assert set(tables) == {"large.weight", "table.weight"}  # conv has 864 numbers
    tables = encoded(run(program, "palettize{smallest=800}").component("model"))
    assert set(tables) == {"large.weight", "table.weight", "conv.weight"}
    assert tables["conv.weight"].indices.shape == (24, 4, 3, 3)


def test_what_was_compressed_is_left_alone(program: Program) -> None:
    once = run(program, "palettize{bits=6}")
    told: list[str] = []
    twice = run(once, "palettize{bits=2}", told)
    assert fingerprint(twice) == fingerprint(once)
    assert "palettize: left model alone: no weight has 4096 elements" in told[0]


def test_components_are_chosen_by_name(program: Program) -> None:
    two = program.copy()
    two.components["other"] = Component(
        "other",
        {"base": program.component("model").function("base").copy()},
        program.component("model").weights,
        examples=program.component("model").examples,
    )
    result = run(two, "palettize{bits=8 components=other},palettize{bits=2 components=model}")
    bits = {
        name: {table.bits for table in encoded(component).values()}
        for name, component in result.components.items()
    }
    assert bits == {"model": {2}, "other": {8}}


def test_an_unknown_component_gets_the_nearest_name(program: Program) -> None:
    with pytest.raises(PassError, match="no component 'modle'") as caught:
        run(program, "palettize{components=modle}")
    assert "'model'" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bits=5", "bits=5: Core ML has tables of 1, 2, 3, 4, 6 and 8 bits"),
        ("bits=0", "bits=0"),
        ("group=0", "at least one channel"),
        ("bits=four", "takes a whole number, not 'four'"),
        ("loss=small", "takes a number or none"),
    ],
)
def test_options_that_cannot_be_are_refused(program: Program, options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(program, f"palettize{{{options}}}")


# ------------------------------------------------------------------ what becomes of them


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [(24, 4, 3, 3), (16, 700), (8, 6, 5), (6, 2)])
def test_tables_have_their_size_and_fit(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    table = find_table(weight, bits, None)
    assert (table.bits, table.table.shape, table.axis) == (bits, (1, 2**bits), 0)
    assert table.indices.shape == weight.shape
    assert int(table.indices.max()) < 2**bits
    # No worse than the even steps anyone could take, and every number takes its nearest value.
    low, high = float(weight.min()), float(weight.max())
    even = torch.linspace(low, high, 2**bits)
    nearest = even[(weight[..., None] - even).abs().argmin(-1)]
    error = (table.decode() - weight).norm()
    assert error <= (nearest - weight).norm() + 1e-3 * weight.norm()
    closest = (weight[..., None] - table.table[0]).abs().amin(-1)
    torch.testing.assert_close((table.decode() - weight).abs(), closest, atol=2e-3, rtol=0)


def test_more_bits_lose_less(program: Program) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    errors = [
        relative(find_table(weight, bits, None).decode(), weight) for bits in (1, 2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    # A normal distribution and 16 levels: Lloyd and Max, 1960: 0.00950 of the variance is lost.
    assert errors[3] == pytest.approx(0.0095**0.5, rel=0.05)
    assert errors[5] < 0.01


@pytest.mark.parametrize("group", [1, 4, 8])
def test_channels_in_a_group_share_a_table(group: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 40, generator=generator) * torch.logspace(-3, 3, 16)[:, None]
    table = find_table(weight, 3, group)
    assert table.table.shape == (16 // group, 8)
    for start in range(0, 16, group):
        rows = slice(start, start + group)
        alone = find_table(weight[rows], 3, None).decode()
        torch.testing.assert_close(table.decode()[rows], alone, rtol=2e-3, atol=2e-3 * 10**3)
    assert relative(table.decode(), weight) <= relative(
        find_table(weight, 3, None).decode(), weight
    )


def test_grouping_that_does_not_divide_is_said(program: Program) -> None:
    told: list[str] = []
    tables = encoded(run(program, "palettize{group=32}", told).component("model"))
    assert tables["large.weight"].table.shape == (3, 16)
    assert tables["table.weight"].table.shape == (1, 16)
    assert any("model:table.weight" in line and "70 channels" in line for line in told)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 8),
        torch.full((8, 8), 3.25),
        torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) * 1e8,
        torch.randn(8, 8, generator=torch.Generator().manual_seed(4)) * 1e-12,
    ],
    ids=["zero", "constant", "huge", "tiny"],
)
def test_weights_of_any_size_have_a_table(weight: torch.Tensor) -> None:
    decoded = find_table(weight, 8, None).decode()
    torch.testing.assert_close(decoded, weight, rtol=2e-3, atol=1e-3 * float(weight.abs().max()))


def test_the_same_weight_has_the_same_table() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    first, second = find_table(weight, 4, 16), find_table(weight, 4, 16)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.table, second.table)


@pytest.mark.parametrize(
    ("bits", "group"), [(1, None), (2, 8), (3, None), (4, 2), (6, None), (8, 4)]
)
def test_a_table_decodes_as_coremltools_decodes_it(bits: int, group: int | None) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(bits))
    table = find_table(weight, bits, group)
    narrow = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 12))], opset_version=ct.target.iOS18)
    def layer(x: Any) -> Any:
        dense = Builder.constexpr_lut_to_dense(
            indices=table.indices.numpy().astype(narrow),
            lut=table.table.numpy().reshape(-1, 1, 2**bits, 1).astype(np.float32),
        )
        return Builder.linear(x=x, weight=dense)

    model = ct.convert(
        layer,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    decompressed = cto.decompress_weights(model)
    (operation,) = decompressed._mil_program.functions["main"].find_ops(op_type="linear")
    assert np.array_equal(operation.weight.val, table.decode().numpy())


# ------------------------------------------------------------------ what is declared


def test_the_loss_of_weights_and_outputs_is_reported(program: Program) -> None:
    told: list[str] = []
    result = run(program, "palettize{bits=4}", told)
    weights, before = result.component("model").weights, program.component("model").weights
    names = encoded(result.component("model"))
    lost = torch.cat([(weights.load(n) - before.load(n)).flatten() for n in names]).norm()
    size = torch.cat([before.load(n).flatten() for n in names]).norm()
    expected = (
        f"palettize: model: 2 weights to 4 bits, relative error of the weights {lost / size:.2e}"
    )
    assert expected in told
    after, original = (evaluate_program(p, p.examples)["output"] for p in (result, program))
    drift = f"palettize{{bits=4}}: relative {relative(after, original):.2e}"
    assert any(line.startswith(drift) for line in told)
    assert relative(after, original) > 0


def test_a_budget_is_enforced(program: Program) -> None:
    run(program, "palettize{bits=8 loss=0.01}")
    with pytest.raises(
        PassError, match=r"pass 'palettize' is declared lossy.*, but its relative loss"
    ):
        run(program, "palettize{bits=1 loss=0.01}")


def test_graphs_and_signature_stay(program: Program) -> None:
    result = run(program, "palettize{bits=2}")
    assert str(result.component("model").function("base").graph) == str(
        program.component("model").function("base").graph
    )
    assert result.component("model").weights.spec("large.weight").dtype == torch.float32
    assert result.history == ["palettize{bits=2}"]


def test_a_compressed_program_can_be_saved(program: Program, tmp_path: Path) -> None:
    result = run(program, "palettize{bits=3 group=8 smallest=100}")
    loaded = load_program(save_program(result, tmp_path / "p"))
    assert fingerprint(loaded) == fingerprint(result)
    expected = evaluate_program(result, result.examples)["output"]
    assert torch.equal(evaluate_program(loaded, loaded.examples)["output"], expected)


def test_listing_the_pass_imports_neither_torch_models_nor_coremltools() -> None:
    script = """
import sys
from odsora_compiler.plugins import load_registry
assert load_registry()["palettize"].distribution == "odsora-palettize"
print("coremltools" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_tables_need_no_scikit_learn_and_print_nothing(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["sklearn"] = None  # importing it fails
import torch
from odsora_palettize.tables import find_table
find_table(torch.randn(8, 8), 4, 2)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "ops/s" not in done.stderr


def test_options_are_as_documented() -> None:
    assert Palettize() == Palettize(4, None, None, 4096, None)
    assert str(Palettize(loss=0.05).exactness) == "lossy(relative, budget=0.05)"
