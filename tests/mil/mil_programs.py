"""Building Core ML packages for tests: single operations, many to a package, and whole modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.converters.mil as mil
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import types

from odsora_compiler.mil.interpreter import Interpreter
from odsora_compiler.mil.package import Package

# The name coremltools' own documentation uses throughout.
mb = mil.Builder
OPSET = ct.target.iOS18

# Turns values into a numpy array of the float type a program is built for.
ToFloat = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One operation: how to build it, what it takes, and what it must give.

    `build(f, **inputs)` makes it from MIL values, `f` turning numbers into constants of the float
    type under test. `expect(**inputs)` is the independent reference, over fp64 tensors.
    """

    name: str
    build: Callable[..., Any]
    expect: Callable[..., Any]
    inputs: dict[str, torch.Tensor]


def case(
    name: str, build: Callable[..., Any], expect: Callable[..., Any], /, **inputs: Any
) -> Case:
    """A case; an input given as a shape is normally distributed. All floats are rounded to fp16."""
    made = {
        key: value if isinstance(value, torch.Tensor) else numbers(*value)
        for key, value in inputs.items()
    }
    exact = {k: v.half().double() if v.is_floating_point() else v for k, v in made.items()}
    return Case(name, build, expect, exact)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed fp64 numbers that fp16 holds exactly, the same on every call."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).half().double()


def conformance_test(cases: Sequence[Case], target: ct.target = OPSET) -> Callable[..., None]:
    """A test over the cases, by name, each in fp32 and in fp16."""
    assert len({c.name for c in cases}) == len(cases), "two cases of one name"
    conformance = Conformance(cases, target)

    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    @pytest.mark.parametrize("name", [c.name for c in cases])
    def test(name: str, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        conformance.check(name, dtype, tmp_path_factory)

    return test


class Conformance:
    """The cases of a theme, built into one package and run once for each float type."""

    def __init__(self, cases: Sequence[Case], target: ct.target) -> None:
        self._cases = {c.name: c for c in cases}
        self._target = target
        self._results: dict[str, dict[str, torch.Tensor]] = {}

    def check(self, name: str, dtype: str, folders: pytest.TempPathFactory) -> None:
        """Compare one case with its reference; an fp16 result may be off by its last bit."""
        if dtype not in self._results:
            self._results[dtype] = self._run(dtype, folders.mktemp(dtype) / "all.mlpackage")
        expected = self._cases[name].expect(**self._cases[name].inputs)
        expected = expected if isinstance(expected, tuple | list) else (expected,)
        for k, want in enumerate(expected):
            got = self._results[dtype][f"{name}_{k}"]
            assert got.shape == want.shape
            if not want.is_floating_point():
                assert torch.equal(got.long(), want.long()), f"got {got}, want {want}"
            elif dtype == "fp16":
                want = want.half()
                assert got.dtype == torch.float16
                torch.testing.assert_close(got, want, rtol=2**-10, atol=2e-6, equal_nan=True)
            else:
                assert got.dtype == torch.float32
                torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=2e-6, equal_nan=True)

    def _run(self, dtype: str, path: Path) -> dict[str, torch.Tensor]:
        inputs = {f"{c.name}_{key}": v for c in self._cases.values() for key, v in c.inputs.items()}
        build_package(path, list(self._cases.values()), dtype, self._target)
        carried = {key: _carried(value, dtype) for key, value in inputs.items()}
        return Interpreter(Package.open(path)).run(carried)


def build_package(path: Path, cases: Sequence[Case], dtype: str, target: ct.target = OPSET) -> None:
    """Save one program with every case in it; inputs and outputs are named after the cases."""
    mil_type = types.fp16 if dtype == "fp16" else types.fp32
    specs, names = [], []
    for c in cases:
        for key, value in c.inputs.items():
            carried = _carried(value, dtype).dtype
            specs.append(
                mb.TensorSpec(
                    shape=tuple(value.shape),
                    dtype=types.int32 if carried == torch.int32 else mil_type,
                )
            )
            names.append(f"{c.name}_{key}")

    def f(values: Any) -> np.ndarray:
        return np.asarray(values, dtype=np.float16 if dtype == "fp16" else np.float32)

    # mb names inputs after the function's parameters, so it needs one of just this signature.
    namespace: dict[str, Any] = {"build_all": lambda given: _build(cases, f, given)}
    exec(f"def program({', '.join(names)}):\n    return build_all(dict(locals()))", namespace)
    program = mb.program(input_specs=specs, opset_version=target)(namespace["program"])
    save(program, path, target=target, pass_pipeline=ct.PassPipeline.EMPTY)


def save(
    program: Any, path: Path, precision: str = "fp32", target: ct.target = OPSET, **options: Any
) -> Any:
    """Convert a MIL program, or an exported one, save it as a package and return the model."""
    model = ct.convert(
        program,
        minimum_deployment_target=target,
        compute_precision=getattr(ct.precision, "FLOAT16" if precision == "fp16" else "FLOAT32"),
        skip_model_load=True,
        **options,
    )
    model.save(str(path))
    return model


def convert_module(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path, precision: str = "fp32"
) -> Any:
    """Export a module, convert it without any legalization, save it and return the model."""
    exported = torch.export.export(module.eval(), (), inputs, strict=False).run_decompositions({})
    return save(exported, path, precision)


def _build(cases: Sequence[Case], f: ToFloat, given: dict[str, Any]) -> tuple[Any, ...]:
    outputs = []
    for c in cases:
        inputs = {key: given[f"{c.name}_{key}"] for key in c.inputs}
        for key, value in c.inputs.items():
            if value.dtype == torch.bool:
                inputs[key] = mb.cast(x=inputs[key], dtype="bool")
        try:
            built = c.build(f, **inputs)
        except Exception as error:
            raise AssertionError(f"case {c.name} cannot be built: {error}") from error
        for k, value in enumerate(built if isinstance(built, tuple | list) else (built,)):
            # Packages let only floats and int32 out.
            plain = value.dtype in (types.fp16, types.fp32, types.int32)
            named = f"{c.name}_{k}"
            if plain:
                outputs.append(mb.identity(x=value, name=named))
            else:
                outputs.append(mb.cast(x=value, dtype="int32", name=named))
    return tuple(outputs)


def _carried(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """An input as a package takes it: booleans and integers as int32, floats as fp16 or fp32."""
    if not value.is_floating_point():
        return value.to(torch.int32)
    return value.to(torch.float16 if dtype == "fp16" else torch.float32)
