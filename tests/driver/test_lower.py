"""What `lower` refuses before it starts."""

from pathlib import Path

import pytest
import torch
from torch import nn

import odsora_compiler as odsora
from odsora_compiler.errors import UsageError


def model(dtype: torch.dtype = torch.float32) -> odsora.ModelSpec:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype)
    return odsora.ModelSpec(module, {"input": torch.randn(4, 32, dtype=dtype)})


def test_a_plan_holds_in_the_precision_it_was_made_for(tmp_path: Path) -> None:
    program = odsora.run_passes(odsora.capture(model()), "cidl{budget=5kB}")
    with pytest.raises(UsageError, match="cut for fp16"):
        odsora.lower(program, tmp_path / "a.odsora", precision="fp32")
    assert list(tmp_path.iterdir()) == []
    again = odsora.run_passes(odsora.capture(model()), "cidl{budget=9kB}", precision="fp32")
    bundle = odsora.lower(again, tmp_path / "a.odsora", precision="fp32")
    packages = odsora.load(bundle).bundle.component("model").packages.values()
    assert len(packages) == 2 and all(entry.weight_bytes <= 9000 for entry in packages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_lowered_in_half_precision_only(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    program = odsora.capture(model(dtype))
    with pytest.raises(UsageError, match=str(dtype).removeprefix("torch.")):
        odsora.lower(program, tmp_path / "a.odsora", precision="fp32")
    assert odsora.lower(program, tmp_path / "a.odsora").is_dir()


def test_a_table_stored_in_half_precision_is_no_half_precision_model(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.linspace(0, 1, 32).half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table.float()

    spec = odsora.ModelSpec(Table(), {"x": torch.randn(4, 32)})
    assert odsora.lower(odsora.capture(spec), tmp_path / "a.odsora", precision="fp32").is_dir()
