"""What a component may be called: its name becomes part of the names of files and folders."""

from __future__ import annotations

import re

NAME_HINT = (
    "No /, \\, : or control characters, and no dot at the start or the end; the name of a bare "
    "ModelSpec is that of the model file."
)

# What would name another folder, on any system, or a hidden file.
_NAME = re.compile(r"[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*")


def is_component_name(name: object) -> bool:
    """Whether `name` is a text that can safely be part of a file's name.

    True of the stem of an ordinary file, such as `my model (1)` or `ü`.
    """
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.endswith(".")
