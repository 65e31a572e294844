"""Turning a function of a package into a list of steps that can be run again and again.

Every name becomes a slot of a frame or a constant, every argument a small function that fetches it,
and every slot is known to be free after the step that reads it last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from odsora_compiler.errors import PackageError, RunError, UnsupportedOpError
from odsora_compiler.mil.constants import Compressed, Constant, Inline, Weight
from odsora_compiler.mil.dtypes import is_half
from odsora_compiler.mil.ops.definition import Kind, OpDefinition
from odsora_compiler.mil.ops.table import OPS
from odsora_compiler.mil.package import BlobReference, Block, Operation, Package, TensorType, Value

Compute: TypeAlias = Literal["storage", "fp32"]
# Called with the name of a value, the type of the operation that made it, and the value.
OnValue: TypeAlias = Callable[[str, str, torch.Tensor], None]


_DAMAGED = "The package is damaged; compile it again."


@dataclass(slots=True)
class Frame:
    """What one run holds: the values by slot."""

    values: list[Any]
    on_value: OnValue | None = None


# Fetches an argument from a frame.
Read: TypeAlias = Callable[[Frame], Any]


@dataclass(slots=True)
class Step:
    """One operation; `last_uses` are the slots that are free after it."""

    operation: Operation
    compute: Callable[[Frame], Any]
    outputs: list[tuple[int, TensorType, torch.dtype]]
    last_uses: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Steps:
    """A prepared block, and how to read its results after running it."""

    where: str
    steps: list[Step]
    results: list[Read]

    def run(self, frame: Frame) -> list[torch.Tensor]:
        """Run in `frame`. Raises RunError, naming the operation that failed."""
        for step in self.steps:
            try:
                self._store(step, step.compute(frame), frame.values)
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
                name = _name(step.operation)
                raise RunError(
                    f"operation {step.operation.type} ({name}) of {self.where} failed: {error}"
                ) from error
            if frame.on_value is not None:
                for slot, declared, _ in step.outputs:
                    frame.on_value(declared.name, step.operation.type, frame.values[slot])
            for slot in step.last_uses:
                frame.values[slot] = None
        return [read(frame) for read in self.results]

    @staticmethod
    def _store(step: Step, result: Any, values: list[Any]) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        for (slot, declared, dtype), tensor in zip(step.outputs, results, strict=True):
            values[slot] = tensor if tensor.dtype == dtype else tensor.to(dtype)
            if not fits(tensor, declared):
                raise ValueError(
                    f"its output has shape {list(tensor.shape)}, "
                    f"but the package declares {list(declared.shape)}"
                )


class Preparation:
    """Resolves the operations of one function.

    `steps` run in a frame of `size` slots, of which the first are the function's inputs;
    `constants` are all that it has, `requests` those that running the steps reads, each with the
    type it is read in.
    """

    def __init__(self, package: Package, name: str | None, compute: Compute) -> None:
        function = package.function(name)
        self._package = package
        self._compute = compute
        self._where = f"function {function.name} of package {package.path}"
        self._slots: dict[str, int] = {}
        self._named: dict[str, Constant] = {}
        self.constants: list[Constant] = []
        self.requests: list[tuple[Constant, torch.dtype]] = []
        self._refuse_missing(function.block)
        for value in function.inputs:
            self._slots[value.name] = len(self._slots)
        try:
            self.steps = self._prepare(function.block, list(self._slots))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise PackageError(f"{self._where} makes no sense: {error!r}", _DAMAGED) from error
        self.size = len(self._slots)

    def held_dtype(self, value: TensorType) -> torch.dtype:
        """The torch type a value is held in."""
        try:
            dtype = value.torch_dtype
        except KeyError:
            raise UnsupportedOpError(
                f"value {value.name} of {self._where} has type {value.dtype!r}",
                "Only tensors of numbers and booleans can be interpreted.",
            ) from None
        return torch.float32 if self._compute == "fp32" and is_half(dtype) else dtype

    def _prepare(self, block: Block, inputs: list[str]) -> Steps:
        steps = []
        for operation in block.operations:
            if operation.type == "const":
                self._named[operation.outputs[0].name] = self._constant(operation.attributes["val"])
            elif operation.type.startswith("constexpr_"):
                self._compressed(operation)
            else:
                steps.append(self._step(operation))
        results = [self._tensor(name, wide=False) for name in block.outputs]
        self._free_early(steps, {*inputs, *_defined(steps)} - set(block.outputs))
        return Steps(self._where, steps, results)

    def _step(self, operation: Operation) -> Step:
        compute = self._cond(operation) if operation.type == "cond" else self._call(operation)
        outputs = []
        for value in operation.outputs:
            slot = self._slots.setdefault(value.name, len(self._slots))
            outputs.append((slot, value, self.held_dtype(value)))
        return Step(operation, compute, outputs)

    def _cond(self, operation: Operation) -> Callable[[Frame], list[torch.Tensor]]:
        (name,) = operation.inputs["pred"]
        predicate = self._tensor(name, wide=False)
        then, otherwise = (self._prepare(block, []) for block in operation.blocks)
        return lambda frame: (then if predicate(frame) else otherwise).run(frame)

    def _call(self, operation: Operation) -> Callable[[Frame], Any]:
        definition = OPS[operation.type]
        known: dict[str, Any] = {}
        reads: list[tuple[str, Read]] = []
        for name, kind, arguments in self._arguments(operation, definition):
            if kind is Kind.PLAIN and (constant := self._constant_of(arguments[0])):
                known[name] = constant.plain()
            elif kind is Kind.PLAIN:
                reads.append((name, _plain(self._tensor(arguments[0], wide=False))))
            elif kind is Kind.TENSORS:
                parts = [self._tensor(argument, definition.wide) for argument in arguments]
                reads.append((name, partial(_together, parts)))
            else:
                reads.append((name, self._tensor(arguments[0], definition.wide)))
        function = partial(definition.function, **known) if known else definition.function
        return lambda frame: function(**{name: read(frame) for name, read in reads})

    def _compressed(self, operation: Operation) -> None:
        """Bind the outputs of a constexpr operation, which are spelled out when first used."""
        definition = OPS[operation.type]
        parts: dict[str, Constant] = {}
        for name, _, arguments in self._arguments(operation, definition):
            constant = self._constant_of(arguments[0])
            if constant is None:
                raise PackageError(
                    f"operation {operation.type} ({_name(operation)}) of {self._where} "
                    f"has an input that is not constant: {name}",
                    _DAMAGED,
                )
            parts[name] = constant
        for index, value in enumerate(operation.outputs):
            compressed = Compressed(
                (operation.type, index),
                parts,
                tuple(size or 0 for size in value.shape),
                value.torch_dtype,
                partial(_decompress, definition, index),
            )
            self._named[value.name] = compressed
            self.constants.append(compressed)

    def _arguments(
        self, operation: Operation, definition: OpDefinition
    ) -> Iterator[tuple[str, Kind, tuple[str | Value, ...]]]:
        given = {name: arguments for name, arguments in operation.inputs.items() if arguments}
        # Old packages give the parameters of constexpr operations as attributes.
        given.update((name, (value,)) for name, value in operation.attributes.items())
        for name in sorted(definition.required - given.keys()):
            raise PackageError(
                f"operation {operation.type} ({_name(operation)}) of {self._where} "
                f"lacks its input {name}",
                _DAMAGED,
            )
        for name, arguments in given.items():
            if name not in definition.parameters:
                raise UnsupportedOpError(
                    f"operation {operation.type} ({_name(operation)}) of {self._where} "
                    f"has an input the interpreter lacks: {name}"
                )
            yield name, definition.parameters[name], arguments

    def _constant_of(self, argument: str | Value) -> Constant | None:
        return self._named.get(argument) if isinstance(argument, str) else self._constant(argument)

    def _constant(self, value: Value) -> Constant:
        if isinstance(value, BlobReference):
            constant: Constant = Weight(self._package, value)
        else:
            constant = Inline(value)
        self.constants.append(constant)
        return constant

    def _tensor(self, argument: str | Value, wide: bool) -> Read:
        constant = self._constant_of(argument)
        if constant is not None:
            dtype = constant.dtype
            if dtype is None:
                raise TypeError(f"{argument} is no tensor")
            if is_half(dtype) and (wide or self._compute == "fp32"):
                dtype = torch.float32
            self.requests.append((constant, dtype))
            return lambda _: constant.tensor(dtype)
        assert isinstance(argument, str)
        if argument not in self._slots:
            raise PackageError(
                f"{self._where} uses a value that nothing computes before: {argument}",
                _DAMAGED,
            )
        slot = self._slots[argument]
        if wide and self._compute == "storage":
            return lambda frame: _widened(frame.values[slot])
        return lambda frame: frame.values[slot]

    def _free_early(self, steps: list[Step], own: set[str]) -> None:
        """Note at every step which of a block's own values nothing reads after it."""
        last: dict[str, Step] = {}
        for step in steps:
            for name in (*_uses(step.operation), *(value.name for value in step.operation.outputs)):
                if name in own:
                    last[name] = step
        for name, step in last.items():
            step.last_uses.append(self._slots[name])

    def _refuse_missing(self, block: Block) -> None:
        missing: Counter[str] = Counter()
        first: dict[str, str] = {}
        for operation in _all_operations(block):
            if operation.type not in OPS and operation.type not in ("const", "cond"):
                missing[operation.type] += 1
                first.setdefault(operation.type, _name(operation))
        if missing:
            listed = ", ".join(
                f"{kind} ({first[kind]}{f' and {count - 1} more' if count > 1 else ''})"
                for kind, count in missing.items()
            )
            raise UnsupportedOpError(
                f"{self._where} has operations the interpreter lacks: {listed}",
                "Rewrite the model without them, or add them to the tables in mil/ops.",
            )


def fits(tensor: torch.Tensor, declared: TensorType) -> bool:
    """Whether the tensor has the declared shape, of which None dimensions are open."""
    shape = tensor.shape
    if shape == declared.shape:
        return True
    return len(shape) == len(declared.shape) and all(
        want is None or size == want for size, want in zip(shape, declared.shape, strict=True)
    )


def _name(operation: Operation) -> str:
    return operation.outputs[0].name if operation.outputs else "without outputs"


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if is_half(tensor.dtype) else tensor


def _plain(read: Read) -> Read:
    return lambda frame: read(frame).tolist()


def _together(parts: list[Read], frame: Frame) -> tuple[torch.Tensor, ...]:
    return tuple(read(frame) for read in parts)


def _decompress(
    definition: OpDefinition, index: int, parts: Mapping[str, Constant]
) -> torch.Tensor:
    arguments = {
        name: part.plain() if definition.parameters[name] is Kind.PLAIN else part.peek()
        for name, part in parts.items()
    }
    result = definition.function(**arguments)
    return result[index] if isinstance(result, tuple) else result


def _defined(steps: list[Step]) -> Iterator[str]:
    return (value.name for step in steps for value in step.operation.outputs)


def _uses(operation: Operation) -> Iterator[str]:
    """Names an operation reads, those read inside of its blocks included."""
    for arguments in operation.inputs.values():
        yield from (argument for argument in arguments if isinstance(argument, str))
    for block in operation.blocks:
        yield from block.outputs
        for nested in block.operations:
            yield from _uses(nested)


def _all_operations(block: Block) -> Iterator[Operation]:
    for operation in block.operations:
        yield operation
        for nested in operation.blocks:
            yield from _all_operations(nested)
