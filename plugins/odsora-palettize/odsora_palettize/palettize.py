"""Palettization: weights as indices into look-up tables found by k-means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from odsora_compiler.errors import PassError, nearest
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.ir.weights import EncodedWeights, LookupTable, WeightSpec
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.exactness import Exactness, Lossy


@dataclass(frozen=True)
class Palettize(Pass):
    """Store each large weight as `bits`-wide indices into tables of its most fitting values.

        weight [O, I] float  ─▶  indices [O, I] of `bits` bits  +  table [groups, 2**bits] float

    The tables come from coremltools.optimize (k-means). The graphs stay as they are: weights decode
    to what the tables give, so every later stage, the numeric checks included, sees the loss.
    Packages store indices and tables; Core ML decodes them when it loads or computes.
    """

    name: ClassVar[str] = "palettize"

    bits: int = option(4, "bits of an index: 1, 2, 3, 4, 6 or 8")
    group: int | None = option(None, "channels that share a table; none: one table a weight")
    components: tuple[str, ...] | None = option(None, "components to palettize; none: all")
    smallest: int = option(4096, "weights with fewer elements stay as they are")
    loss: float | None = option(None, "most relative change of the outputs; none: only reported")

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 6, 8):
            raise ValueError(f"bits={self.bits}: Core ML has tables of 1, 2, 3, 4, 6 and 8 bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: at least one channel shares a table")

    @property
    def exactness(self) -> Exactness:
        return Lossy("relative", self.loss)

    def run(self, program: Program, context: Context) -> None:
        # Here and not above: it imports coremltools, which listing passes need not wait for.
        from odsora_palettize.tables import find_table

        for component in self._chosen(program):
            tables: dict[str, LookupTable] = {}
            measure = _WeightError()
            for name, spec in self._suitable(component):
                weight = component.weights.load(name).float()
                group = self.group if self.group and spec.shape[0] % self.group == 0 else None
                if self.group and group is None:
                    context.decline(
                        f"grouping of {component.name}:{name}",
                        f"its {spec.shape[0]} channels are no multiple of group={self.group}; "
                        "it has one table",
                    )
                tables[name] = find_table(weight, self.bits, group)
                measure.add(tables[name].decode(), weight)
            if not tables:
                context.decline(component.name, f"no weight has {self.smallest} elements")
                continue
            component.weights = EncodedWeights(component.weights, tables)
            context.note(
                f"palettize: {component.name}: {len(tables)} weights to {self.bits} bits, "
                f"relative error of the weights {measure.relative:.2e}"
            )

    def _chosen(self, program: Program) -> list[Component]:
        for name in self.components or ():
            if name not in program.components:
                raise PassError(
                    f"palettize: the program has no component '{name}'",
                    nearest(name, program.components),
                )
        return [
            component
            for name, component in program.components.items()
            if self.components is None or name in self.components
        ]

    def _suitable(self, component: Component) -> Iterator[tuple[str, WeightSpec]]:
        used = dict.fromkeys(
            name for function in component.functions.values() for name in function.weight_names()
        )
        for name in used:
            spec = component.weights.spec(name)
            large = spec.elements >= self.smallest and len(spec.shape) >= 2
            if large and spec.dtype.is_floating_point and component.weights.encoding(name) is None:
                yield name, spec


class _WeightError:
    """Relative error (Euclidean norm) over all weights together."""

    def __init__(self) -> None:
        self._difference = 0.0
        self._size = 0.0

    def add(self, decoded: torch.Tensor, weight: torch.Tensor) -> None:
        self._difference += float((decoded.float() - weight).square().sum())
        self._size += float(weight.square().sum())

    @property
    def relative(self) -> float:
        return (self._difference / self._size) ** 0.5 if self._size else 0.0
