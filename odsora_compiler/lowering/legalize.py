"""Legalization: a function is made one that coremltools lowers faithfully, or is refused.

The rules are in `rules`; here they are applied to a copy, constants are folded, and what would
still be dropped silently is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from odsora_compiler.errors import LoweringError
from odsora_compiler.ir.function import Function
from odsora_compiler.ir.weights import LayeredWeights, WeightStore
from odsora_compiler.lowering.folding import FoldedWeights, fold_constants
from odsora_compiler.lowering.high_rank import MAX_RANK
from odsora_compiler.lowering.rules import DEFAULT_RULES
from odsora_compiler.rewrite.rules import Rule, rewrite

aten = torch.ops.aten


class LegalWeights(LayeredWeights):
    """The weights of a legalized function: folded constants over those of the component."""

    def __init__(self, folded: FoldedWeights, weights: WeightStore) -> None:
        super().__init__(folded, weights)
        self._folded = folded
        self._folded_names = frozenset(folded.names())
        self._constants = frozenset(name for name in folded.names() if not folded.sources(name))

    def is_folded(self, name: str) -> bool:
        """Whether the weight is a constant that was computed here."""
        return name in self._folded_names

    def is_literal(self, name: str) -> bool:
        """Whether the weight is a folded constant that depends on no parameter."""
        return name in self._constants


def legalize(
    function: Function, weights: WeightStore, rules: Sequence[Rule] = DEFAULT_RULES
) -> tuple[Function, LegalWeights]:
    """A copy of `function` that coremltools lowers faithfully, and the weights it names.

    Names, shapes, dtypes and, up to rounding, values of inputs and outputs are kept. Raises
    `LoweringError` naming the node where something would be lost or refused.
    """
    legal = function.copy()
    rewrite(legal, rules, "legalize")
    folded = fold_constants(legal, weights)
    for node in legal.operators():
        _check(legal, node)
    return legal, LegalWeights(folded, weights)


def describe(node: fx.Node) -> str:
    """The node, its operator and where it comes from, for errors."""
    provenance = node.meta.get("provenance")
    place = f" of {provenance}" if provenance else ""
    return f"'{node.name}' ({node.target}){place}"


# Keyword-only arguments by what becomes of them: honoured by the front end, or without meaning for
# values. `approximate`, `alpha`, `beta` and `enable_gqa` are rewritten away by rules.
_HONOURED = {
    (aten._to_copy.default, "dtype"),
    (aten.full.default, "dtype"),
    (aten.cumsum.default, "dtype"),
    (aten.div.Tensor_mode, "rounding_mode"),
    (aten.div.Scalar_mode, "rounding_mode"),
    (aten.var.correction, "correction"),
    (aten.std.correction, "correction"),
    (aten.addmm.default, "alpha"),
    (aten.addmm.default, "beta"),
    (aten.baddbmm.default, "alpha"),
    (aten.baddbmm.default, "beta"),
    (aten.scaled_dot_product_attention.default, "scale"),
    (aten.scaled_dot_product_attention.default, "enable_gqa"),
    (aten.gelu.default, "approximate"),
    (aten.add.Tensor, "alpha"),
    (aten.sub.Tensor, "alpha"),
    (aten.rsub.Tensor, "alpha"),
}
_MEANINGLESS = {
    "device",
    "implicit",
    "layout",
    "memory_format",
    "non_blocking",
    "output_size",
    "path",
    "pin_memory",
    "sparse_grad",
}


def _check(function: Function, node: fx.Node) -> None:
    schema = getattr(node.target, "_schema", None)
    defaults = {
        argument.name: argument.default_value
        for argument in (schema.arguments if schema is not None else ())
        if argument.kwarg_only
    }
    for name, value in node.kwargs.items():
        if name in _MEANINGLESS or (node.target, name) in _HONOURED:
            continue
        if name in defaults and value == defaults[name]:
            continue
        raise LoweringError(
            f"function '{function.name}': argument {name}={value} of {describe(node)} "
            "would be ignored by coremltools",
            "Write this part of the model without it.",
        )
    values = node.meta["val"]
    for tensor in values if isinstance(values, (list, tuple)) else [values]:
        if tensor.dim() > MAX_RANK:
            raise LoweringError(
                f"function '{function.name}': {describe(node)} has rank {tensor.dim()}; "
                f"Core ML's limit is {MAX_RANK}",
                "Merge axes before this operation, as a view or reshape of fewer axes.",
            )
