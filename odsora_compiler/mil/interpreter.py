"""Running a function of a saved package with torch, on any machine.

`ops` says what each operation computes, `preparation` how values get to it. Here is the outside: a
function is prepared once, its inputs are checked, and it is run as often as wanted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from odsora_compiler.errors import RunError, nearest
from odsora_compiler.mil.constants import Constant
from odsora_compiler.mil.package import Package, TensorType
from odsora_compiler.mil.preparation import Compute, Frame, OnValue, Preparation, fits


class Interpreter:
    """One function of a package, ready to run.

    `compute="storage"` holds 16-bit floats in 16 bits, rounded after every operation as Core ML
    stores them; what an operation adds up inside itself it adds up in fp32. `compute="fp32"` never
    rounds: it computes the same function in fp32, from the weights as they are stored.

    Weights are read, and converted to fp32 where they are multiplied in fp32, when first used, and
    kept until `release`; interpreters of one Package share them. `loading` does so beforehand.

    Raises UnsupportedOpError, naming every operation that is missing, and PackageError where the
    package is damaged.
    """

    def __init__(
        self, package: Package, function: str | None = None, compute: Compute = "storage"
    ) -> None:
        if compute not in ("storage", "fp32"):
            raise ValueError(f"compute must be 'storage' or 'fp32', not {compute!r}")
        self.package = package
        self.function = package.function(function)
        self.inputs: tuple[TensorType, ...] = self.function.inputs
        self.outputs: tuple[TensorType, ...] = self.function.outputs
        self._prepared = Preparation(package, self.function.name, compute)

    def run(
        self, inputs: Mapping[str, torch.Tensor], on_value: OnValue | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs, by name.

        Inputs are checked for name, shape and kind (float, integer, boolean) and converted to the
        declared type. `on_value(name, op_type, tensor)` sees the output of every operation, in the
        order of computation. With compute="fp32" outputs declared as 16-bit floats come as fp32.

        Raises RunError for wrong inputs and where an operation fails.
        """
        known = [value.name for value in self.inputs]
        for name in inputs:
            if name not in known:
                raise RunError(f"{self._where} has no input {name!r}", nearest(name, known))
        frame = Frame([None] * self._prepared.size, on_value)
        for slot, value in enumerate(self.inputs):
            frame.values[slot] = self._accepted(value, inputs)
        with torch.no_grad():
            results = self._prepared.steps.run(frame)
        return {
            value.name: self._own(result)
            for value, result in zip(self.outputs, results, strict=True)
        }

    @property
    def requests(self) -> list[tuple[Constant, torch.dtype]]:
        """What `run` reads, and in which type; may have repetitions."""
        return self._prepared.requests

    def release(self) -> None:
        """Let go of the weights that were read or converted; the next run reads them again."""
        for constant in self._prepared.constants:
            constant.release()

    def _own(self, result: torch.Tensor) -> torch.Tensor:
        """An output that stays as it is whatever becomes of the constants."""
        result = result.contiguous()
        storage = result.untyped_storage().data_ptr()
        shared = any(constant.holds(storage) for constant in self._prepared.constants)
        return result.clone() if shared else result

    @property
    def _where(self) -> str:
        return f"function {self.function.name} of package {self.package.path}"

    def _accepted(self, value: TensorType, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if value.name not in inputs:
            names = ", ".join(value.name for value in self.inputs)
            raise RunError(f"{self._where} lacks its input {value.name!r}", f"It takes {names}.")
        tensor, dtype = inputs[value.name], self._prepared.held_dtype(value)
        expected = f"Expected {value.dtype} of shape {list(value.shape)}."
        if not fits(tensor, value):
            raise RunError(
                f"input {value.name!r} of {self._where} has shape {list(tensor.shape)}", expected
            )
        if _kind(tensor.dtype) != _kind(dtype):
            raise RunError(f"input {value.name!r} of {self._where} is {tensor.dtype}", expected)
        return tensor.detach().to(dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    return "float" if dtype.is_floating_point else "integer"
