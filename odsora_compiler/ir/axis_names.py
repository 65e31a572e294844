"""The notation for axis names: one entry a dimension, `_` for none, parentheses for a product.

"b c t h w"      five dimensions       "b (t h w) c"    the middle one holds t, h and w, w innermost
"""

from __future__ import annotations

import re

from odsora_compiler.errors import UsageError

AxisNames = tuple[tuple[str, ...], ...]


def parse_axes(text: str, shape: tuple[int, ...], what: str) -> AxisNames:
    """Names per dimension; an anonymous one is `()`.

    `what` names the tensor in errors. Raises `UsageError` when the text is malformed, has another
    number of dimensions than `shape`, or names an axis twice.
    """
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", text)
    names: list[tuple[str, ...]] = []
    for token in tokens:
        parts = token[1:-1].split() if token.startswith("(") and len(token) > 1 else [token]
        if not parts or any(not (part == "_" or part.isidentifier()) for part in parts):
            raise UsageError(
                f"axes of '{what}': cannot read '{text}' at '{token}'",
                'Write names separated by spaces, such as "b c t h w" or "b (t h w) c".',
            )
        if len(parts) > 1 and "_" in parts:
            raise UsageError(
                f"axes of '{what}': '{token}' has an unnamed part, so its sizes are not known",
                "Name every part of a product, or write _ for the whole dimension.",
            )
        names.append(() if parts == ["_"] else tuple(parts))
    flat = [name for parts in names for name in parts]
    if len(names) != len(shape):
        raise UsageError(
            f"axes of '{what}': '{text}' names {len(names)} dimensions, "
            f"the tensor has {len(shape)} {list(shape)}"
        )
    repeated = sorted({name for name in flat if flat.count(name) > 1})
    if repeated:
        raise UsageError(f"axes of '{what}': '{text}' names {', '.join(repeated)} twice")
    return tuple(names)
