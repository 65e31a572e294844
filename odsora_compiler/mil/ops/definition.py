"""How an operation is written down: a function over tensors and plain Python values.

A table names MIL operations and gives each a function whose parameters have the names of the
operation's inputs in MIL; defaults of parameters are MIL's defaults. A parameter is

- a tensor, when it has no annotation and no default other than None, or the annotation `Tensor`;
- a tuple of tensors, when annotated `Tensors` (MIL's variadic inputs);
- a Python value (a number, boolean, string, or list of them) otherwise.

The function returns a tensor, or a tuple of them for an operation with several outputs. It need not
care about the element type of what it returns: the interpreter converts to the declared type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch

# The default of a plain parameter that has none in MIL, for functions too short for annotations.
REQUIRED: Any = object()

Tensor: TypeAlias = torch.Tensor
Tensors: TypeAlias = tuple[torch.Tensor, ...]


class Kind(Enum):
    """How an input is handed to an operation's function."""

    TENSOR = "tensor"
    TENSORS = "tensors"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class OpDefinition:
    """One operation.

    `wide`: 16-bit floats reach the function as fp32 and are rounded once on the way out. Operations
    that accumulate or take several steps are wide; where torch itself rounds a 16-bit result once,
    as in elementwise arithmetic, narrow is equal and moves half the bytes.
    """

    function: Callable[..., Any]
    wide: bool
    parameters: dict[str, Kind]
    required: frozenset[str]


OpTable: TypeAlias = dict[str, OpDefinition]


def wide(**functions: Callable[..., Any]) -> OpTable:
    """A table of operations, by MIL name, that compute in fp32."""
    return {name: _define(function, True) for name, function in functions.items()}


def narrow(**functions: Callable[..., Any]) -> OpTable:
    """A table of operations, by MIL name, that compute in the type their tensors have."""
    return {name: _define(function, False) for name, function in functions.items()}


def _define(function: Callable[..., Any], is_wide: bool) -> OpDefinition:
    parameters = inspect.signature(function).parameters
    kinds = {name: _kind(parameter) for name, parameter in parameters.items()}
    absent = (inspect.Parameter.empty, REQUIRED)
    required = frozenset(name for name, p in parameters.items() if p.default in absent)
    return OpDefinition(function, is_wide, kinds, required)


def _kind(parameter: inspect.Parameter) -> Kind:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        plain = parameter.default is not inspect.Parameter.empty and parameter.default is not None
        return Kind.PLAIN if plain else Kind.TENSOR
    if annotation == "Tensors":
        return Kind.TENSORS
    return Kind.TENSOR if annotation in ("Tensor", "Tensor | None") else Kind.PLAIN
