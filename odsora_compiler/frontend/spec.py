"""What a model file's `build` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from odsora_compiler.ir.program import ComputeUnits
from odsora_compiler.ir.text_to_video import TextToVideo


@dataclass
class ModelSpec:
    """A module with example inputs and the names of their axes.

    `inputs`: keyword arguments of `module.forward`; tensors (or trees of them) become inputs of the
    graph, everything else (numbers, booleans, strings, None) is bound to its value. `axes`: input
    name → one name per dimension, such as `"b c t h w"`, `_` for a dimension without a name,
    `"b (t h w) c"` for a product. Inputs without an entry have no names. `compute_units`: what of a
    device should compute it. `unused`: patterns of names (`"decoder.*"`) that a checkpoint of it
    may hold beyond the module's own. `checkpoint`: in a pipeline, the name of its weights among
    those given with `--weights` (default: the component's); several components may share one.
    """

    module: nn.Module
    inputs: Mapping[str, Any]
    axes: Mapping[str, str] = field(default_factory=dict)
    compute_units: ComputeUnits = "cpu_and_gpu"
    unused: tuple[str, ...] = ()
    checkpoint: str = ""


@dataclass
class PipelineSpec:
    """Components and the Python that calls them, such as a sampler.

    `host(c, **inputs)` is traced into a graph: `c.name(z=z, …)` calls a component, the rest is
    tensor arithmetic; Python loops unroll (see `frontend.host.trace_host`). `inputs`, `axes`: as in
    `ModelSpec`, of the host. The host returns a dict of tensors, whose keys name the outputs.
    `text_to_video`: which input and output is what, where the host makes a film of a prompt.
    """

    components: Mapping[str, ModelSpec]
    host: Callable[..., Any]
    inputs: Mapping[str, Any]
    axes: Mapping[str, str] = field(default_factory=dict)
    text_to_video: TextToVideo | None = None
