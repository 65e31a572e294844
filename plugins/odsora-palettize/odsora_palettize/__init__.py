"""A plugin of odsora-compiler that adds the pass `palettize`.

This file is all a plugin needs besides its passes: an implementation of the hook `odsora_passes`,
in the module that the entry point (setup.cfg, group `odsora.plugins`) names. The pass is imported
when it is asked for, so that listing plugins stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from odsora_compiler.plugins import hookimpl

if TYPE_CHECKING:
    from odsora_compiler.pipeline.base import Pass


@hookimpl
def odsora_passes() -> Iterable[type[Pass]]:
    """`palettize`."""
    from odsora_palettize.palettize import Palettize

    return [Palettize]
