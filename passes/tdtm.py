"""Temporal Dimension Token Merging: average the tokens of neighbouring frames around attention."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from torch import fx

from odsora_compiler.analysis.attention import AttentionSite, Site, UnusableSite, attention_sites
from odsora_compiler.analysis.axes import AxisAnalysis, axis_names
from odsora_compiler.analysis.axes_factors import Axis
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.program import Component, Program
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.exactness import Exactness, Lossy
from odsora_compiler.rewrite.literals import RegionError
from odsora_compiler.rewrite.regions import AxisMerge

TIME = "t"


class Positions(enum.Enum):
    """How merged tokens are numbered. COMPACT: 0, 1, 2, …. CENTER: ½, 2½, 4½, …."""

    COMPACT = "compact"
    CENTER = "center"


@dataclass(frozen=True)
class TDTM(Pass):
    """Derive the function `tdtm`, with a merge before and an unmerge after attention.

        x ─ qkv ─ attention ─ proj ─ y        x ─ merge ─ qkv ─ attention ─ proj ─ unmerge ─ y

    The merge averages frames 2i and 2i+1, the unmerge gives both the value of their merged token;
    of an odd number of frames the last is left out and gets the last merged token. Applies to
    attention of the kinds in `sites` whose queries hold the axis `t`, in whatever layout; for
    cross-attention the queries alone are merged. `base` stays, and the host calls `tdtm` in its
    stead.

    Source: On-device Sora, arXiv 2502.04363, equations 6 to 9.
    """

    name = "tdtm"
    requires = frozenset({"axis t"})
    establishes = frozenset({"function tdtm"})
    destroys = frozenset({"plan"})

    sites: tuple[Site, ...] = option(
        (Site.SPATIAL, Site.JOINT, Site.CROSS),
        "kinds of attention to merge around, of spatial, temporal, joint (space and time at once) "
        "and cross; as published: spatial,temporal,cross. Merging around temporal attention is "
        "what costs motion (docs/quality.md)",
    )
    positions: Positions = option(
        Positions.CENTER,
        "numbers of merged tokens in position embeddings: the centers ½, 2½, 4½, … of the merged "
        "frames, or 0, 1, 2, … as published, with which time runs half as fast (which way things "
        "move is lost then, see benchmarks/quality.py); stored tables have no centers",
    )
    steps: int | None = option(
        None,
        "merge in this many first steps of the host, a step being calls that do not need each "
        "other's results; none: in all",
    )

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites must name at least one kind of attention")
        if self.steps is not None and self.steps < 1:
            raise ValueError("steps must be at least 1")

    @property
    def exactness(self) -> Exactness:
        """Different on purpose, by as much as neighbouring frames differ."""
        return Lossy("relative")

    def run(self, program: Program, context: Context) -> None:
        """Derive and redirect for every component with a site that can be merged."""
        for component in program.components.values():
            if self._derive(component, context):
                program.redirect(component.name, "base", "tdtm", first=self.steps)
                count = len(program.steps(component.name))
                if self.steps is not None and self.steps >= count:
                    context.note(f"{component.name}: steps={self.steps}, all {count} of the host")

    def _derive(self, component: Component, context: Context) -> bool:
        function = component.derive("tdtm")
        axes = context.analyses.of(axis_names, function)
        frames = axes.sizes(TIME)
        merged: Counter[Site] = Counter()
        if not frames:
            reasons = axes.conflicts or [f"no input names the axis '{TIME}'"]
            context.decline(component.name, "; ".join(reasons))
        elif frames == {1}:
            context.decline(component.name, f"axis '{TIME}' has one frame: nothing to merge")
        else:
            found = attention_sites(function, axes, TIME)
            kinds = {site.kind for site in found if isinstance(site, AttentionSite)}
            merged = self._merge(component, function, found, axes, context)
            if not found:
                context.decline(component.name, "it has no attention")
            elif kinds and not kinds & set(self.sites):
                wanted = " or ".join(site.value for site in self.sites)
                context.decline(component.name, f"none of its attention sites is {wanted}")
        if not merged:
            del component.functions["tdtm"]
            return False
        counts = ", ".join(f"{count} {site.value}" for site, count in merged.items())
        context.note(f"{component.name}: merged frames around attention: {counts}")
        return True

    def _merge(
        self,
        component: Component,
        function: Function,
        found: list[AttentionSite | UnusableSite],
        axes: AxisAnalysis,
        context: Context,
    ) -> Counter[Site]:
        editor = Editor(function, self.name)
        merges: dict[Axis, AxisMerge] = {}
        merged: Counter[Site] = Counter()
        replacements: dict[fx.Node, fx.Node] = {}
        for site in found:
            place = _place(component, site)
            if isinstance(site, UnusableSite):
                context.decline(place, site.reason)
                continue
            if site.kind not in self.sites:
                continue
            if site.time not in merges:
                centers = self.positions is Positions.CENTER
                merges[site.time] = AxisMerge(editor, axes, site.time, centers)
            try:
                made = merges[site.time].copy(site.nodes, site.entries, site.exits)
            except RegionError as refusal:
                context.decline(place, str(refusal))
                continue
            replacements |= made
            merged[site.kind] += 1
        # All regions are copied before any is connected: until then the axes of every value that a
        # region reads are those that were analysed.
        for old, new in replacements.items():
            editor.replace(old, new)
        editor.erase_dead()
        return merged


def _place(component: Component, site: AttentionSite | UnusableSite) -> str:
    attention = site.attentions[0]
    return f"{component.name}: {attention.name} of {attention.meta['provenance']}"
