"""odsora-compiler: PyTorch video-diffusion models to verified Core ML chunks, by passes.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odsora_compiler.frontend.capture import capture as capture
    from odsora_compiler.frontend.spec import ModelSpec as ModelSpec
    from odsora_compiler.ir.program import Program as Program

_HOMES = {
    "ModelSpec": "odsora_compiler.frontend.spec",
    "Program": "odsora_compiler.ir.program",
    "capture": "odsora_compiler.frontend.capture",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'odsora_compiler' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
