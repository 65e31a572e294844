"""What was lowered wrongly is found on the machine that lowered it, and named."""

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.driver import watching
from odsora_compiler.driver.acceptance import AcceptanceReport, accept
from odsora_compiler.errors import VerificationError
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.weights import LayeredWeights, TensorWeights
from odsora_compiler.lowering.bundle import write_bundle
from odsora_compiler.lowering.chunks import LoweringSettings
from odsora_compiler.lowering.rules import DEFAULT_RULES
from odsora_compiler.mil.blobs import BlobFile
from odsora_compiler.runtime.bundle import Bundle

ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    """Residual block with the operators whose arguments coremltools is known to drop."""

    def __init__(self, width: int, operator: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(self.norm(x))
        if self.operator == "gelu":
            h = nn.functional.gelu(h, approximate="tanh")
        elif self.operator == "add":
            h = torch.add(h, h.sigmoid(), alpha=3)
        return x + self.fc2(h)


def chain(operator: str, depth: int = 3, width: int = 64, chunk: str = "36kB") -> Program:
    """A chain of blocks, a chunk each."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Block(width, operator) for _ in range(depth)))
    spec = odsora.ModelSpec(module, {"input": 2 * torch.randn(4, 16, width)})
    return odsora.run_passes(odsora.capture(spec), f"cidl{{budget={chunk}}}")


def lowered_and_accepted(
    program: Program,
    folder: Path,
    settings: LoweringSettings,
    damage: Callable[[Path], None] = lambda folder: None,
    limit_flops: float | None = None,
) -> AcceptanceReport:
    folder.mkdir(exist_ok=True)
    lowered = write_bundle(program, folder, settings, "iOS18")
    damage(folder)
    return accept(Bundle(folder), lowered, limit_flops)


@pytest.mark.parametrize("operator", ["gelu", "add"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_legalization_the_package_is_right(
    tmp_path: Path, operator: str, precision: str
) -> None:
    program = chain(operator)
    report = lowered_and_accepted(program, tmp_path / "b", LoweringSettings(precision))
    assert len(report.chunks) == 3 and len(report.functions) == 1
    for drift in (*report.chunks.values(), *report.functions.values()):
        assert drift.maximum < (1e-5 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize(("operator", "mil"), [("gelu", "aten.gelu"), ("add", "aten.add")])
def test_without_its_legalization_the_operator_is_found_and_named(
    tmp_path: Path, operator: str, mil: str
) -> None:
    rules = [
        rule
        for rule in DEFAULT_RULES
        if operator not in {t.__name__.split(".")[0] for t in rule.targets}
    ]
    assert len(rules) < len(DEFAULT_RULES)
    with pytest.raises(VerificationError) as caught:
        lowered_and_accepted(chain(operator), tmp_path / "b", LoweringSettings("fp32", rules=rules))
    text = str(caught.value)
    assert "chunk model-00" in text and mil in text and "test_acceptance.py" in text


def weight_file(folder: Path, chunk: int) -> Path:
    return next((folder / "packages" / f"model-{chunk:02d}.mlpackage").rglob("weight.bin"))


def change_largest_weight(path: Path) -> None:
    """Write another number into the largest weight, as a bug in lowering would."""
    largest = max(BlobFile(path).entries(), key=lambda entry: entry.size)
    content = bytearray(path.read_bytes())
    content[largest.data_offset : largest.data_offset + 4] = struct.pack("<f", 5.0)
    path.write_bytes(content)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("limit", [None, 0.0])
def test_a_wrong_weight_is_found_in_any_chunk(
    tmp_path: Path, chunk: int, limit: float | None
) -> None:
    """Also where chunks of one structure are executed only once (no FLOP allowed for the whole)."""
    with pytest.raises(VerificationError, match=f"chunk model-0{chunk}"):
        # The size of the file stays, so opening the bundle does not notice.
        lowered_and_accepted(
            chain("gelu"),
            tmp_path / "b",
            LoweringSettings("fp32"),
            lambda folder: change_largest_weight(weight_file(folder, chunk)),
            limit,
        )


def test_a_wrong_number_too_small_for_the_outputs_to_show_is_found(tmp_path: Path) -> None:
    """In half precision, in a chunk that is executed: one hidden unit of 128 loses its bias."""

    def damage(folder: Path) -> None:
        path = weight_file(folder, 0)
        bias = next(entry for entry in BlobFile(path).entries() if entry.size == 2 * 128)
        content = bytearray(path.read_bytes())
        content[bias.data_offset : bias.data_offset + 2] = struct.pack("<e", 0.5)
        path.write_bytes(content)

    with pytest.raises(VerificationError, match=r"chunk model-00.*weight '0.fc1.bias'"):
        lowered_and_accepted(chain("gelu"), tmp_path / "b", LoweringSettings("fp16"), damage)


class Scaled(nn.Module):
    """Outputs of three times their size, as one number or as many, without the rule for `alpha`."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = torch.add(x - x, x, alpha=3)
        return scaled.mean() if self.mean else scaled


@pytest.mark.parametrize("mean", [False, True])
def test_outputs_of_another_size_are_found_in_half_precision(tmp_path: Path, mean: bool) -> None:
    rules = [rule for rule in DEFAULT_RULES if rule.name != "alpha"]
    program = odsora.capture(odsora.ModelSpec(Scaled(mean), {"x": torch.rand(4, 16)}))
    with pytest.raises(VerificationError, match="norm off") as caught:
        lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp16", rules=rules))
    assert "aten.add" in str(caught.value)
    lowered_and_accepted(program, tmp_path / "c", LoweringSettings("fp16"))


class NamedLikeCasts(nn.Module):
    """Weights and outputs with names such as coremltools gives to what it casts."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_fp16, self.w_to_fp16 = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.w(x), "y_fp16": self.w_fp16(x), "y_cast_fp16": self.w_to_fp16(x)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_names_that_look_like_casts_are_told_apart(tmp_path: Path, precision: str) -> None:
    program = odsora.capture(odsora.ModelSpec(NamedLikeCasts(), {"x": torch.randn(4, 16)}))
    report = lowered_and_accepted(program, tmp_path / "b", LoweringSettings(precision))
    assert len(report.weights_compared) == 3


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_nan_among_the_weights_is_found_in_any_chunk(tmp_path: Path, chunk: int) -> None:
    """Also in one that is not executed, being built like another."""
    program = chain("gelu", depth=3)
    component = program.component("model")
    broken = {f"{chunk}.fc2.bias": torch.full((64,), torch.nan)}
    component.weights = LayeredWeights(TensorWeights(broken), component.weights)
    with pytest.raises(VerificationError, match=f"'{chunk}.fc2.bias' of the model has NaN"):
        lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp32"), limit_flops=0.0)


class Masked(nn.Module):
    """Two attentions that share the mask, which the first chunk computes and hands on."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(keep.shape).masked_fill(~keep, self.fill)
        bias = bias + x.mean(-1)[:, None]
        for layer in self.layers:
            x = x + (layer(x) @ x.mT + bias).softmax(-1) @ x
        return x


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -torch.inf, -1e9])
def test_a_mask_handed_on_in_half_precision_is_no_drift(tmp_path: Path, fill: float) -> None:
    torch.manual_seed(0)
    keep = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    spec = odsora.ModelSpec(Masked(fill), {"x": torch.randn(2, 6, 16), "keep": keep})
    program = odsora.run_passes(odsora.capture(spec), "cidl{budget=600B}")
    report = lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp16"))
    assert len(report.chunks) == 2
    assert all(drift.relative < 1e-2 for drift in report.chunks.values())


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (lambda x: torch.sin(x @ x.mT * 1000), "aten.sin"),
        (lambda x: ((x @ x.mT) / 10 + 1000) - 1000, "aten.sub"),
        (lambda x: nn.functional.rms_norm(x * 1000, (16,)), "infinity"),
    ],
    ids=["large angles", "cancellation", "overflow without NaN"],
)
def test_where_rounding_ruins_the_outputs_the_operation_is_named(
    tmp_path: Path, body: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return body(x)

    torch.manual_seed(0)
    program = odsora.capture(odsora.ModelSpec(Model(), {"x": torch.randn(8, 16)}))
    with pytest.raises(VerificationError, match="cosine") as caught:
        lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp16"))
    assert named in str(caught.value)


def test_where_the_whole_is_too_expensive_each_structure_runs_once(tmp_path: Path) -> None:
    program = chain("gelu", depth=4)
    report = lowered_and_accepted(
        program, tmp_path / "b", LoweringSettings("fp32"), limit_flops=0.0
    )
    assert [name for name, _ in report.chunks] == ["model-00"]
    assert len(report.weights_compared) == 4 * 6 and not report.functions


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 3, 5), (1, 8, 3, 4, 5)])
def test_groups_of_large_numbers_are_normalised_in_half_precision(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Their squares would be beyond 65504."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    program = odsora.capture(odsora.ModelSpec(norm, {"input": 1000 * torch.randn(shape)}))
    report = lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp16"))
    assert report.functions["model.base"].relative < 2e-3


class Normed(nn.Module):
    """Blocks of a norm over 32 features, whose weight coremltools keeps under a name of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(32, eps=1e-6) for _ in range(2 * depth))
        for index, norm in enumerate(self.norms):
            nn.init.normal_(norm.weight, 1 + index, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, first, second in zip(
            self.layers, self.norms[::2], self.norms[1::2], strict=True
        ):
            heads = layer(x).unflatten(-1, (2, 32)).transpose(1, 2)
            x = x + (first(heads) + second(heads.sin())).transpose(1, 2).flatten(2)
        return x


def lowered_norms(folder: Path, change: Callable[[Path], None]) -> AcceptanceReport:
    torch.manual_seed(0)
    program = odsora.capture(odsora.ModelSpec(Normed(5), {"x": torch.randn(2, 4, 64)}))
    program = odsora.run_passes(program, "cidl{budget=9kB}")
    folder.mkdir()
    lowered = write_bundle(program, folder, LoweringSettings("fp16"), "iOS18")
    (component,) = lowered.values()
    templates = [report.functions["base"].template for report in component.reports]
    # The first takes and the last gives float32.
    assert len(templates) == 5 and len(set(templates[1:4])) == 1 and templates[1]
    change(folder)
    return accept(Bundle(folder), lowered, limit_flops=0.0)


def test_weights_that_lost_their_names_are_read_back(tmp_path: Path) -> None:
    report = lowered_norms(tmp_path / "b", lambda folder: None)
    assert [name for name, _ in report.chunks] == ["model-00", "model-01", "model-04"]


def test_weights_that_lost_their_names_and_changed_places_are_found(tmp_path: Path) -> None:
    def swap(folder: Path) -> None:
        path = weight_file(folder, 2)
        data = bytearray(path.read_bytes())
        torch.manual_seed(0)
        norms = [norm.weight.detach().half() for norm in Normed(5).norms[4:6]]
        places = [data.index(weight.numpy().tobytes()) for weight in norms]
        for place, weight in zip(places, reversed(norms), strict=True):
            data[place : place + 64] = weight.numpy().tobytes()
        path.write_bytes(data)

    with pytest.raises(VerificationError, match="model-02"):
        lowered_norms(tmp_path / "b", swap)


def test_values_of_many_elements_are_sampled_up_to_the_last() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(1080, 18432).relu().sum()

    # 19,906,560 elements: the last place is not a number of float32.
    program = odsora.capture(odsora.ModelSpec(Wide(), {"x": torch.ones(1, 1)}))
    with tempfile.TemporaryDirectory() as folder:
        report = lowered_and_accepted(program, Path(folder) / "b", LoweringSettings("fp32"))
    assert report.functions["model.base"].maximum < 1e-5


class Steep(nn.Module):
    """The logarithm makes much of the last bits of numbers near 0; the output does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(x).abs() + 1e-9).log().clamp(min=-5)


def test_an_operator_that_amplifies_rounding_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    # Half of the numbers are the mean: what is left of them after the norm is rounding.
    offsets = torch.randn(1, 16, 4, 8)
    offsets -= offsets.mean()
    x = 0.1 + torch.cat([offsets, torch.zeros(1, 16, 4, 8)], dim=-1)
    program = odsora.capture(odsora.ModelSpec(Steep(), {"x": x}))
    report = lowered_and_accepted(program, tmp_path / "b", LoweringSettings("fp32"))
    assert report.functions["model.base"].maximum < 1e-5
    # It is a suspect, and only the second look clears it.
    monkeypatch.setattr(watching.Operands, "explain", lambda *_: False)
    with pytest.raises(VerificationError, match=r"aten\.log"):
        lowered_and_accepted(program, tmp_path / "c", LoweringSettings("fp32"))


class Overflow(nn.Module):
    """Fine in float32, not in float16: the square is beyond 65504, and then infinity - infinity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = (x * 1000).square()
        return (square * 2 - square) / 1e6


def test_nan_is_found_and_the_operation_named(tmp_path: Path) -> None:
    spec = odsora.ModelSpec(Overflow(), {"x": torch.linspace(1, 2, 64).reshape(4, 16)})
    with pytest.raises(VerificationError) as caught:
        lowered_and_accepted(odsora.capture(spec), tmp_path / "b", LoweringSettings("fp16"))
    assert "NaN" in str(caught.value) and "aten.sub" in str(caught.value)
    report = lowered_and_accepted(odsora.capture(spec), tmp_path / "c", LoweringSettings("fp32"))
    assert report.functions["model.base"].maximum < 1e-6


class HiddenNan(nn.Module):
    """NaN inside, which the output does not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = (x * 1000).square()
        odd = square * 2 - square
        return torch.where(odd > 0, x, x)


def test_a_nan_that_does_not_reach_the_output_is_found(tmp_path: Path) -> None:
    spec = odsora.ModelSpec(HiddenNan(), {"x": torch.linspace(1, 2, 64).reshape(4, 16)})
    with pytest.raises(VerificationError, match="NaN"):
        lowered_and_accepted(odsora.capture(spec), tmp_path / "b", LoweringSettings("fp16"))


def test_a_model_that_gives_nan_itself_is_refused(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 10).log()

    spec = odsora.ModelSpec(Broken(), {"x": torch.ones(2, 3)})
    with pytest.raises(VerificationError, match="PyTorch itself gives NaN"):
        lowered_and_accepted(odsora.capture(spec), tmp_path / "b", LoweringSettings("fp32"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_golden_denoiser_end_to_end(tmp_path: Path, precision: str) -> None:
    """Released numbers: model file and weights file to packages, executed, against the goldens."""
    golden = load_file(ROOT / "tests" / "golden" / "stdit3_b.safetensors")
    inputs = {key[3:]: value for key, value in golden.items() if key.startswith("in.")}
    from safetensors.torch import save_file

    state = {key[6:]: value for key, value in golden.items() if key.startswith("state.")}
    save_file(state, tmp_path / "weights.safetensors")
    options = {
        "depth": 1,
        "hidden_size": 96,
        "num_heads": 6,
        "caption_channels": 16,
        "model_max_length": 12,
        "latent_frames": 8,
        "latent_height": 7,
        "latent_width": 9,
    }
    program = odsora.capture(
        ROOT / "examples/open_sora/stdit3.py", options, tmp_path / "weights.safetensors"
    )
    program.examples = inputs
    program = odsora.run_passes(
        program,
        "tdtm{positions=compact sites=spatial,temporal,cross},cidl{budget=300kB}",
        precision=precision,
    )
    bundle = odsora.lower(program, tmp_path / "golden.odsora", precision=precision)
    runner = odsora.load(bundle)
    for function, name in (("tdtm", "out.tdtm_masked_text"), ("base", "out.masked_text")):
        found = runner.run(inputs, function)["v"]
        expected = golden[name]
        if precision == "fp32":
            assert (found - expected).abs().max() < 1e-4
        else:
            cosine = nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
            assert cosine > 0.9995
    packages = list((bundle / "packages").iterdir())
    assert len(packages) > 2
