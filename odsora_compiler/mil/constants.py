"""The constants of a function: read, or spelled out, when first used, and kept until released.

A constant can be asked for in a wider type than it is stored in; the converted copy is what stays
in memory, the stored one is left on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from odsora_compiler.mil.dtypes import TORCH_DTYPE
from odsora_compiler.mil.memory import converted
from odsora_compiler.mil.package import BlobReference, Literal, Package


class Constant:
    """A value that no input reaches. `dtype` is the type it is stored in; None: it is no tensor."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._held: dict[torch.dtype | None, torch.Tensor] = {}

    def tensor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The value in `dtype`; None is the type it is stored in."""
        if dtype not in self._held:
            self._held[dtype] = self.read(dtype)
        return self._held[dtype]

    def plain(self) -> Any:
        """The value as Python numbers, booleans or strings."""
        return self.tensor().tolist()

    def release(self) -> None:
        """Let go of everything that was read; the next use reads it again."""
        self._held.clear()

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        """The value in `dtype`, not kept."""
        raise NotImplementedError


class Inline(Constant):
    """A constant written into the specification."""

    def __init__(self, literal: Literal) -> None:
        super().__init__(TORCH_DTYPE.get(literal.dtype))
        self._literal = literal

    def plain(self) -> Any:
        return self._literal.python()

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self._literal.tensor().to(dtype or self.dtype)


class Weight(Constant):
    """A constant in a weights file."""

    def __init__(self, package: Package, reference: BlobReference) -> None:
        super().__init__(TORCH_DTYPE[reference.dtype])
        package.check(reference)
        self._package = package
        self._reference = reference

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self._package.tensor(self._reference, dtype or self.dtype)


class Compressed(Constant):
    """One output of a constexpr operation."""

    def __init__(self, decompress: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._decompress = decompress

    def read(self, dtype: torch.dtype | None) -> torch.Tensor:
        stored = self._decompress().to(self.dtype)
        return stored if dtype in (None, self.dtype) else converted(stored, dtype)
