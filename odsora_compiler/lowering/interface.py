"""What a package's function looks like from outside: names, dtypes and shapes of its features.

Inside coremltools every value has a made-up name. `Names` turns them into real ones afterwards, so
that one conversion can serve for several functions of equal structure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from odsora_compiler.ir.function import Function, TensorSpec

Precision = Literal["fp16", "fp32"]

# Generated protobuf classes carry no types.
Message = Any


@dataclass(frozen=True)
class Feature:
    """An input or output of a package's function: Core ML has float16, float32 and int32."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a package's function, in the order of the function's signature."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


def interface_of(
    function: Function, precision: Precision, half_io: Collection[str] = ()
) -> Interface:
    """The features `function` is given: integers and booleans as int32, numbers as float32.

    In a "fp16" package numbers named in `half_io` are float16.
    """

    def feature(spec: TensorSpec) -> Feature:
        dtype = torch.int32
        if spec.dtype.is_floating_point:
            half = precision == "fp16" and spec.name in half_io
            dtype = torch.float16 if half else torch.float32
        # Core ML has no features of rank 0.
        return Feature(spec.name, dtype, spec.shape or (1,))

    return Interface(tuple(map(feature, function.inputs)), tuple(map(feature, function.outputs)))


class Names:
    """The real names of a function's values: inputs, outputs and weights.

    In a conversion they are called by kind and number; other values are named by number and
    operator (`op12_linear`).
    """

    def __init__(self, function: Function) -> None:
        self._weights = function.weight_names()
        self._names = {
            "in": [spec.name for spec in function.inputs],
            "out": [spec.name for spec in function.outputs],
            "w": _distinct(re.sub(r"\W", "_", name) for name in self._weights),
        }

    def weights(self) -> dict[str, str]:
        """The name of a constant in the package → the weight it is."""
        return dict(zip(self._names["w"], self._weights, strict=True))

    @staticmethod
    def made_up(kind: Literal["in", "out", "w"], index: int) -> str:
        """The name inside coremltools of the input, output or weight of that number."""
        return f"odsora_{kind}{index}_x"

    @staticmethod
    def operators(function: Function) -> dict[str, str]:
        """The stem of an operation's name → the node of `function` that it comes from."""
        return {
            operator_name(index, node): node.name for index, node in enumerate(function.operators())
        }

    def restore(self, specification: Message) -> None:
        """Write the real names into a specification."""
        (program,) = specification.mlProgram.functions.values()
        for feature in (*specification.description.input, *specification.description.output):
            feature.name = self._real(feature.name)
        for value in program.inputs:
            value.name = self._real(value.name)
        for block in program.block_specializations.values():
            self._restore_block(block)

    def _restore_block(self, block: Message) -> None:
        block.outputs[:] = [self._real(name) for name in block.outputs]
        for operation in block.operations:
            for value in operation.outputs:
                value.name = self._real(value.name)
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        binding.name = self._real(binding.name)
            own = operation.attributes["name"].immediateValue.tensor.strings.values
            own[:] = [self._real(name) for name in own]
            for nested in operation.blocks:
                for value in nested.inputs:
                    value.name = self._real(value.name)
                self._restore_block(nested)

    def _real(self, name: str) -> str:
        if "odsora_" not in name:
            return name
        return _MADE_UP.sub(lambda found: self._names[found[1]][int(found[2])], name)


def operator_number(name: str) -> int | None:
    """Which operator of the function an operation's name inside coremltools speaks of."""
    found = _OPERATOR.search(name)
    return int(found[1]) if found else None


def operator_name(index: int, node: fx.Node) -> str:
    """The name of that operator, the `index`th of its function, inside coremltools."""
    target: Any = node.target
    return f"op{index}_{getattr(target, 'overloadpacket', target).__name__}"


# coremltools puts words before and after names, as in `_inversed_op3_div_cast_fp16`.
_OPERATOR = re.compile(r"(?:^|_)op(\d+)_")
_MADE_UP = re.compile(r"odsora_(in|out|w)(\d+)_x")


def _distinct(names: Iterable[str]) -> list[str]:
    taken: set[str] = set()
    result = []
    for name in names:
        while name in taken:
            name += "_"
        taken.add(name)
        result.append(name)
    return result
