"""Weight stores: named tensors that are described at once and read only when asked for.

A graph names its weights (`get_attr` nodes); a store knows their shapes and dtypes and loads one
when it is used. Nothing here holds a file's tensors in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch

from odsora_compiler.errors import WeightsError, nearest
from odsora_compiler.ir.tensor_file import TensorPlace, map_tensor, read_header


@dataclass(frozen=True)
class WeightSpec:
    """Shape and dtype of a weight as the graph sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes in the dtype the graph sees (storage may differ)."""
        return self.elements * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> WeightSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class LookupTable:
    """A weight stored as indices into small tables: `value = table[group][indices]`.

    `indices`: uint8, the weight's shape, values below `2**bits`. `table`: `[groups, 2**bits]`, the
    groups split `axis` of the weight evenly (one group: the whole weight).
    """

    bits: int
    indices: torch.Tensor
    table: torch.Tensor
    axis: int = 0

    def decode(self) -> torch.Tensor:
        """The dense weight, in the table's dtype."""
        groups = self.table.shape[0]
        size = self.indices.shape[self.axis] // groups
        pieces = self.indices.split(size, self.axis)
        return torch.cat(
            [self.table[group][piece.long()] for group, piece in enumerate(pieces)], self.axis
        )


class WeightStore(Protocol):
    """Named weights. `load` may read a file; the rest never does."""

    def names(self) -> Iterable[str]:
        """All names, in a fixed order."""

    def spec(self, name: str) -> WeightSpec:
        """Shape and dtype; raises `WeightsError` on an unknown name."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor. The caller must not write to it."""

    def encoding(self, name: str) -> LookupTable | None:
        """How the weight is stored compressed, or None where it is dense."""


class TensorWeights:
    """Weights that are tensors in memory: a module's own, or constants that a pass made.

    One that was written to since the store was made is refused: programs share their weights, and
    nobody would notice that the numbers changed.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._writes = {name: _writes(tensor) for name, tensor in self._tensors.items()}

    def names(self) -> Iterable[str]:
        return self._tensors

    def spec(self, name: str) -> WeightSpec:
        return WeightSpec.of(self.load(name))

    def load(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise WeightsError(f"there is no weight '{name}'", nearest(name, self._tensors))
        if _writes(self._tensors[name]) != self._writes[name]:
            raise WeightsError(
                f"weight '{name}' was written to in place",
                "Put another store into the component: LayeredWeights(TensorWeights(changed), "
                "component.weights).",
            )
        return self._tensors[name]

    def encoding(self, name: str) -> LookupTable | None:
        return None


class LayeredWeights:
    """Several stores as one; a name is looked up in the first that has it."""

    def __init__(self, *layers: WeightStore) -> None:
        self._owner: dict[str, WeightStore] = {}
        for layer in layers:
            for name in layer.names():
                self._owner.setdefault(name, layer)

    def names(self) -> Iterable[str]:
        return self._owner

    def spec(self, name: str) -> WeightSpec:
        return self._find(name).spec(name)

    def load(self, name: str) -> torch.Tensor:
        return self._find(name).load(name)

    def encoding(self, name: str) -> LookupTable | None:
        return self._find(name).encoding(name)

    def _find(self, name: str) -> WeightStore:
        if name not in self._owner:
            raise WeightsError(f"there is no weight '{name}'", nearest(name, self._owner))
        return self._owner[name]


class EncodedWeights:
    """A store in which some weights are compressed.

    `tables` maps a name to its table. `load` returns what the compressed weight decodes to, so a
    graph evaluated on this store shows the loss.
    """

    def __init__(self, dense: WeightStore, tables: Mapping[str, LookupTable]) -> None:
        self._dense = dense
        self._tables = dict(tables)

    def names(self) -> Iterable[str]:
        return self._dense.names()

    def spec(self, name: str) -> WeightSpec:
        return self._dense.spec(name)

    def load(self, name: str) -> torch.Tensor:
        if name in self._tables:
            return self._tables[name].decode().to(self.spec(name).dtype)
        return self._dense.load(name)

    def encoding(self, name: str) -> LookupTable | None:
        return self._tables.get(name) or self._dense.encoding(name)


class FileWeights:
    """Weights in safetensors: one file, or a folder of shards with or without an index.

    `load` returns a tensor mapped on the file, so that its pages are read when they are used and go
    when the tensor goes. A file that changes after the store was made is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self._specs: dict[str, WeightSpec] = {}
        self._places: dict[str, TensorPlace] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for file in _shards(self.path):
            self._read_header(file)

    def names(self) -> Iterable[str]:
        return self._specs

    def spec(self, name: str) -> WeightSpec:
        if name not in self._specs:
            raise WeightsError(
                f"{self.path}: there is no weight '{name}'", nearest(name, self._specs)
            )
        return self._specs[name]

    def load(self, name: str) -> torch.Tensor:
        self.spec(name)
        file = self._files[name]
        try:
            if _stamp(file) != self._stamps[file]:
                raise WeightsError(
                    f"{file}: the file changed while it was in use",
                    "Compile again once the file is complete.",
                )
            return map_tensor(file, self._places[name])
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{file}: weight '{name}' cannot be read any more ({error})",
                "Leave the file in place while it is in use.",
            ) from error

    def encoding(self, name: str) -> LookupTable | None:
        return None

    def _read_header(self, file: Path) -> None:
        for name, place in read_header(file).items():
            if name in self._specs:
                raise WeightsError(
                    f"{file}: weight '{name}' is also in {self._files[name].name}",
                    "Remove one of the two, or name the one file to use.",
                )
            self._specs[name] = WeightSpec(place.shape, place.dtype)
            self._files[name] = file
            self._places[name] = place
        self._stamps[file] = _stamp(file)


class CastWeights:
    """A store seen with the shapes, dtypes and names a model declares.

    `specs` are the model's; `aliases` maps a name of the model to other names of the same tensor,
    of which the store needs to have one (tied parameters are stored once). `unused`: patterns of
    names (`"decoder.*"`) that the store may have beyond the model's. Raises `WeightsError` naming
    every missing, extra and misshaped weight, and every float stored as a whole number or the other
    way round.
    """

    def __init__(
        self,
        store: WeightStore,
        specs: Mapping[str, WeightSpec],
        aliases: Mapping[str, Sequence[str]] | None = None,
        origin: str = "the weights",
        unused: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._specs = dict(specs)
        have = set(store.names())
        self._unused = unused
        self._source = {
            name: next((n for n in (name, *(aliases or {}).get(name, ())) if n in have), name)
            for name in self._specs
        }
        self._check(have, origin)

    def names(self) -> Iterable[str]:
        return self._specs

    def spec(self, name: str) -> WeightSpec:
        if name not in self._specs:
            raise WeightsError(f"there is no weight '{name}'", nearest(name, self._specs))
        return self._specs[name]

    def load(self, name: str) -> torch.Tensor:
        return self._store.load(self._source[name]).to(self.spec(name).dtype)

    def encoding(self, name: str) -> LookupTable | None:
        return self._store.encoding(self._source[name])

    def _check(self, have: set[str], origin: str) -> None:
        missing = [name for name, source in self._source.items() if source not in have]
        extra = sorted(
            name
            for name in have - set(self._source.values()) - set(self._specs)
            if not any(fnmatchcase(name, pattern) for pattern in self._unused)
        )
        misshaped = [
            f"{name} {list(self._store.spec(source).shape)} instead of "
            f"{list(self._specs[name].shape)}"
            for name, source in self._source.items()
            if source in have and self._store.spec(source).shape != self._specs[name].shape
        ]
        mistyped = [
            f"{name} {stored.dtype} instead of {self._specs[name].dtype}"
            for name, source in self._source.items()
            if source in have
            and (stored := self._store.spec(source)).dtype.is_floating_point
            != self._specs[name].dtype.is_floating_point
        ]
        problems = [
            f"{len(found)} {what}: {', '.join(found[:5])}{', …' if len(found) > 5 else ''}"
            for what, found in (
                ("missing", missing),
                ("extra", extra),
                ("misshaped", misshaped),
                ("of another type", mistyped),
            )
            if found
        ]
        if problems:
            hint = "Check that the model options (--set) are those the weights were made with."
            if missing and extra:
                hint = nearest(missing[0], extra) + " " + hint
            raise WeightsError(f"{origin} does not fit the model: " + "; ".join(problems), hint)


def _writes(tensor: torch.Tensor) -> int:
    """How often the tensor was written to; not counted for tensors of `torch.inference_mode`."""
    return 0 if tensor.is_inference() else tensor._version


PICKLED = {".pt", ".pth", ".bin", ".ckpt"}


def refuse_pickled(path: Path) -> None:
    """Raise `WeightsError` that says how to convert a checkpoint whose loading would run code."""
    if path.suffix in PICKLED:
        raise WeightsError(
            f"{path}: loading it would run code stored in it",
            "Convert it once where you trust it: state = torch.load(path, weights_only=True) (or a "
            "part of that, such as ['state_dict']); safetensors.torch.save_file({k: v.contiguous()"
            ".clone() for k, v in state.items()}, 'weights.safetensors').",
        )


def _shards(path: Path) -> list[Path]:
    refuse_pickled(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(
            f"{path}: no such file or folder",
            "Weights are a .safetensors file or a folder of them.",
        )
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise WeightsError(
            f"{path}: several indexes: {', '.join(index.name for index in indexes)}",
            "Keep one, or name the one .safetensors file to use.",
        )
    if not indexes:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            for file in sorted(path.iterdir()):
                refuse_pickled(file)
            raise WeightsError(f"{path}: the folder holds no .safetensors file")
        return files
    try:
        named = set(json.loads(indexes[0].read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{indexes[0]}: not a safetensors index ({error})") from error
    if not named or not all(isinstance(name, str) for name in named):
        raise WeightsError(f"{indexes[0]}: not a safetensors index (it names no files)")
    files = [path / name for name in sorted(named)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(f"{path}: shards missing: {', '.join(absent)}")
    return files


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
