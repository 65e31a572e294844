"""Which file holds the weights of which component of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from odsora_compiler.errors import WeightsError, nearest
from odsora_compiler.ir.weights import PICKLED, refuse_pickled


def find_checkpoints(
    folder: Path, components: Mapping[str, str], optional: Iterable[str]
) -> dict[str, Path]:
    """Component → its file or folder of shards in `folder`.

    `components`: component → name of its checkpoint, which is `NAME.safetensors` or the folder
    `NAME/`. `optional`: components that have weights of their own. Raises `WeightsError` where a
    checkpoint is missing, there twice, pickled, or belongs to no component, or there is none.
    """
    if not folder.is_dir():
        refuse_pickled(folder)
        raise WeightsError(
            f"{folder} is one file, and the pipeline has several components",
            _expected(components),
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not _holds_weights(path):
            continue
        name = path.name if path.is_dir() else path.stem
        if name not in components.values():
            raise WeightsError(
                f"{path}: no component has weights called '{name}'",
                nearest(name, set(components.values())),
            )
        if name in found:
            raise WeightsError(
                f"{folder}: both {found[name].name} and {path.name} are there", "Keep one of them."
            )
        found[name] = path
    having = set(optional)
    for component, name in components.items():
        if name in found:
            continue
        _refuse_pickled_in(folder, f"{name}.*")
        if component not in having:
            _refuse_pickled_in(folder, "*")
            raise WeightsError(
                f"{folder}: the weights of component '{component}' are missing",
                f"Looked for {name}.safetensors and the folder {name}/.",
            )
    if not found:
        _refuse_pickled_in(folder, "*")
        raise WeightsError(
            f"{folder}: no weights of any component are there", _expected(components)
        )
    return {component: found[name] for component, name in components.items() if name in found}


def _expected(components: Mapping[str, str]) -> str:
    files = ", ".join(f"{name}.safetensors" for name in dict.fromkeys(components.values()))
    return f"Give a folder with {files}; each may also be a folder of shards."


def _refuse_pickled_in(folder: Path, pattern: str) -> None:
    for path in sorted(folder.glob(pattern)):
        refuse_pickled(path)


def _holds_weights(path: Path) -> bool:
    if path.is_dir():
        return any(file.suffix in (".safetensors", *PICKLED) for file in path.iterdir())
    return path.suffix == ".safetensors"
