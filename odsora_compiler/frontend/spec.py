"""What a model file's `build` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class ModelSpec:
    """A module with example inputs and the names of their axes.

    `inputs`: keyword arguments of `module.forward`; tensors (or trees of them) become inputs of the
    graph, everything else (numbers, booleans, strings, None) is bound to its value. `axes`: input
    name → one name per dimension, such as `"b c t h w"`, `_` for a dimension without a name,
    `"b (t h w) c"` for a product. Inputs without an entry have no names.
    """

    module: nn.Module
    inputs: Mapping[str, Any]
    axes: Mapping[str, str] = field(default_factory=dict)
