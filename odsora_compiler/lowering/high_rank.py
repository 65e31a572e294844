"""Permutations of tensors of rank above 5, done in views of rank 4.

Models pass through rank 6 to 8 where they split axes, permute and merge them again (patchify,
unpatchify). Reshapes of neighbouring axes cost nothing, so

    view [b, t, h, w, 2, 2, c] ─ permute ─ view          becomes a few times
    view [outer, between, moved, inner] ─ permute(0, 2, 1, 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from odsora_compiler.ir.edit import Editor

aten = torch.ops.aten

MAX_RANK = 5


def is_high_rank_permutation(node: fx.Node) -> bool:
    """Whether a `permute` or `transpose` node works on more axes than Core ML has."""
    return node.meta["val"].dim() > MAX_RANK


def permute_in_low_rank(editor: Editor, node: fx.Node) -> fx.Node:
    """The same permutation by moving one run of axes at a time; ends in a view to node's shape."""
    source: Any = node.args[0]
    shape = list(source.meta["val"].shape)
    groups = _runs(shape, _order(node))
    value = source.args[0] if source.target is aten.view.default else source
    current = sorted(groups)
    size = {group: prod(shape[axis] for axis in group) for group in groups}
    for place, group in enumerate(groups):
        found = current.index(group)
        if found == place:
            continue
        outer, between, inner = current[:place], current[place:found], current[found + 1 :]
        split = [prod(size[g] for g in part) for part in (outer, between, [group], inner)]
        value = editor.call(aten.view.default, value, split)
        value = editor.call(aten.permute.default, value, [0, 2, 1, 3])
        current = [*outer, group, *between, *inner]
    return editor.call(aten.view.default, value, list(node.meta["val"].shape))


def is_view_of_high_rank_view(node: fx.Node) -> bool:
    """Whether a `view` node's input is a view to a shape that Core ML does not have."""
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and source.target is aten.view.default
        and source.meta["val"].dim() > MAX_RANK
    )


def merge_views(editor: Editor, node: fx.Node) -> fx.Node:
    """View the first tensor at once as the last shape."""
    source: Any = node.args[0]
    return editor.call(aten.view.default, source.args[0], list(node.meta["val"].shape))


def _order(node: fx.Node) -> list[int]:
    """Position in the result → axis of the input."""
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [dim % rank for dim in dims]
    order = list(range(rank))
    one, other = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    order[one], order[other] = order[other], order[one]
    return order


def _runs(shape: Sequence[int], order: Sequence[int]) -> list[tuple[int, ...]]:
    """The axes in their new order, those that stay neighbours together, size 1 left out."""
    kept = [axis for axis in order if shape[axis] != 1]
    rank = {axis: place for place, axis in enumerate(sorted(kept))}
    runs: list[tuple[int, ...]] = []
    for axis in kept:
        if runs and rank[axis] == rank[runs[-1][-1]] + 1:
            runs[-1] = (*runs[-1], axis)
        else:
            runs.append((axis,))
    return runs
