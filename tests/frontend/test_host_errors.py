"""What a host cannot do: each message names the line of the sampler and what to do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samplers import Drift, Z, drift_spec, numbers, pipeline, refused
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.errors import CaptureError
from odsora_compiler.ir.reference import evaluate_program

# ------------------------------------------------------------------ values of traced tensors


def branch(c: Any, z: Tensor) -> Tensor:
    v = c.drift(z=z, t=torch.ones(1))
    if v.norm() > 1:  # here
        z = z + v
    return z


def item(c: Any, z: Tensor) -> Tensor:
    scale = z.std().item()  # here
    return c.drift(z=z / scale, t=torch.ones(1))


def number(c: Any, z: Tensor) -> Tensor:
    return c.drift(z=z * float(z[0, 0, 0, 0]), t=torch.ones(1))  # here


def listed(c: Any, z: Tensor) -> Tensor:
    return c.drift(z=z * z.flatten().tolist()[0], t=torch.ones(1))  # here


def to_numpy(c: Any, z: Tensor) -> Tensor:
    return c.drift(z=torch.from_numpy(z.numpy() * 2), t=torch.ones(1))  # here


def as_array(c: Any, z: Tensor) -> Tensor:
    return c.drift(z=torch.as_tensor(np.asarray(z) * 2), t=torch.ones(1))  # here


def equality(c: Any, z: Tensor) -> Tensor:
    return z if torch.equal(z, z + 1) else c.drift(z=z, t=torch.ones(1))  # here


def buffer_to_numpy(c: Any, z: Tensor) -> Tensor:
    norms = torch.zeros(3)
    norms[0] = z.norm()
    scale = norms.numpy()[0]  # here
    return c.drift(z=z * scale, t=torch.ones(1))


def buffer_item(c: Any, z: Tensor) -> Tensor:
    norms = torch.zeros(3)
    first = norms[:1]
    norms += z.norm()
    return c.drift(z=z * first.item(), t=torch.ones(1))  # here


def drawn(c: Any, z: Tensor) -> Tensor:
    return c.drift(z=z, t=torch.ones(1)) * (1 if torch.rand(1) > 0.5 else 2)  # here


@pytest.mark.parametrize(
    "host",
    [
        branch,
        item,
        number,
        listed,
        to_numpy,
        as_array,
        equality,
        buffer_to_numpy,
        buffer_item,
        drawn,
    ],
)
def test_python_cannot_see_a_traced_value(host: Callable[..., Any]) -> None:
    text = refused(host)
    assert "Python asks for the value of a traced tensor" in text
    assert "torch.where" in text


def test_a_line_of_a_library_comes_with_that_of_the_sampler_that_calls_it() -> None:
    diffusers = pytest.importorskip("diffusers")

    def sample(c: Any, z: Tensor) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(2)
        t = scheduler.timesteps[0] + z.mean()
        z = scheduler.step(c.drift(z=z, t=torch.ones(1)), t, z).prev_sample  # here
        return z

    assert re.search(r"scheduling_\w+\.py:\d+ in \w+, called at test_host_errors", refused(sample))


def test_shapes_cannot_depend_on_values() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z, t=torch.ones(1)).mean() + z[z > 0].sum()  # here

    assert "the shape of a value depends on a traced tensor's values" in refused(sample)


# ------------------------------------------------------------------ operators


def test_draws_without_a_form_in_graphs() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        order = torch.randperm(5)  # here
        return c.drift(z=z[..., order], t=torch.ones(1))

    text = refused(sample)
    assert "aten.randperm" in text
    assert "torch.Generator" in text


def test_memory_of_one_type_seen_as_another() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        bits = z.view(torch.int32)  # here
        return c.drift(z=bits.float(), t=torch.ones(1))

    assert "depends on how values lie in memory" in refused(sample)


def test_writing_where_elements_share_memory() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        wide = z[:, :1].expand(1, 4, 3, 5)
        wide += c.drift(z=z, t=torch.ones(1))  # here
        return wide

    assert "clone()" in refused(sample)


def test_a_tensor_does_not_get_other_memory() -> None:
    def resized(c: Any, z: Tensor) -> Tensor:
        z.resize_(3)  # here
        return c.drift(z=z, t=torch.ones(1))

    def out(c: Any, z: Tensor) -> Tensor:
        mean = torch.add(z, 1, out=torch.empty(0))  # here
        return c.drift(z=mean, t=torch.ones(1))

    assert "gives a traced tensor other memory" in refused(resized)
    assert "is written into a tensor of shape [0]" in refused(out)


def test_errors_of_the_sampler_itself() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z, t=torch.ones(1)) + torch.ones(7)  # here

    assert "RuntimeError" in refused(sample)

    def without_z(c: Any) -> Tensor:
        return c.drift(z=Z, t=torch.ones(1))

    assert "unexpected keyword argument 'z'" in refused(without_z)


# ------------------------------------------------------------------ calls of components


def test_unknown_component() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drfit(z=z, t=torch.ones(1))  # here

    text = refused(sample)
    assert "there is no component 'drfit'" in text
    assert "Did you mean 'drift'?" in text


def test_inputs_go_by_name() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drift(z, torch.ones(1))  # here

    assert "inputs of component 'drift' are given by name" in refused(sample)


def test_unknown_and_missing_inputs() -> None:
    def unknown(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z, tt=torch.ones(1))  # here

    text = refused(unknown)
    assert "component 'drift' has no input 'tt'" in text
    assert "Did you mean 't'?" in text

    def missing(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z)  # here

    text = refused(missing)
    assert "the call of component 'drift' lacks its input t" in text
    assert 't: float32[1] "b"' in text


def test_wrong_shape_and_dtype() -> None:
    def shape(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z[..., :4], t=torch.ones(1))  # here

    text = refused(shape)
    assert "input 'z' of component 'drift' is given float32[1, 4, 3, 4]" in text
    assert 'expected z: float32[1, 4, 3, 5] "b c h w"' in text

    def dtype(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z, t=torch.ones(1).long())  # here

    assert "input 't' of component 'drift' is given int64[1], expected t: float32" in refused(dtype)


def test_what_is_no_tensor_is_bound_at_capture() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, mask: Tensor | None) -> Tensor:
            return x * scale

    parts = {"scaled": odsora.ModelSpec(Scaled(), {"x": Z, "scale": 2.0, "mask": None})}

    def number(c: Any, z: Tensor) -> Tensor:
        return c.scaled(x=z, scale=3.0)  # here

    def none(c: Any, z: Tensor) -> Tensor:
        return c.scaled(x=z, mask=None)  # here

    def tensor(c: Any, z: Tensor) -> Tensor:
        return c.scaled(x=z, scale=torch.tensor(3.0))  # here

    assert "is given 3.0, which is no tensor" in refused(number, components=parts)
    assert "is given None, which is no tensor" in refused(none, components=parts)
    assert "no input 'scale'" in refused(tensor, components=parts)


def test_unknown_output() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"mean": x.mean(), "std": x.std()}

    def sample(c: Any, z: Tensor) -> Tensor:
        return c.two(x=z).maen  # here

    text = refused(sample, components={"two": odsora.ModelSpec(Two(), {"x": Z})})
    assert "there is no output 'maen'. Did you mean 'mean'?" in text


def test_a_component_that_is_never_called() -> None:
    def never(c: Any, z: Tensor) -> Tensor:
        return z * 2

    def unused(c: Any, z: Tensor) -> Tensor:
        c.drift(z=z, t=torch.ones(1))
        return z * 2

    for host in (never, unused):
        assert "component 'drift' is never called by the host" in refused(host)


def test_a_host_that_returns_nothing() -> None:
    def sample(c: Any, z: Tensor) -> None:
        c.drift(z=z, t=torch.ones(1))

    assert "the host returns no tensor" in refused(sample)


# ------------------------------------------------------------------ weights that are not there


def test_weights_from_a_file_are_not_there_for_the_host(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        """
import odsora_compiler as odsora
from samplers import Drift, Z
import torch

def build(read=True):
    drift = Drift()
    spec = odsora.ModelSpec(drift, {"z": Z, "t": torch.zeros(1)})
    def sample(c, z):
        v = c.drift(z=z, t=torch.ones(1))
        return v * drift.mix.mean() if read else v
    return odsora.PipelineSpec({"drift": spec}, sample, {"z": Z})
"""
    )
    (tmp_path / "weights").mkdir()
    save_file({"mix": numbers(4, 4)}, tmp_path / "weights/drift.safetensors")
    with pytest.raises(CaptureError, match=r"model\.py:12 in sample: this tensor holds no data"):
        odsora.capture(model, weights=tmp_path / "weights")
    odsora.capture(model, {"read": False}, weights=tmp_path / "weights")


def test_a_deep_copy_of_a_buffer_has_its_traced_value() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        buffer = torch.zeros(2)
        buffer[0] = z.mean()
        copied = copy.deepcopy(buffer)
        buffer[1] = 3.0
        return {"copied": copied + 0, "v": c.drift(z=z, t=torch.ones(1))}

    found = evaluate_program(pipeline(sample, {"z": Z}), {"z": Z})["copied"]
    assert torch.equal(found, torch.stack([Z.mean(), torch.tensor(0.0)]))


def test_specs_of_the_wrong_kind() -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=z, t=torch.ones(1))

    def spec(**changed: Any) -> odsora.PipelineSpec:
        given = {"components": {"drift": drift_spec()}, "host": sample, "inputs": {"z": Z}}
        return odsora.PipelineSpec(**{**given, **changed})  # type: ignore[arg-type]

    for changed, expected in (
        ({"components": {}}, "names no component"),
        ({"components": {"drift": Drift()}}, "component 'drift': it is a Drift, not a ModelSpec"),
        ({"host": None}, "host is a NoneType, not a function"),
        ({"inputs": [Z]}, "PipelineSpec.inputs is a list, not a mapping"),
    ):
        with pytest.raises(CaptureError, match=re.escape(expected)):
            odsora.capture(spec(**changed))
