"""An opened bundle: its manifest and the packages it names, checked before they are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from odsora_compiler.errors import PackageError
from odsora_compiler.ir.manifest import (
    CONSTANTS_NAME,
    EXAMPLES_NAME,
    TOKENIZER_NAME,
    ComponentEntry,
    Manifest,
    PackageEntry,
)
from odsora_compiler.ir.text_to_video import TextToVideo
from odsora_compiler.ir.weights import FileWeights


class Bundle:
    """A folder `NAME.odsora` that `odsora-compile` wrote. Loading one runs no code of it.

    Raises `UsageError` when there is no folder, `PackageError` when the manifest cannot be used, a
    package is missing, or a file has another size than the manifest says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        for name, component in self.manifest.components.items():
            self._check_component(name, component)

    def component(self, name: str) -> ComponentEntry:
        """The entry of a component."""
        if name not in self.manifest.components:
            raise PackageError(f"{self.path}: the manifest has no component '{name}'")
        return self.manifest.components[name]

    def package_path(self, component: str, package: str) -> Path:
        """Where a package lies."""
        return self.path / self.component(component).packages[package].path

    def examples(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Example inputs, and the outputs PyTorch gave on them where it was asked (else empty)."""
        files = FileWeights(self.path / EXAMPLES_NAME)
        found: dict[str, dict[str, torch.Tensor]] = {"in": {}, "out": {}}
        for name in files.names():
            side, _, tensor = name.partition(".")
            found[side][tensor] = files.load(name)
        return found["in"], found["out"]

    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors that the host program names."""
        files = FileWeights(self.path / CONSTANTS_NAME)
        return {name: files.load(name) for name in files.names()}

    def text_to_video(self) -> TextToVideo | None:
        """How the bundle makes a film of a prompt, with its tokenizer; None when it does not."""
        roles = self.manifest.text_to_video
        if roles is None:
            return None
        try:
            text = (self.path / TOKENIZER_NAME).read_text(encoding="utf-8")
            return replace(roles, tokenizer=text)
        except (OSError, UnicodeDecodeError) as error:
            raise PackageError(
                f"{self.path}: {TOKENIZER_NAME} cannot be read ({error})",
                "Copy the bundle again or recompile it.",
            ) from error

    def checksums(self) -> dict[Path, str]:
        """The SHA-256 of every file of every package, as the manifest has it."""
        return {
            self.path / package.path / name: digest
            for component in self.manifest.components.values()
            for package in component.packages.values()
            for name, (_, digest) in package.files.items()
        }

    def _check_component(self, name: str, component: ComponentEntry) -> None:
        for function in component.functions.values():
            for call in function.chunks:
                if call.package not in component.packages:
                    raise PackageError(
                        f"{self.path}: component '{name}' needs package '{call.package}', "
                        "which the manifest does not list"
                    )
        for package in component.packages.values():
            self._check_files(package)

    def _check_files(self, package: PackageEntry) -> None:
        folder = self.path / package.path
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise PackageError(f"{self.path}: the manifest names a file outside: {package.path}")
        for name, (size, _) in package.files.items():
            file = folder / name
            if not file.is_file():
                raise PackageError(
                    f"{self.path}: chunk {package.path} is incomplete: {name} is missing",
                    "Copy the bundle again or recompile it.",
                )
            if file.stat().st_size != size:
                raise PackageError(
                    f"{file}: {file.stat().st_size} bytes, the manifest says {size}",
                    "The file is truncated or was changed: copy the bundle again or recompile it.",
                )
