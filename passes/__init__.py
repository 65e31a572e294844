"""The built-in passes, registered through the same hook as anyone's.

Installed as the import package `odsora_passes`; one file a pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from odsora_compiler.plugins import hookimpl

if TYPE_CHECKING:
    from odsora_compiler.pipeline.base import Pass


@hookimpl
def odsora_passes() -> Iterable[type[Pass]]:
    """`tdtm`, `lpl` and `cidl`."""
    from .cidl import CIDL
    from .lpl import LPL
    from .tdtm import TDTM

    return [TDTM, LPL, CIDL]
