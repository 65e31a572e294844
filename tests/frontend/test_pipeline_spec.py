"""Capturing a PipelineSpec: its components, host, examples, and weights from files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from samplers import Drift, Z, drift_spec, numbers, pipeline
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.errors import CaptureError, UsageError, VerificationError, WeightsError
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program
from odsora_compiler.ir.serialize import load_program, save_program

# ------------------------------------------------------------------ what is captured


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1).reshape(1, 1, 4, 5)[:, :, :3]


def film(c: Any, ids: Tensor, z: Tensor, noisy: bool) -> dict[str, Tensor]:
    z = z + c.encoder(ids=ids) + torch.arange(5.0)
    for step in range(2):
        z = z + 0.5 * c.drift(z=z, t=torch.tensor([1000.0 - 500 * step]))
    return {"video": z + torch.randn_like(z) if noisy else z}


def spec(**changed: Any) -> odsora.PipelineSpec:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 5, 6]])
    given: dict[str, Any] = {
        "components": {
            "encoder": odsora.ModelSpec(
                Encoder(), {"ids": ids}, axes={"ids": "b l"}, compute_units="cpu_only"
            ),
            "drift": drift_spec(),
        },
        "host": film,
        "inputs": {"ids": ids, "z": Z, "noisy": False},
        "axes": {"ids": "b l", "z": "b c h w"},
        "text_to_video": None,
    }
    return odsora.PipelineSpec(**{**given, **changed})


def test_components_are_captured_by_their_names() -> None:
    program = odsora.capture(spec())
    assert list(program.components) == ["encoder", "drift"]
    assert all(component.name == name for name, component in program.components.items())
    encoder = program.component("encoder")
    assert encoder.compute_units == "cpu_only"
    assert program.component("drift").compute_units == "cpu_and_gpu"
    assert encoder.examples.keys() == {"ids"}
    assert torch.equal(program.component("drift").examples["z"], Z)
    assert encoder.used_weights() == ["table.weight"]


def test_inputs_of_the_host_have_examples_and_axes() -> None:
    program = odsora.capture(spec())
    assert [str(item) for item in program.inputs] == [
        'ids: int64[1, 3] "b l"',
        'z: float32[1, 4, 3, 5] "b c h w"',
    ]
    assert torch.equal(program.examples["z"], Z)
    assert [item.name for item in program.outputs] == ["video"]
    assert program.constants.keys() == {"constant_0"}
    assert program.host.name == "host"


def test_facts_name_the_axes_of_components() -> None:
    program = odsora.capture(spec(axes={"z": "b c h time"}))
    assert program.facts == {f"axis {name}" for name in "blchw"}


def test_roles_of_text_to_video_are_handed_on() -> None:
    roles = odsora.TextToVideo(TOKENIZER, tokens="ids", mask="", guidance="", fps=8.0)
    assert of_film(roles).text_to_video is roles


TOKENIZER = Tokenizer(models.BPE()).to_str()


def of_film(roles: odsora.TextToVideo, **inputs: Tensor) -> Program:
    def host(c: Any, ids: Tensor, z: Tensor, **more: Tensor) -> dict[str, Tensor]:
        z = z + c.encoder(ids=ids)
        return {"video": c.drift(z=z, t=torch.ones(1))[:, :3, None]}

    given = {"ids": torch.ones(1, 3).long(), "z": Z, **inputs}
    return odsora.capture(spec(host=host, inputs=given, text_to_video=roles))


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("tokenizer", "{}", "tokenizer.json"),
        ("tokenizer", 3, "give a text"),
        ("mask", None, "give a text"),
        ("fps", 0.0, "above 0"),
        ("fps", float("nan"), "above 0"),
        ("fps", float("inf"), "above 0"),
        ("padding", -1, "0 or more"),
        ("aesthetic_score", 10.5, "from 0 to 10"),
        ("suffix", " {foo}", "only {aesthetic_score}"),
        ("suffix", " {aesthetic_score:.2f}", "without a format"),
        ("suffix", " {", "only {aesthetic_score}"),
    ],
)
def test_fields_of_text_to_video_are_checked(field: str, value: Any, remedy: str) -> None:
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "tokens": "ids", "mask": "", "guidance": ""}
    with pytest.raises(CaptureError, match=field) as caught:
        of_film(odsora.TextToVideo(**{**given, field: value}))
    assert remedy.lower() in caught.value.hint.lower()


@pytest.mark.parametrize(
    ("role", "value", "remedy"),
    [
        ("mask", torch.ones(1, 3), "int64"),
        ("mask", torch.ones(1, 4).long(), "int64"),
        ("mask", torch.ones(3).long(), "int64"),
        ("guidance", torch.ones(2), "one float32"),
        ("guidance", torch.ones(1).double(), "one float32"),
    ],
)
def test_inputs_with_a_role_have_its_shape(role: str, value: Tensor, remedy: str) -> None:
    given: dict[str, Any] = {"tokens": "ids", "mask": "", "guidance": "", role: "given"}
    with pytest.raises(VerificationError, match=f"the {role} .*{remedy}"):
        of_film(odsora.TextToVideo(TOKENIZER, **given), given=value)


def test_a_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    program = odsora.capture(spec(inputs={**spec().inputs, "noisy": True}))
    loaded = load_program(save_program(program, tmp_path / "saved"))
    for name, value in evaluate_program(program, program.examples).items():
        assert torch.equal(evaluate_program(loaded, loaded.examples)[name], value)


def test_a_model_file_may_return_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_pipeline_spec import spec\n"
        "def build():\n"
        "    return spec()\n"
    )
    program = odsora.capture(tmp_path / "model.py")
    assert program.name == "model"
    expected = evaluate_program(odsora.capture(spec()), program.examples)["video"]
    assert torch.equal(evaluate_program(program, program.examples)["video"], expected)


def test_a_bare_model_keeps_its_examples_and_compute_units() -> None:
    single = drift_spec()
    single.compute_units = "all"
    component = odsora.capture(single).component("model")
    assert component.compute_units == "all"
    assert torch.equal(component.examples["z"], Z)


def test_compute_units_are_checked() -> None:
    single = drift_spec()
    single.compute_units = "cpu_and_npu"  # type: ignore[assignment]
    with pytest.raises(UsageError, match="'cpu_and_npu'") as caught:
        odsora.capture(spec(components={"encoder": spec().components["encoder"], "drift": single}))
    assert "component 'drift'" in caught.value.message
    assert "'cpu_and_gpu'" in caught.value.hint


def test_errors_of_a_component_name_it() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z if z.sum() > 0 else -z

    parts = {"broken": odsora.ModelSpec(Broken(), {"z": Z})}
    with pytest.raises(CaptureError, match=r"component 'broken': test_pipeline_spec\.py:\d+ in"):
        pipeline(lambda c, z: c.broken(z=z), {"z": Z}, parts)
    with pytest.raises(UsageError, match="axes name an input 'zz'"):
        odsora.capture(spec(axes={"zz": "b c h w"}))


@pytest.mark.parametrize("name", ["../../esc", "a/b", "", ".hidden", "dot.", 3])
def test_a_component_is_not_named_by_a_path(name: Any) -> None:
    with pytest.raises(CaptureError, match="a component cannot be called") as caught:
        odsora.capture(spec(components={**spec().components, name: drift_spec()}))
    assert repr(name) in caught.value.message and "No /, " in caught.value.hint


def test_components_may_share_a_module() -> None:
    drift = Drift()
    wide = numbers(1, 4, 3, 7)
    parts = {
        "narrow": odsora.ModelSpec(drift, {"z": Z, "t": torch.zeros(1)}),
        "wide": odsora.ModelSpec(drift, {"z": wide, "t": torch.zeros(1)}),
    }

    def host(c: Any, z: Tensor, wide: Tensor) -> dict[str, Tensor]:
        one = torch.ones(1)
        return {"narrow": c.narrow(z=z, t=one), "wide": c.wide(z=wide, t=one)}

    program = pipeline(host, {"z": Z, "wide": wide}, parts)
    with torch.no_grad():
        expected = drift(wide, torch.ones(1))
    assert torch.equal(evaluate_program(program, program.examples)["output_wide"], expected)


# ------------------------------------------------------------------ weights from files

MODEL = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r})
import torch
from samplers import Drift, Z, numbers
from test_pipeline_spec import Encoder
import odsora_compiler as odsora

def build(own: bool = False, unused: bool = False):
    drift, fixed = Drift(), Drift()
    if own:  # not by assignment, which leaves parameters empty where weights come from files
        fixed._parameters["mix"] = torch.nn.Parameter(numbers(4, 4, seed=3))
    t = torch.zeros(1)
    ids = torch.tensor([[1, 5, 6]])
    components = {{
        "encoder": odsora.ModelSpec(
            Encoder(), {{"ids": ids}}, unused=("decoder.*", "lm_head.*") if unused else ()
        ),
        "drift": odsora.ModelSpec(drift, {{"z": Z, "t": t}}),
        "again": odsora.ModelSpec(drift, {{"z": Z, "t": t}}, checkpoint="drift"),
        "fixed": odsora.ModelSpec(fixed, {{"z": Z, "t": t}}),
    }}
    def host(c, ids, z):
        z = z + c.encoder(ids=ids)
        z = z + c.drift(z=z, t=t) + c.again(z=z, t=t + 1) + c.fixed(z=z, t=t)
        return {{"out": z}}
    return odsora.PipelineSpec(components, host, {{"ids": ids, "z": Z}})
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path / "model.py"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    (folder / "encoder").mkdir(parents=True)
    save_file({"table.weight": numbers(7, 20, seed=21)}, folder / "encoder/part.safetensors")
    (folder / "encoder/config.json").write_text("{}")
    save_file({"mix": numbers(4, 4, seed=22)}, folder / "drift.safetensors")
    save_file({"mix": numbers(4, 4, seed=23)}, folder / "fixed.safetensors")
    return folder


def expected_output(fixed_seed: int) -> Tensor:
    encoder, drift, fixed = Encoder(), Drift(), Drift()
    encoder.load_state_dict({"table.weight": numbers(7, 20, seed=21)})
    drift.load_state_dict({"mix": numbers(4, 4, seed=22)})
    fixed.load_state_dict({"mix": numbers(4, 4, seed=fixed_seed)})
    t = torch.zeros(1)
    with torch.no_grad():
        z = Z + encoder(torch.tensor([[1, 5, 6]]))
        return z + drift(z, t) + drift(z, t + 1) + fixed(z, t)


def output(program: Program) -> Tensor:
    return evaluate_program(program, program.examples)["out"]


def test_each_component_has_a_file_or_a_folder_of_shards(model: Path, weights: Path) -> None:
    program = odsora.capture(model, weights=weights)
    assert torch.equal(output(program), expected_output(23))


def test_a_component_without_an_entry_keeps_weights_of_its_own(model: Path, weights: Path) -> None:
    (weights / "fixed.safetensors").unlink()
    assert torch.equal(
        output(odsora.capture(model, {"own": True}, weights=weights)), expected_output(3)
    )
    with pytest.raises(
        WeightsError, match="the weights of component 'fixed' are missing"
    ) as caught:
        odsora.capture(model, weights=weights)
    assert "Looked for fixed.safetensors and the folder fixed/" in caught.value.hint


def test_names_beyond_the_modules_own(model: Path, weights: Path) -> None:
    extra = {
        "decoder.block.weight": torch.zeros(3),
        "lm_head.weight": torch.zeros(2),
    }
    save_file(extra, weights / "encoder/rest.safetensors")
    with pytest.raises(WeightsError, match=r"component 'encoder': .*2 extra: decoder\.block"):
        odsora.capture(model, weights=weights)
    program = odsora.capture(model, {"unused": True}, weights=weights)
    assert torch.equal(output(program), expected_output(23))
    save_file({"head.weight": torch.zeros(2)}, weights / "encoder/more.safetensors")
    with pytest.raises(WeightsError, match=r"1 extra: head\.weight"):
        odsora.capture(model, {"unused": True}, weights=weights)


def test_an_entry_of_no_component(model: Path, weights: Path) -> None:
    (weights / "drift.safetensors").rename(weights / "drfit.safetensors")
    with pytest.raises(WeightsError, match="no component has weights called 'drfit'") as caught:
        odsora.capture(model, weights=weights)
    assert "'drift'" in caught.value.hint


def test_an_entry_that_is_there_twice(model: Path, weights: Path) -> None:
    (weights / "drift").mkdir()
    save_file({"mix": torch.zeros(4, 4)}, weights / "drift/one.safetensors")
    with pytest.raises(WeightsError, match=r"both drift and drift\.safetensors"):
        odsora.capture(model, weights=weights)


@pytest.mark.parametrize("place", ["drift.pth", "drift/pytorch_model.bin"])
def test_pickled_checkpoints(model: Path, weights: Path, place: str) -> None:
    (weights / "drift.safetensors").unlink()
    (weights / place).parent.mkdir(exist_ok=True)
    (weights / place).write_bytes(b"anything")
    with pytest.raises(WeightsError, match="loading it would run code") as caught:
        odsora.capture(model, weights=weights)
    assert place in caught.value.message
    assert "weights_only=True" in caught.value.hint
    assert "safetensors.torch.save_file" in caught.value.hint


@pytest.mark.parametrize("left", ["encoder", "fixed", ""])
def test_pickled_checkpoints_by_other_names(model: Path, weights: Path, left: str) -> None:
    (weights / "model.ckpt").write_bytes(b"anything")
    assert torch.equal(output(odsora.capture(model, weights=weights)), expected_output(23))
    for entry in weights.glob("*.safetensors"):
        if entry.stem != left:
            entry.unlink()
    if left != "encoder":
        shutil.rmtree(weights / "encoder")
    with pytest.raises(WeightsError, match=r"model\.ckpt: loading it would run code") as caught:
        odsora.capture(model, weights=weights)
    assert "weights_only=True" in caught.value.hint


def test_own_weights_do_not_hide_what_was_given(model: Path, weights: Path, tmp_path: Path) -> None:
    (weights / "fixed.safetensors").rename(weights / "fixed.pt")
    with pytest.raises(WeightsError, match=r"fixed\.pt: loading it would run code"):
        odsora.capture(model, {"own": True}, weights=weights)
    model.write_text(ALL_OWN)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        WeightsError, match="empty: no weights of any component are there"
    ) as caught:
        odsora.capture(model, weights=empty)
    assert "drift.safetensors" in caught.value.hint
    (empty / "drift.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"drift\.bin: loading it would run code"):
        odsora.capture(model, weights=empty)


ALL_OWN = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r})
import torch
from samplers import Drift, Z
import odsora_compiler as odsora

def build():
    drift = Drift()
    drift._parameters["mix"] = torch.nn.Parameter(torch.ones(4, 4))
    t = torch.zeros(1)
    parts = {{"drift": odsora.ModelSpec(drift, {{"z": Z, "t": t}})}}
    return odsora.PipelineSpec(parts, lambda c, z: {{"v": c.drift(z=z, t=t)}}, {{"z": Z}})
"""


def test_one_file_for_a_pipeline(model: Path, weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"drift\.safetensors is one file") as caught:
        odsora.capture(model, weights=weights / "drift.safetensors")
    assert "encoder.safetensors, drift.safetensors, fixed.safetensors" in caught.value.hint
    with pytest.raises(WeightsError, match="would run code"):
        (weights / "all.pth").write_bytes(b"")
        odsora.capture(model, weights=weights / "all.pth")


def test_a_misfit_names_component_and_file(model: Path, weights: Path) -> None:
    save_file({"mix": torch.zeros(4, 5)}, weights / "fixed.safetensors")
    with pytest.raises(
        WeightsError, match=r"component 'fixed': .*fixed\.safetensors does not fit the model"
    ):
        odsora.capture(model, weights=weights)
