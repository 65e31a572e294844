"""Capturing with weights from a file: the model never has its own, tables keep their values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from odsora_compiler.errors import CaptureError, UsageError, WeightsError
from odsora_compiler.frontend.capture import capture
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program

MODEL = """
import torch
from torch import nn
from odsora_compiler import ModelSpec


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("kept", torch.full((width,), 3.0))
        self.register_buffer("table", torch.arange(width).float(), persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale + self.table + torch.tensor(0.5)
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.kept
        return self.head(x)


def build(width: int = 4):
    torch.manual_seed(0)
    return ModelSpec(Model(width), {"tokens": torch.tensor([[1, 5, 2]])})
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def checkpoint(seed: int = 5, width: int = 4) -> dict[str, torch.Tensor]:
    """Weights unlike those the model starts with; the tied one is stored once."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (8, width),
        "blocks.0.weight": (width, width),
        "blocks.0.bias": (width,),
        "blocks.1.weight": (width, width),
        "blocks.1.bias": (width,),
        "scale": (width,),
        "kept": (width,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected(state: dict[str, torch.Tensor]) -> torch.Tensor:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)  # the model's own module, given the same weights
    module = namespace["build"]().module  # type: ignore[operator]
    module.load_state_dict({**state, "head.weight": state["embed.weight"]}, strict=True)
    with torch.no_grad():
        result: torch.Tensor = module.eval()(torch.tensor([[1, 5, 2]]))
    return result


def output(program: Program) -> torch.Tensor:
    return evaluate_program(program, program.examples)["output"]


def test_one_file(model: Path, tmp_path: Path) -> None:
    save_file(checkpoint(), tmp_path / "w.safetensors")
    program = capture(model, weights=tmp_path / "w.safetensors")
    assert torch.equal(output(program), expected(checkpoint()))


def test_tables_of_the_constructor_and_literals_keep_their_values(
    model: Path, tmp_path: Path
) -> None:
    save_file(checkpoint(), tmp_path / "w.safetensors")
    component = capture(model, weights=tmp_path / "w.safetensors").component("model")
    assert component.weights.load("table").tolist() == [0.0, 1.0, 2.0, 3.0]
    (literal,) = [name for name in component.used_weights() if name.startswith("lifted")]
    assert component.weights.load(literal).item() == 0.5
    assert torch.equal(component.weights.load("kept"), checkpoint()["kept"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_cast(
    model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in checkpoint().items()}
    save_file(state, tmp_path / "w.safetensors")
    program = capture(model, weights=tmp_path / "w.safetensors")
    assert program.component("model").weights.spec("scale").dtype == torch.float32
    rounded = {name: tensor.float() for name, tensor in state.items()}
    assert torch.equal(output(program), expected(rounded))


def test_the_tied_name_may_be_the_one_that_is_stored(model: Path, tmp_path: Path) -> None:
    state = checkpoint()
    save_file(
        {"head.weight" if name == "embed.weight" else name: t for name, t in state.items()},
        tmp_path / "w.safetensors",
    )
    program = capture(model, weights=tmp_path / "w.safetensors")
    assert torch.equal(output(program), expected(state))


def test_every_misfit_is_named_at_once(model: Path, tmp_path: Path) -> None:
    state = checkpoint()
    del state["blocks.1.bias"]
    state["block.1.bias"] = torch.zeros(4)
    state["scale"] = torch.zeros(5)
    state["kept"] = torch.zeros(4, dtype=torch.int32)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        capture(model, weights=tmp_path / "w.safetensors")
    text = str(caught.value)
    assert "w.safetensors does not fit the model" in text
    assert "1 missing: blocks.1.bias" in text
    assert "1 extra: block.1.bias" in text
    assert "1 misshaped: scale [5] instead of [4]" in text
    assert "kept torch.int32 instead of torch.float32" in text
    assert "Did you mean 'block.1.bias'?" in text


def test_a_checkpoint_of_another_size_names_the_options(model: Path, tmp_path: Path) -> None:
    save_file(checkpoint(width=6), tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError, match=r"8 misshaped: scale \[6\] instead of \[4\], .*, …"
    ) as caught:
        capture(model, weights=tmp_path / "w.safetensors")
    assert "--set" in caught.value.hint
    capture(model, {"width": 6}, weights=tmp_path / "w.safetensors")


def test_missing_weights_are_said_before_the_model_runs(tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text("raise AssertionError('ran')\n")
    with pytest.raises(UsageError, match="no such weights file"):
        capture(tmp_path / "never.py", weights=tmp_path / "none.safetensors")


def test_parameters_never_take_memory(tmp_path: Path) -> None:
    """8 layers of 2 GB each."""
    (tmp_path / "large.py").write_text(
        """
import torch
from torch import nn
from odsora_compiler import ModelSpec

def build():
    layers = nn.Sequential(*(nn.Linear(23200, 23200, bias=False) for _ in range(8)))
    return ModelSpec(layers, {"input": torch.ones(1, 23200)})
"""
    )
    # A sparse file: it has the names and the size of real weights and takes no disk.
    header = (
        "{"
        + ",".join(
            f'"{i}.weight":{{"dtype":"F32","shape":[23200,23200],'
            f'"data_offsets":[{i * 2152960000},{(i + 1) * 2152960000}]}}'
            for i in range(8)
        )
        + "}"
    )
    with open(tmp_path / "w.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 8 * 2152960000)
    script = f"""
import resource
import odsora_compiler as odsora
from odsora_compiler.ir.reference import evaluate_program
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = {str(tmp_path)!r}
program = odsora.capture(folder + "/large.py", weights=folder + "/w.safetensors")
assert len(program.component("large").used_weights()) == 8
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, f"capture took {done.stdout} MB for 17 GB of weights"


def test_a_model_on_the_meta_device_takes_its_weights_from_the_file(
    model: Path, tmp_path: Path
) -> None:
    text = MODEL.replace("ModelSpec(Model(width), ", "ModelSpec(on_meta(width), ")
    text += """

def on_meta(width):
    with torch.device("meta"):
        model = Model(width)
    model.table = torch.arange(width).float()
    return model
"""
    model.write_text(text)
    save_file(checkpoint(), tmp_path / "w.safetensors")
    program = capture(model, weights=tmp_path / "w.safetensors")
    assert torch.equal(output(program), expected(checkpoint()))
    with pytest.raises(CaptureError, match="is on the meta device and holds no data") as caught:
        capture(model)
    assert "--weights" in caught.value.hint
    model.write_text(text.replace("    model.table = torch.arange(width).float()\n", ""))
    with pytest.raises(CaptureError, match="the buffer 'table' is on the meta device"):
        capture(model, weights=tmp_path / "w.safetensors")


def test_a_built_module_can_take_other_weights(tmp_path: Path) -> None:
    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    save_file(checkpoint(), tmp_path / "w.safetensors")
    spec = namespace["build"]()  # type: ignore[operator]
    program = capture(spec, weights=tmp_path / "w.safetensors")
    assert torch.equal(output(program), expected(checkpoint()))
