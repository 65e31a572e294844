"""Linear Proportional Leap: follow the drift of one step of a sampler to the end."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import fx

from odsora_compiler.analysis.sampler import EulerSampler, NotEulerError, euler_sampler
from odsora_compiler.errors import UsageError, nearest
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.host import early_exit
from odsora_compiler.ir.program import Program
from odsora_compiler.pipeline.base import Context, Pass, option
from odsora_compiler.pipeline.exactness import Exactness, Lossy
from odsora_compiler.rewrite.leap import Leap

aten = torch.ops.aten


class Scope(enum.Enum):
    """What of two drifts is compared. SLICE: [0, …, 0, :, :], row by row. TENSOR: all at once."""

    SLICE = "slice"
    TENSOR = "tensor"


@dataclass(frozen=True)
class LPL(Pass):
    """Leave out the last steps of an Euler sampler: z = z_n + v_n · (all that remains).

        z_n ─ v_n ─ z_n+1 ─ … ─ z_K ─ decode        z_n ─ v_n ─ leap ─ decode

    Static with `at`. Else every step from `min_steps` on compares its drift with the one before
    (c, the cosine); once c has not grown by more than `tolerance` for `patience` steps, the sampler
    leaps:

        z_n ─ v_n ─┬─ z_n+1 ─ … ─ z_K ─ first_true([early_exit(left ≤ 0, leap), …]) ─ decode
                   └─ c, best, left, leap

    Declines unless the host is proved to sample by Euler steps (`analysis.sampler`).

    Source: On-device Sora, arXiv 2502.04363, section 3.1, and its public code for the slice.
    """

    name = "lpl"

    at: int | None = option(
        None, "leap at this step, counted from 0, after as many ordinary ones; none: adaptively"
    )
    min_steps: int | None = option(
        None, "first step whose drift is compared; none: after a quarter of the steps"
    )
    patience: int = option(3, "leap after this many comparisons that were not better than the best")
    tolerance: float = option(1e-3, "by how much a cosine must exceed the best one to be better")
    scope: Scope = option(
        Scope.SLICE,
        "what is compared: the first sample, channel and frame, mean over its rows, as published, "
        "or the whole tensor",
    )
    component: str = option("", "the component that is sampled; default: the one that can be")

    def __post_init__(self) -> None:
        if self.at is not None and self.at < 0:
            raise ValueError("at must be at least 0")
        if self.at is not None and self.min_steps is not None:
            raise ValueError("at says where to leap, so that min_steps has no meaning")
        if self.min_steps is not None and self.min_steps < 1:
            raise ValueError("min_steps must be at least 1: the first step has none before it")
        if self.patience < 1:
            raise ValueError("patience must be at least 1")
        if not 0 <= self.tolerance < 2:
            raise ValueError("tolerance must be at least 0 and below 2")

    @property
    def exactness(self) -> Exactness:
        """Different on purpose, by as much as the flow is curved."""
        return Lossy("relative")

    def run(self, program: Program, context: Context) -> None:
        """Rewrite the host. Raises `UsageError` where it has no component or step as named."""
        if any(self.name in node.meta["provenance"].passes for node in program.host.operators()):
            context.decline("host", "it leaps already")
            return
        sampler = self._sampler(program, context)
        if sampler is None:
            return
        leap = Leap(Editor(program.host, self.name), sampler)
        if self.at is not None:
            changed = self._leap_at(self.at, leap, context)
        else:
            changed = self._leap_when_straight(leap, context)
        if changed:
            leap.editor.erase_dead()
            used = set(program.host.weight_names())
            program.constants = {k: v for k, v in program.constants.items() if k in used}

    def _sampler(self, program: Program, context: Context) -> EulerSampler | None:
        if self.component and self.component not in program.components:
            raise UsageError(
                f"pass 'lpl': the program has no component '{self.component}'",
                nearest(self.component, program.components),
            )
        names = [self.component] if self.component else list(program.components)
        found: list[EulerSampler] = []
        refused: dict[str, str] = {}
        for name in names:
            if self.component or len(program.steps(name)) > 1:
                try:
                    found.append(euler_sampler(program, name))
                except NotEulerError as refusal:
                    refused[name] = str(refusal)
        # Components called within the same steps, such as a network for guidance, are one sampler.
        if len({sampler.result for sampler in found}) > 1:
            several = ", ".join(sampler.component for sampler in found)
            context.decline("host", f"several components are sampled ({several}): name one")
            return None
        if found:
            return found[0]
        for name, reason in refused.items():
            context.decline(name, reason)
        if not refused:
            context.decline("host", "it calls no component step after step")
        return None

    def _leap_at(self, index: int, leap: Leap, context: Context) -> bool:
        sampler = leap.sampler
        last = len(sampler.steps) - 1
        if index > last:
            raise UsageError(
                f"pass 'lpl': at={index}, but '{sampler.component}' is sampled in {last + 1} steps",
                f"Steps to leap at are 0 to {last}.",
            )
        if index == last:
            context.note(f"{sampler.component}: a leap at step {last} is the last step itself")
            return False
        leap.editor.replace(sampler.result, leap.value(index))
        context.note(f"{sampler.component}: leaps at step {index}, {last - index} steps fewer")
        return True

    def _leap_when_straight(self, leap: Leap, context: Context) -> bool:
        sampler = leap.sampler
        count = len(sampler.steps)
        first = -(-count // 4) if self.min_steps is None else self.min_steps
        earliest = first + self.patience - 1
        shape = list(sampler.result.meta["val"].shape)
        if earliest >= count - 1:
            context.decline(
                sampler.component,
                f"comparing from step {first} with patience {self.patience} leaves none of its "
                f"{count} steps out",
            )
            return False
        if self.scope is Scope.SLICE and (len(shape) < 3 or shape[-1] < 2):
            context.decline(
                sampler.component,
                f"drifts of shape {shape} have no picture whose rows could be compared: "
                "scope=tensor compares them whole",
            )
            return False
        exits = self._exits(leap, range(first, count - 1), earliest)
        leap.merge(exits)
        context.note(
            f"{sampler.component}: leaps once its drift no longer turns, at step {earliest} to "
            f"{count - 2} of {count}"
        )
        return True

    def _exits(self, leap: Leap, compared: range, earliest: int) -> list[fx.Node]:
        """An exit for every step from `earliest` on: the steps before it run in any case."""
        call = leap.editor.call
        leap.go_to(compared[0] - 1)
        before = self._looked_at(leap, compared[0] - 1)
        best = call(aten.full.default, [], 0.0, dtype=before.meta["val"].dtype)
        left = call(aten.full.default, [], self.patience, dtype=torch.int64)
        exits = []
        for index in compared:
            leap.go_to(index)
            now = self._looked_at(leap, index)
            cosine = call(aten.cosine_similarity.default, now, before, now.meta["val"].dim() - 1)
            if self.scope is Scope.SLICE:
                cosine = call(aten.mean.default, cosine)
            better = call(aten.gt.Tensor, cosine, call(aten.add.Tensor, best, self.tolerance))
            best = call(aten.where.self, better, cosine, best)
            fewer = call(aten.sub.Tensor, left, 1)
            left = call(aten.where.ScalarSelf, better, self.patience, fewer)
            before = now
            if index >= earliest:
                spent = call(aten.le.Scalar, left, 0)
                exits.append(call(early_exit, spent, leap.value(index)))
        return exits

    def _looked_at(self, leap: Leap, index: int) -> fx.Node:
        """Of the drift of step `index`, the rows to be compared, or all of it as one."""
        call = leap.editor.call
        part, _ = leap.drift(index)
        if self.scope is Scope.TENSOR:
            part = call(aten.view.default, part, [part.meta["val"].numel()])
        while part.meta["val"].dim() > 2:
            part = call(aten.select.int, part, 0, 0)
        if part.meta["val"].dtype in (torch.float16, torch.bfloat16):
            part = call(aten._to_copy.default, part, dtype=torch.float32)
        return part
