"""All operations the interpreter knows, by their MIL names.

`const` and `cond` are missing here: they steer the interpreter and live in it.
"""

from __future__ import annotations

from odsora_compiler.mil.ops import (
    activation,
    compression,
    elementwise,
    indexing,
    linear,
    normalization,
    reduction,
    resizing,
    shape,
)
from odsora_compiler.mil.ops.definition import OpTable

OPS: OpTable = {
    **elementwise.OPS,
    **activation.OPS,
    **reduction.OPS,
    **linear.OPS,
    **normalization.OPS,
    **shape.OPS,
    **indexing.OPS,
    **resizing.OPS,
    **compression.OPS,
}
