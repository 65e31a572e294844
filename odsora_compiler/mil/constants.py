"""The constants of a function: read, or spelled out, when first used, and kept until released.

A constant can be asked for in a wider type than it is stored in; the converted copy is what stays
in memory, the stored one is left on disk. What `loading` puts into memory beforehand is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from odsora_compiler.mil.dtypes import TORCH_DTYPE
from odsora_compiler.mil.memory import converted
from odsora_compiler.mil.package import BlobReference, Literal, Package


class Constant:
    """A value that no input reaches.

    `dtype` is the type it is stored in; None: it is no tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        self.shape = shape
        self.dtype = dtype
        self._held: dict[torch.dtype | None, torch.Tensor] = {}

    @property
    def key(self) -> Hashable:
        """Constants of one package with equal keys have equal elements."""
        raise NotImplementedError

    def tensor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The value in `dtype`, kept; None is the type it is stored in."""
        dtype = dtype or self.dtype
        held = self._held.get(dtype)
        if held is None:
            self._held[dtype] = held = self._read(dtype)
        return held

    def peek(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The value in `dtype`; not kept where it has to be read first."""
        dtype = dtype or self.dtype
        held = self._held.get(dtype)
        return self._read(dtype) if held is None else held

    def plain(self) -> Any:
        """The value as Python numbers, booleans or strings; not kept."""
        return self.peek().tolist()

    def preset(self, tensor: torch.Tensor) -> None:
        """Take `tensor` for the value in its type instead of reading it."""
        self._held[tensor.dtype] = tensor

    def holds(self, storage: int) -> bool:
        """Whether the memory at the address `storage` is that of a value that is kept."""
        return any(held.untyped_storage().data_ptr() == storage for held in self._held.values())

    def release(self) -> None:
        """Let go of everything that was read or preset; the next use reads it again."""
        self._held.clear()

    def _read(self, dtype: torch.dtype | None) -> torch.Tensor:
        raise NotImplementedError


class Inline(Constant):
    """A constant written into the specification. It is part of the program, so never released."""

    def __init__(self, literal: Literal) -> None:
        super().__init__(literal.shape, TORCH_DTYPE.get(literal.dtype))
        self._literal = literal

    @property
    def key(self) -> Hashable:
        # By its text, -0.0 is not 0.0.
        return self._literal.dtype, self._literal.shape, repr(self._literal.data)

    def plain(self) -> Any:
        return self._literal.python()

    def release(self) -> None:
        pass

    def _read(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self._literal.tensor().to(dtype or self.dtype)


class Weight(Constant):
    """A constant in a weights file."""

    def __init__(self, package: Package, reference: BlobReference) -> None:
        super().__init__(reference.shape, TORCH_DTYPE[reference.dtype])
        package.check(reference)
        self.reference = reference
        self._package = package

    @property
    def key(self) -> Hashable:
        return self.reference.file, self.reference.offset

    def _read(self, dtype: torch.dtype | None) -> torch.Tensor:
        return self._package.tensor(self.reference, dtype or self.dtype)


class Compressed(Constant):
    """One output of a constexpr operation.

    `decompress` spells it out from `parts`; `method` says how it does so, for the key.
    """

    def __init__(
        self,
        method: Hashable,
        parts: Mapping[str, Constant],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        decompress: Callable[[Mapping[str, Constant]], torch.Tensor],
    ) -> None:
        super().__init__(shape, dtype)
        self.parts = parts
        self._method = method
        self._decompress = decompress

    @property
    def key(self) -> Hashable:
        return self._method, tuple((name, part.key) for name, part in sorted(self.parts.items()))

    def stored(self) -> list[Weight]:
        """The weights it is spelled out from, those of its parts included."""
        found: list[Weight] = []
        for part in self.parts.values():
            if isinstance(part, Weight):
                found.append(part)
            elif isinstance(part, Compressed):
                found += part.stored()
        return found

    def _read(self, dtype: torch.dtype | None) -> torch.Tensor:
        stored = self._decompress(self.parts).to(self.dtype)
        return stored if dtype in (None, self.dtype) else converted(stored, dtype)
