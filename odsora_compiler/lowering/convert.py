"""One legalized function to a Core ML ML program: a specification and a weights file.

coremltools' torch front end, MIL passes and protobuf writer are called stage by stage, because what
lies around them in `ct.convert` (validation after each of 112 passes, a slow overflow check, copies
of the weights, a model object) takes most of its time; the result is the same to the byte.
"""

from __future__ import annotations

import errno
import gc
import shutil
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.export import ExportedProgram

from odsora_compiler.errors import LoweringError, OdsoraError
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import WeightStore
from odsora_compiler.lowering.exported import exported_program
from odsora_compiler.lowering.interface import (
    Interface,
    Message,
    Names,
    Precision,
    interface_of,
    operator_number,
)
from odsora_compiler.lowering.legalize import describe
from odsora_compiler.lowering.precision import exact_nodes
from odsora_compiler.lowering.quiet import quiet_coremltools

WEIGHTS_FILE = "weight.bin"


@dataclass(frozen=True)
class Conversion:
    """What coremltools made of a function: made-up names, one function "main"."""

    specification: Message
    weights: Path


def convert(
    function: Function,
    weights: WeightStore,
    folder: Path,
    precision: Precision,
    half_io: Collection[str] = (),
    exact_outputs: Collection[str] = (),
) -> Conversion:
    """Convert the legalized `function` for iOS 18; its weights go to `folder`/weight.bin.

    `half_io`: see `interface_of`. `exact_outputs`: outputs to be computed in single precision in a
    "fp16" package. Raises `LoweringError` naming the node that coremltools cannot convert.
    """
    interface = interface_of(function, precision, half_io)
    exact = _numbers(function, exact_nodes(function, exact_outputs))
    current: deque[Any] = deque(maxlen=1)
    with quiet_coremltools(current.append) as coremltools, _one_collection():
        _check_supported(function)
        try:
            # No variable here may hold a program: it would outlive the collection.
            return _write(
                _read(coremltools, exported_program(function, weights), interface, current),
                folder,
                precision,
                exact,
            )
        except OdsoraError:
            raise
        except Exception as error:
            if "writing data" in str(error):
                # coremltools does not say why it could not write; a full disk says it itself.
                full = shutil.disk_usage(folder).free < _NEARLY_FULL
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
            raise _failure(function, current, error) from error
        finally:
            coremltools.converters.mil.converter._reset_conversion_state()


def _numbers(function: Function, nodes: Collection[fx.Node]) -> set[int]:
    return {index for index, node in enumerate(function.operators()) if node in nodes}


# ------------------------------------------------------------------ coremltools, stage by stage


def _read(
    coremltools: Any, exported: ExportedProgram, interface: Interface, current: deque[Any]
) -> Any:
    """The MIL program as coremltools' front end makes it."""
    from coremltools.converters.mil.frontend.torch.load import load

    program = load(
        exported,
        inputs=[
            coremltools.TensorType(
                name=Names.made_up("in", index), shape=item.shape, dtype=_NUMPY[item.dtype]
            )
            for index, item in enumerate(interface.inputs)
        ],
        outputs=[
            coremltools.TensorType(name=Names.made_up("out", index), dtype=_NUMPY[item.dtype])
            for index, item in enumerate(interface.outputs)
        ],
        specification_version=coremltools.target.iOS18.value,
    )
    current.clear()
    for operation in program.functions["main"].operations:
        # The front end names some values, but not the operations, after the node they come from.
        if len(operation.outputs) == 1 and operator_number(operation.outputs[0].name) is not None:
            operation.name = operation.outputs[0].name
    return program


def _write(program: Any, folder: Path, precision: Precision, exact: set[int]) -> Conversion:
    """Run the MIL passes and write specification and weights."""
    import coremltools
    from coremltools.converters.mil.backend.mil.load import load
    from coremltools.converters.mil.mil.passes.pass_pipeline import PASS_REGISTRY, PassPipeline

    special = {"common::add_fp16_cast": _half_precision_pass(exact)}
    with _without_compression():
        for pipeline in ("frontend_pytorch", "default", "backend_mlprogram"):
            for name in PassPipeline.get_pipeline(pipeline).passes:
                if precision == "fp16" or name not in _HALF_PASSES:
                    special.get(name, PASS_REGISTRY[name])(program)
    program._check_early_error_out_for_invalid_program()
    folder.mkdir(parents=True, exist_ok=True)
    version = coremltools.target.iOS18.value
    specification = load(program, weights_dir=str(folder), specification_version=version)
    return Conversion(specification, folder / WEIGHTS_FILE)


@contextmanager
def _without_compression() -> Iterator[None]:
    """Within it, coremltools does not look for values that come from compressed weights.

    There are none yet (they are put in when a package is linked), and looking after every pass
    takes a fifth of the time.
    """
    from coremltools.converters.mil.mil.block import Block

    with mock.patch.object(Block, "_propagate_nonreplaceable_vars", lambda block: None):
        yield


_NEARLY_FULL = 1 << 20

_HALF_PASSES = {"common::add_fp16_cast", "common::add_int16_cast"}


def _half_precision_pass(exact: set[int]) -> Any:
    """coremltools' pass with a faster check for overflow, leaving operators in `exact` alone."""
    from coremltools.converters.mil.mil.passes.defs.quantization import add_fp16_cast

    def is_rounded(operation: Any) -> bool:
        return operator_number(operation.name) not in exact

    class HalfPrecision(add_fp16_cast):
        def __str__(self) -> str:
            return add_fp16_cast.__name__

        @staticmethod
        def fp16_overflow(op: Any) -> bool:
            if all(_fits_half(value) for value in _constants(op)):
                return False
            return bool(add_fp16_cast.fp16_overflow(op))

    return HalfPrecision(op_selector=is_rounded)


def _constants(operation: Any) -> Iterator[Any]:
    for inputs in operation.inputs.values():
        for var in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
            if (
                var.op is not None
                and var.op.op_type == "const"
                and var.is_tensor_or_scalar_of(dtype="fp32")
            ):
                yield var.op.val.val


def _fits_half(value: Any) -> bool:
    """Whether a number, or all of a numpy array, lies in half precision's range (no for NaN)."""
    tensor = torch.as_tensor(value)
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low >= -65504 and high <= 65504)


def _check_supported(function: Function) -> None:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    for node in function.operators():
        target: Any = node.target
        kind = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
        if _TORCH_OPS_REGISTRY.get_func(kind) is None:
            raise LoweringError(
                f"function '{function.name}': coremltools cannot convert {describe(node)}",
                "Write it with other operators, or add a legalization rule for it.",
            )


def _failure(function: Function, current: deque[Any], error: Exception) -> LoweringError:
    text = str(error).strip().splitlines() or [type(error).__name__]
    number = operator_number(current[-1].name) if current else None
    place = "a pass over the whole function"
    if number is not None:
        place = describe(list(function.operators())[number])
    return LoweringError(
        f"function '{function.name}': coremltools fails at {place}: {text[0]}",
        "Write this part of the model with other operators, or add a legalization rule for it.",
    )


@contextmanager
def _one_collection() -> Iterator[None]:
    """Collect garbage once at the end of the scope, and only what was made in it.

    A MIL program is a large cycle that holds all weights; the collector would look through it, and
    through all of torch, many times over while it grows.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if enabled:
            gc.enable()


class _NumpyTypes(dict[torch.dtype, Any]):
    def __missing__(self, dtype: torch.dtype) -> Any:
        return torch.empty(0, dtype=dtype).numpy().dtype.type


_NUMPY = _NumpyTypes()
