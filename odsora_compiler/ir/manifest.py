"""manifest.json of a bundle: what lowering writes and running reads.

    schema       version of this format; a reader refuses others
    name, pipeline, precision, target, versions
    components   name → functions (inputs, outputs, chunks in order of execution) and packages
                 (file, functions, bytes, checksums of every file), compute units for a device
    host         the host program: what to compute between calls (see ir.host_program)
    text_to_video  which inputs and outputs of the host are prompt, noise and film, or null
    plans        component → budget, cost and chunks with reasons, as the partitioner left them

Beside it lie the packages; examples.safetensors: `in.NAME` an example of every host input and,
where PyTorch computed them, `out.NAME` the outputs it gave; host.safetensors: constants of the host
program; and tokenizer.json where the bundle takes prompts.

Shapes are lists, dtypes words such as `"float16"`. Everything is plain JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from odsora_compiler.errors import PackageError, RunError, UsageError, nearest
from odsora_compiler.ir.component_names import is_component_name
from odsora_compiler.ir.function import TensorSpec, dtype_name
from odsora_compiler.ir.text_to_video import TextToVideo

SCHEMA_VERSION = 3
FILE_NAME = "manifest.json"
EXAMPLES_NAME = "examples.safetensors"
CONSTANTS_NAME = "host.safetensors"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Feature:
    """A named tensor at the edge of a function or chunk. `axes` as in `ModelSpec`, or None."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: str | None = None

    @classmethod
    def of(cls, spec: TensorSpec) -> Feature:
        """That of a function's input or output."""
        return cls(spec.name, dtype_name(spec.dtype), spec.shape, spec.axes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of that name."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise PackageError(f"'{self.name}' has an unknown type '{self.dtype}'")
        return found

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        named = f' "{self.axes}"' if self.axes else ""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{named}"


@dataclass(frozen=True)
class ChunkCall:
    """One step of a function: a function of a package, with the values it takes and gives.

    `flops`: of one run. `activation_bytes`: most bytes of its inputs, its outputs and what it
    computes between them that are in memory at once.
    """

    package: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    flops: int
    activation_bytes: int


@dataclass(frozen=True)
class FunctionEntry:
    """A function of a component: chunks in order; `results` maps output name → value name."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    chunks: tuple[ChunkCall, ...]
    results: Mapping[str, str]


@dataclass(frozen=True)
class PackageEntry:
    """One .mlpackage. `files`: path inside it → (bytes, SHA-256). `conversion`: how it was made.

    `structure` is equal for packages that differ only in their weights. `name` is the file's stem.
    """

    path: str
    functions: tuple[str, ...]
    weight_bytes: int
    structure: str
    conversion: str
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class ComponentEntry:
    """One network of the bundle."""

    functions: Mapping[str, FunctionEntry]
    packages: Mapping[str, PackageEntry]
    compute_units: str = "cpu_and_gpu"

    def function(self, name: str) -> FunctionEntry:
        """The entry of that name; raises `RunError` with the nearest names."""
        if name not in self.functions:
            raise RunError(f"the bundle has no function '{name}'", nearest(name, self.functions))
        return self.functions[name]

    def called(self, named: str, wanted: str | None) -> str:
        """The function to call where the host names one and `wanted`, if any, goes before it."""
        return wanted if wanted is not None and wanted in self.functions else named


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json."""

    name: str
    pipeline: str
    precision: str
    target: str
    versions: Mapping[str, str]
    components: Mapping[str, ComponentEntry]
    host: Mapping[str, Any]
    plans: Mapping[str, Any] = field(default_factory=dict)
    # Without the text of its tokenizer, which is a file of its own.
    text_to_video: TextToVideo | None = None

    def check_function(self, wanted: str | None) -> None:
        """Raise `UsageError` with the nearest names where no component has the function."""
        known = {name for component in self.components.values() for name in component.functions}
        if wanted is not None and wanted not in known:
            raise UsageError(f"the bundle has no function '{wanted}'", nearest(wanted, known))

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        data = {"schema": SCHEMA_VERSION, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json from `folder`; raises `PackageError` when it cannot be used.

        Raises `UsageError` where there is no folder.
        """
        path = folder / FILE_NAME
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: "
                + ("not a bundle but a file" if folder.exists() else "no such bundle"),
                "A bundle is a folder NAME.odsora that odsora-compile wrote.",
            )
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise PackageError(
                f"{folder}: not a bundle: {FILE_NAME} cannot be read ({error.strerror})",
                "A bundle is a folder NAME.odsora that odsora-compile wrote.",
            ) from error
        except ValueError as error:
            raise PackageError(f"{path}: not valid JSON ({error})") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA_VERSION:
            raise PackageError(
                f"{path}: schema version {schema}, this release reads {SCHEMA_VERSION}",
                "Update odsora-compiler, or compile the bundle again with this release.",
            )
        try:
            manifest = _read(data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PackageError(f"{path}: damaged manifest ({error!r})") from error
        for name in manifest.components:
            if not is_component_name(name):
                raise PackageError(
                    f"{path}: a component cannot be called {name!r}",
                    "Copy the bundle again or recompile it.",
                )
        return manifest


def _read(data: Mapping[str, Any]) -> Manifest:
    return Manifest(
        data["name"],
        data["pipeline"],
        data["precision"],
        data["target"],
        data["versions"],
        {name: _component(entry) for name, entry in data["components"].items()},
        data["host"],
        data["plans"],
        None if data["text_to_video"] is None else TextToVideo(**data["text_to_video"]),
    )


def _component(data: Mapping[str, Any]) -> ComponentEntry:
    return ComponentEntry(
        {name: _function(entry) for name, entry in data["functions"].items()},
        {name: _package(entry) for name, entry in data["packages"].items()},
        data["compute_units"],
    )


def _function(data: Mapping[str, Any]) -> FunctionEntry:
    return FunctionEntry(
        _features(data["inputs"]),
        _features(data["outputs"]),
        tuple(
            ChunkCall(
                item["package"],
                _features(item["inputs"]),
                _features(item["outputs"]),
                int(item["flops"]),
                int(item["activation_bytes"]),
            )
            for item in data["chunks"]
        ),
        dict(data["results"]),
    )


def _package(data: Mapping[str, Any]) -> PackageEntry:
    files = {name: (int(size), str(digest)) for name, (size, digest) in data["files"].items()}
    return PackageEntry(
        data["path"],
        tuple(data["functions"]),
        data["weight_bytes"],
        data["structure"],
        data["conversion"],
        files,
    )


def _features(data: list[Mapping[str, Any]]) -> tuple[Feature, ...]:
    return tuple(
        Feature(item["name"], item["dtype"], tuple(item["shape"]), item.get("axes"))
        for item in data
    )
