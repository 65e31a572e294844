"""Ways around PyTorch's operators: what a host's Python does with a traced tensor itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samplers import Z, compared, refused
from torch import Tensor, nn

ONE = torch.ones(1)


def buffer(z: Tensor) -> Tensor:
    """A real tensor of no dimensions whose value is traced."""
    made = torch.zeros(())
    made += z.mean()
    return made


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("traced", [torch.mean, buffer])
def test_a_format_asks_for_the_value(traced: Callable[[Tensor], Tensor]) -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        print(f"{traced(z):.3f}")  # here
        return c.drift(z=z, t=ONE)

    text = refused(sample)
    assert "Python asks for the value of a traced tensor (Tensor.__format__)" in text
    assert "without a format" in text


def test_what_is_printed_shows_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        print(f"{z.mean()}", [buffer(z)], z, torch.tensor(0.5))
        return {"v": c.drift(z=z, t=ONE)}

    compared(sample, {"z": Z})
    assert capsys.readouterr().out.startswith(
        "traced float32[] [traced float32[]] traced float32[1, 4, 3, 5] tensor(0.5000)\n"
    )


# ------------------------------------------------------------------ tensors of lists


@pytest.mark.parametrize("traced", [torch.mean, buffer])
@pytest.mark.parametrize(
    "make",
    [
        lambda mean: torch.tensor([mean, 1.0]),
        lambda mean: torch.tensor(data=[[mean], [1.0]]),
        lambda mean: torch.as_tensor((mean,)),
        lambda mean: torch.asarray([mean]),
        lambda mean: ONE.new_tensor([mean]),
        lambda mean: mean.new([mean]),
    ],
)
def test_a_list_of_traced_tensors(
    make: Callable[[Tensor], Tensor], traced: Callable[[Tensor], Tensor]
) -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        scale = make(traced(z))
        return c.drift(z=z * scale[0], t=ONE)

    text = refused(sample)
    assert "test_host_escapes.py:" in text
    assert "a list with traced tensors" in text
    assert "torch.stack" in text


def test_tensors_of_traced_tensors_and_of_numbers() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        means = torch.stack([z.mean(), torch.tensor(1.0)])
        scale = z.new_tensor([2.0, 3.0]) + torch.as_tensor(means)
        return {"v": c.drift(z=z, t=ONE) * scale[0]}

    compared(sample, {"z": Z}, tolerance=1e-6)


# ------------------------------------------------------------------ memory


def test_a_copy_is_shallow_or_deep() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        early = torch.zeros(2)
        known = {"z": z, "buffer": buffer(z), "early": early}
        shallow = {name: copy.copy(value) for name, value in known.items()}
        deep = copy.deepcopy(known)
        early[0] = z.mean()
        z += 1
        known["buffer"] *= 2
        found = {f"{name}_shallow": value + 0 for name, value in shallow.items()}
        found |= {f"{name}_deep": value + 0 for name, value in deep.items()}
        return {**found, "same": copy.copy(known)["z"] * 2, "v": c.drift(z=z, t=ONE)}

    compared(sample, {"z": Z}, tolerance=1e-6)


def test_a_traced_tensor_does_not_get_other_data() -> None:
    def of_traced(c: Any, z: Tensor) -> Tensor:
        z.data = z.data + 1  # here
        return c.drift(z=z, t=ONE)

    def of_real(c: Any, z: Tensor) -> Tensor:
        made = torch.zeros_like(Z)
        made.data = z  # here
        return c.drift(z=made, t=ONE)

    def of_buffer(c: Any, z: Tensor) -> Tensor:
        mean = buffer(z)
        mean.data = torch.ones(())  # here
        return c.drift(z=z * mean, t=ONE)

    for host in (of_traced, of_real, of_buffer):
        text = refused(host)
        assert "gives a traced tensor other memory" in text
        assert "copy_" in text


def test_data_of_real_tensors_is_theirs() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        layer = nn.LayerNorm(5).double().float()
        layer.weight.data = torch.full((5,), 2.0)
        z.data.mul_(3)
        return {"v": c.drift(z=layer(z), t=ONE), "scaled": z + 0}

    compared(sample, {"z": Z}, tolerance=1e-6)


def test_statistics_of_a_batch_norm() -> None:
    def training(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=nn.BatchNorm2d(4)(z), t=ONE)  # here

    text = refused(training)
    assert "a batch norm in training changes its statistics" in text
    assert ".eval()" in text

    def evaluating(c: Any, z: Tensor) -> dict[str, Tensor]:
        z = nn.InstanceNorm2d(4)(nn.BatchNorm2d(4).eval()(z))
        return {"v": c.drift(z=z, t=ONE)}

    compared(evaluating, {"z": Z}, tolerance=1e-6)


# ------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    "move",
    [
        lambda z: z.to("cuda"),
        lambda z: z.to(torch.device("cuda:0"), torch.float16),
        lambda z: z.to(device="mps"),
        lambda z: z.cuda(),
        lambda z: z + torch.ones(1, device="cuda"),
        lambda z: z + torch.ones(1).to("cuda"),
        lambda z: z + torch.randn_like(z, device="cuda"),
        lambda z: nn.LayerNorm(5).to("cuda")(z),
    ],
)
def test_other_devices(move: Callable[[Tensor], Tensor]) -> None:
    def sample(c: Any, z: Tensor) -> Tensor:
        return c.drift(z=move(z), t=ONE)

    text = refused(sample)
    assert re.match(r"test_host_escapes\.py:\d+ in .*: the host asks for the device '\w+", text)
    assert "device=z.device" in text


def test_the_device_of_a_tensor_is_the_cpu() -> None:
    def sample(c: Any, z: Tensor) -> dict[str, Tensor]:
        steps = torch.linspace(0, 1, 5, device=z.device).to(z.device, z.dtype).to("cpu").cpu()
        return {"v": c.drift(z=z.to("cpu") * steps, t=ONE)}

    compared(sample, {"z": Z}, tolerance=1e-6)


# ------------------------------------------------------------------ results


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            lambda v: {"v": v, "steps": 3},
            "the host's result 'steps' is no tensor but 3, of type int",
        ),
        (lambda v: {"v": v, "video": None}, "the host's result 'video' is no tensor but None"),
        (
            lambda v: {"v": v, "parts": [v, 0.5]},
            "result 'parts_1' is no tensor but 0.5, of type float",
        ),
        (
            lambda v: {"v": v, "array": torch.ones(999).numpy()},
            "result 'array' is no tensor but array([1., 1.",
        ),
        (lambda v: (v, "text"), "the host's result '1' is no tensor but 'text', of type str"),
    ],
)
def test_results_that_are_no_tensors(result: Callable[[Tensor], Any], expected: str) -> None:
    def sample(c: Any, z: Tensor) -> Any:
        return result(c.drift(z=z, t=ONE))

    text = refused(sample)
    assert expected in text and len(text) < 300
    assert "A host returns tensors" in text
