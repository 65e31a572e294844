"""A toy denoiser, comparing a host's eager results with its traced graph's, and refused hosts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odsora_compiler as odsora
from odsora_compiler.errors import CaptureError
from odsora_compiler.ir.program import Program
from odsora_compiler.ir.reference import evaluate_program


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Drift(nn.Module):
    """z [B, 4, h, w] and t [B] to [B, 4, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.3 * numbers(4, 4, seed=9))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", z, self.mix)
        return torch.tanh(mixed) + t[:, None, None, None] / 1000


Z = numbers(1, 4, 3, 5)


def drift_spec(batch: int = 1) -> odsora.ModelSpec:
    return odsora.ModelSpec(
        Drift().eval(),
        inputs={"z": Z.expand(batch, -1, -1, -1).clone(), "t": torch.zeros(batch)},
        axes={"z": "b c h w", "t": "b"},
    )


def pipeline(
    host: Callable[..., Any],
    inputs: Mapping[str, Any],
    components: Mapping[str, odsora.ModelSpec] | None = None,
) -> Program:
    """The program of a host that calls `drift`, a `Drift` for one sample, or these components."""
    parts = {"drift": drift_spec()} if components is None else components
    return odsora.capture(odsora.PipelineSpec(parts, host, inputs))


def eager(components: Mapping[str, odsora.ModelSpec]) -> SimpleNamespace:
    """What a host is given to run without the compiler."""

    def caller(module: nn.Module) -> Callable[..., Any]:
        def call(**inputs: Tensor) -> Any:
            with torch.no_grad():
                outputs = module(**inputs)
            if not isinstance(outputs, dict):
                return outputs
            return next(iter(outputs.values())) if len(outputs) == 1 else SimpleNamespace(**outputs)

        return call

    return SimpleNamespace(**{name: caller(spec.module) for name, spec in components.items()})


def compared(
    host: Callable[..., Any],
    inputs: Mapping[str, Any],
    components: Mapping[str, odsora.ModelSpec] | None = None,
    tolerance: float = 0.0,
) -> Program:
    """The program, checked to give what the host gives; `host` returns a dict of tensors."""
    parts = {"drift": drift_spec()} if components is None else components
    program = pipeline(host, inputs, parts)
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        expected = host(eager(parts), **own)
    found = evaluate_program(program, program.examples)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    return program


def operators(program: Program) -> list[str]:
    """Operators of the host, in order, without `aten` and the overload."""
    return [
        getattr(node.target, "overloadpacket", node.target).__name__
        for node in program.host.operators()
    ]


def refused(host: Callable[..., Any], **more: Any) -> str:
    """The message, checked to name the host's line that has the words `# here`, if one has."""
    with pytest.raises(CaptureError) as caught:
        pipeline(host, {"z": Z}, **more)
    text = str(caught.value)
    lines, first = inspect.getsourcelines(host)
    file = Path(inspect.getsourcefile(host) or "").name
    for line, words in enumerate(lines, first):
        if words.endswith("# here\n"):
            assert f"{file}:{line} in {host.__name__}" in text, text
    return text
