"""Watching a package compute: which operation first gives something else than PyTorch.

Values of a package are matched by name with nodes of the chunk's graph; who compares outputs and
decides is `driver.acceptance`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx

from odsora_compiler.ir.evaluate import call_operator
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Component
from odsora_compiler.lowering.rules import HALF_MASK, HALF_MAX

Tensors = Mapping[str, torch.Tensor]
_Known = TypeVar("_Known")

# An operation that leaves its operands' scale by more than this, its operands being right, is wrong
# by itself. In fp16 rounding alone comes near, so there it only helps to name a culprit.
_LOCAL_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
_SAMPLES = 2048


@dataclass(frozen=True)
class Sample:
    """Values of a tensor at fixed places. `peak`: its largest absolute value, NaN if it has one."""

    shape: tuple[int, ...]
    values: torch.Tensor
    peak: float

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Sample:
        count = min(_SAMPLES, tensor.numel())
        # In float64: float32 cannot tell the last places of a large tensor apart.
        places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
        # In the order of memory, which is many times faster than across it.
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
        bounds = torch.aminmax(tensor.permute(order))
        peak = float(torch.maximum(bounds.min.neg(), bounds.max))
        return cls(tuple(tensor.shape), torch.take(tensor, places).float(), peak)


class Watch:
    """Sees every value a package computes and compares those that are values of the graph too."""

    def __init__(
        self,
        chunk: Function,
        operators: Mapping[str, str],
        expected: Mapping[str, Sample],
        precision: str,
    ) -> None:
        nodes = {node.name: node for node in chunk.operators()}
        # Package values are named by stems such as `op12_linear`; `operators` maps them to nodes.
        self._nodes = {stem: nodes[name] for stem, name in operators.items() if name in nodes}
        # An output has its own name in the package.
        self._nodes |= {name: node for name, node in chunk.results.items() if node.name in nodes}
        self._expected = expected
        self._precision = precision
        self._tolerance = _LOCAL_TOLERANCE[precision]
        self._errors: dict[str, float] = {}
        self.suspects: dict[fx.Node, str] = {}
        self._first_large: str | None = None
        self._first_off: str | None = None
        self._nan: str | None = None
        self._infinite: str | None = None

    def __call__(self, name: str, op: str, value: torch.Tensor) -> None:
        if not value.is_floating_point() or not value.numel():
            return
        sample = Sample.of(value)
        if self._nan is None and math.isnan(sample.peak):
            self._nan = f"{op} '{name}' gives NaN{self._place(name)}"
        node = find_by_name(name, self._nodes)
        expected = self._expected.get(node.name) if node is not None else None
        overflow = math.isinf(sample.peak) and (expected is None or math.isfinite(expected.peak))
        if self._infinite is None and overflow:
            self._infinite = f"{op} '{name}' gives infinity{self._place(name)}"
        if node is None or expected is None or node.name in self._errors:
            return
        if tuple(value.shape) != expected.shape:
            return
        ours, reference = sample.values, expected.values
        if self._precision == "fp16":
            ours, reference = alike_where_masked(ours, reference)
        error = float((ours - reference).abs().nan_to_num(torch.inf).max())
        self._errors[node.name] = error
        sources = [used.name for used in node.all_input_nodes if used.name in self._expected]
        scale = max([expected.peak, *(self._expected[source].peak for source in sources)])
        if not self.exceeds(node, error):
            if self._first_off is None and error > self._tolerance * expected.peak:
                self._first_off = (
                    f"{op} '{name}', which makes rounded operands of up to {scale:.2e} into values "
                    f"of up to {expected.peak:.2e}, off by {error:.2e}{self._place(name)}"
                )
            return
        text = f"{op} '{name}', off by {error:.2e} at values up to {scale:.2e}{self._place(name)}"
        self._first_large = self._first_large or text
        inherited = any(
            self._errors.get(source, 0.0) > 0.1 * self._tolerance * self._expected[source].peak
            for source in sources
        )
        if not inherited:
            self.suspects.setdefault(node, text)

    def problem(self) -> str:
        """What is wrong even where the outputs hide it."""
        if self._nan is not None:
            return self._nan
        if self._precision == "fp32" and self.suspects:
            return "an operation computes something else than PyTorch"
        return ""

    def acquit(self, nodes: Iterable[fx.Node]) -> None:
        """Take operators off the suspects."""
        for node in list(nodes):
            del self.suspects[node]

    def node(self, name: str) -> fx.Node | None:
        """The graph's counterpart of a package's value."""
        return find_by_name(name, self._nodes)

    def exceeds(self, node: fx.Node, error: float) -> bool:
        """Whether an error is too large for the sizes of the operator's operands and result."""
        sources = [used.name for used in node.all_input_nodes if used.name in self._expected]
        peaks = [self._expected[name].peak for name in (node.name, *sources)]
        return error > self._tolerance * max(peaks)

    def culprit(self) -> str:
        """The first operation that drifts, in words."""
        return (
            self._nan
            or next(iter(self.suspects.values()), None)
            or self._first_large
            or self._infinite
            or self._first_off
            or "none by itself (only values with a counterpart in the graph are compared)"
        )

    def _place(self, name: str) -> str:
        node = find_by_name(name, self._nodes)
        return f" [{node.target} {node.meta['provenance']}]" if node is not None else ""


class Operands:
    """Keeps what suspected operators read and gave in a second run of the package.

    An operator that amplifies the rounding of its operands (tanh(1/x) near 0) is off although it is
    right: PyTorch's operator gives the same on the operands that the package has.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._wanted = {*watch.suspects}
        for node in watch.suspects:
            self._wanted |= set(node.all_input_nodes)
        self._kept: dict[fx.Node, torch.Tensor] = {}

    def __call__(self, name: str, op: str, value: torch.Tensor) -> None:
        node = self._watch.node(name)
        if node is not None and node in self._wanted:
            self._kept.setdefault(node, value)

    def explain(self, node: fx.Node, inputs: Tensors, component: Component) -> bool:
        """Whether the operator gave what PyTorch gives on the same operands."""
        values: dict[fx.Node, torch.Tensor] = {}
        for used in (node, *node.all_input_nodes):
            if used.op == "placeholder":
                values[used] = inputs[str(used.target)]
            elif used.op == "get_attr":
                values[used] = component.weights.load(str(used.target))
            elif used in self._kept and self._kept[used].shape == used.meta["val"].shape:
                values[used] = self._kept[used].to(used.meta["val"].dtype)
            else:
                return False
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        expected = call_operator(node, args, kwargs)
        error = (expected - values[node]).abs().nan_to_num(torch.inf).max()
        return not self._watch.exceeds(node, float(error))


def alike_where_masked(
    found: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with 0 where the reference has a mask's minus infinity and the package one of its own.

    Half precision's is smaller, see the rule "half-mask", and more than an ordinary score.
    """
    if not expected.is_floating_point():
        return found, expected
    masked = (expected < -HALF_MAX) & (found <= -HALF_MASK / 2) & found.isfinite()
    return found.masked_fill(masked, 0.0), expected.masked_fill(masked, 0.0)


def find_by_name(name: str, known: Mapping[str, _Known]) -> _Known | None:
    """What is known by a package value's name, less what coremltools appended (`_cast_fp16`)."""
    while name not in known:
        shorter = _APPENDED.sub("", name)
        if shorter == name:
            return None
        name = shorter
    return known[name]


_APPENDED = re.compile(r"(_cast|_to)?_fp\d+$")
