"""odsora-compiler: PyTorch video-diffusion models to verified Core ML chunks, by passes.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odsora_compiler.driver.compiler import lower as lower
    from odsora_compiler.frontend.capture import capture as capture
    from odsora_compiler.frontend.spec import ModelSpec as ModelSpec
    from odsora_compiler.frontend.spec import PipelineSpec as PipelineSpec
    from odsora_compiler.ir.program import Program as Program
    from odsora_compiler.ir.text_to_video import TextToVideo as TextToVideo
    from odsora_compiler.pipeline.manager import run_passes as run_passes
    from odsora_compiler.runtime.runner import load as load

_HOMES = {
    "ModelSpec": "odsora_compiler.frontend.spec",
    "PipelineSpec": "odsora_compiler.frontend.spec",
    "Program": "odsora_compiler.ir.program",
    "TextToVideo": "odsora_compiler.ir.text_to_video",
    "capture": "odsora_compiler.frontend.capture",
    "load": "odsora_compiler.runtime.runner",
    "lower": "odsora_compiler.driver.compiler",
    "run_passes": "odsora_compiler.pipeline.manager",
}

__all__ = [
    "ModelSpec",
    "PipelineSpec",
    "Program",
    "TextToVideo",
    "capture",
    "load",
    "lower",
    "run_passes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'odsora_compiler' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
