"""Values of a host graph as sums of products: what a sampler computes, however it was written.

Every node is written as a polynomial in *atoms*: nodes whose making is not looked into. Sums,
multiples, casts and copies are looked into; products too, while all but one factor are the same
whatever the components give. All of this is elementwise, so that it holds under broadcasting.
Reshapes are looked into as well: they keep the order of the elements, in which a form is to be read
where the shapes of its atoms differ. What the sums mean is for others to say (`analysis.sampler`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from odsora_compiler.analysis.arguments import bind, operator_name
from odsora_compiler.ir.evaluate import run_operator
from odsora_compiler.ir.host import call_component, early_exit, first_true, random_tensor
from odsora_compiler.ir.program import Program

# A product of atoms, in the order of their names; the empty one is the number 1.
Product = tuple[fx.Node, ...]
# Product → coefficient; products that are not there have none.
Form = dict[Product, float]

# A sum this small beside its terms is rounding and counts as zero. Measured on samplers of 2 to
# 1000 steps (own loops written in a dozen ways, diffusers' schedulers): what cancels are equal
# numbers, exactly; numbers that float32 rounded apart would leave 1e-7. The smallest sum that meant
# something was 1.6e-3 of its terms (DDIM in 1000 steps).
ROUNDING = 1e-6

# Forms longer than this are no sums anyone wrote down; their nodes are atoms.
_LONGEST = 256


class HostConstants:
    """What nodes that depend on no input, call or random number are, as tensors."""

    def __init__(self, program: Program) -> None:
        self._given = program.constants
        self._known: dict[fx.Node, torch.Tensor | None] = {}
        for node in program.host.graph.nodes:
            self._known[node] = self._evaluate(node)

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The node's value, or None where it is not constant."""
        return self._known.get(node)

    def number(self, node: Any) -> float | None:
        """The one number that all elements are, or None; a number is itself."""
        if isinstance(node, (bool, int, float)):
            return float(node)
        value = self._known.get(node) if isinstance(node, fx.Node) else None
        if value is None or not value.numel() or value.is_complex():
            return None
        first = value.flatten()[0]
        return float(first) if bool((value == first).all()) else None

    def _evaluate(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            return self._given[str(node.target)]
        if node.op != "call_function" or node.target in _NO_CONSTANTS:
            return None
        if operator_name(node) in _LIKE:
            value = node.meta["val"]
            fill = bind(node).get("fill_value", _LIKE[operator_name(node)])
            if isinstance(fill, (bool, int, float)):
                return torch.full((), fill, dtype=value.dtype).expand(value.shape)
        known = {used: self._known[used] for used in node.all_input_nodes}
        if any(value is None for value in known.values()) or not _is_operator(node):
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        result = run_operator(node.target, args, kwargs)
        return result if isinstance(result, torch.Tensor) else None


class LinearForms:
    """The form of every node of a host.

    `atoms`: nodes not looked into although they could be (states of a sampler). `varying`: nodes
    that depend on these or on calls; a product of two of them is an atom.
    """

    def __init__(
        self,
        host: fx.Graph,
        constants: HostConstants,
        atoms: Iterable[fx.Node],
        varying: Iterable[fx.Node],
    ) -> None:
        self._constants = constants
        self._atoms = frozenset(atoms)
        self._varying = frozenset(varying)
        self._forms: dict[fx.Node, Form] = {}
        # Nodes whose forms hold in the order of the elements only, not under broadcasting.
        self._reshaped: set[fx.Node] = set()
        self._definitions: dict[fx.Node, Form] = {}
        for node in host.nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                made = self._define(node)
                self._definitions[node] = made
                self._forms[node] = {(node,): 1.0} if node in self._atoms else made

    def of(self, node: fx.Node) -> Form:
        """The form of `node`; an atom's is itself."""
        return self._forms[node]

    def definition(self, node: fx.Node) -> Form:
        """How `node`, an atom or not, is made of what comes before it."""
        return self._definitions[node]

    def varies(self, node: fx.Node) -> bool:
        """Whether `node` depends on a state or a call."""
        return node in self._varying

    def _define(self, node: fx.Node) -> Form:
        number = self._constants.number(node)
        if number is not None:
            return {(): number} if number else {}
        itself: Form = {(node,): 1.0}
        rule = _RULES.get(operator_name(node)) if _is_operator(node) else None
        if rule is None:
            return itself
        if any(used in self._reshaped for used in node.all_input_nodes):
            if not all(self._keeps_order(used, node) for used in node.all_input_nodes):
                return itself
            self._reshaped.add(node)
        made = rule(self, node, bind(node))
        return itself if made is None or len(made) > _LONGEST else made

    def _keeps_order(self, used: fx.Node, node: fx.Node) -> bool:
        """Whether element i of `node` is made of element i of `used`, or of its only one."""
        count = used.meta["val"].numel()
        return count in (1, node.meta["val"].numel()) or self._constants.number(used) is not None

    def _reordered(self, source: fx.Node, node: fx.Node) -> Form | None:
        """The form of `source` for `node`, which has all its elements in another shape."""
        form, count = self._forms[source], node.meta["val"].numel()
        if source.meta["val"].numel() != count:
            return None
        if source.meta["val"].shape != node.meta["val"].shape:
            if any(atom.meta["val"].numel() not in (1, count) for each in form for atom in each):
                return None
            self._reshaped.add(node)
        return form

    def _value(self, argument: Any) -> Form | None:
        if isinstance(argument, fx.Node):
            return self._forms.get(argument)
        number = self._constants.number(argument)
        return None if number is None else {(): number}

    def _times(self, one: Form | None, other: Form | None) -> Form | None:
        if one is None or other is None:
            return None
        if all(
            any(self.varies(atom) for product in form for atom in product) for form in (one, other)
        ):
            return None
        return _sum(
            (tuple(sorted((*left, *right), key=lambda atom: atom.name)), a * b)
            for left, a in one.items()
            for right, b in other.items()
        )

    def _plus(self, one: Form | None, other: Form | None) -> Form | None:
        if one is None or other is None:
            return None
        return _sum((*one.items(), *other.items()))


Rule = Callable[[LinearForms, fx.Node, dict[str, Any]], Form | None]
_NO_CONSTANTS = (call_component, random_tensor, early_exit, first_true)
_LIKE = {"zeros_like": 0, "ones_like": 1, "full_like": None, "new_zeros": 0, "new_ones": 1}


def _is_operator(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _sum(terms: Iterable[tuple[Product, float]]) -> Form:
    total: dict[Product, float] = defaultdict(float)
    size: dict[Product, float] = defaultdict(float)
    for product, coefficient in terms:
        total[product] += coefficient
        size[product] += abs(coefficient)
    return {key: value for key, value in total.items() if abs(value) > ROUNDING * size[key]}


def _add(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    scaled = forms._times(forms._value(given["other"]), forms._value(given.get("alpha", 1)))
    return forms._plus(forms._value(given["self"]), scaled)


def _subtract(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return _add(forms, node, {**given, "alpha": _negative(given.get("alpha", 1))})


def _subtract_from(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return _subtract(forms, node, {**given, "self": given["other"], "other": given["self"]})


def _multiply(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return forms._times(forms._value(given["self"]), forms._value(given["other"]))


def _divide(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    inverse = _inverse(forms, given["other"])
    if given.get("rounding_mode") is not None:
        return None
    return forms._times(forms._value(given["self"]), inverse)


def _negate(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return forms._times(forms._value(given["self"]), {(): -1.0})


def _add_product(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    product = forms._times(forms._value(given["tensor1"]), forms._value(given["tensor2"]))
    scaled = forms._times(product, forms._value(given.get("value", 1)))
    return forms._plus(forms._value(given["self"]), scaled)


def _add_quotient(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    quotient = forms._times(forms._value(given["tensor1"]), _inverse(forms, given["tensor2"]))
    scaled = forms._times(quotient, forms._value(given.get("value", 1)))
    return forms._plus(forms._value(given["self"]), scaled)


def _interpolate(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    start = forms._value(given["self"])
    way = forms._plus(forms._value(given["end"]), forms._times(start, {(): -1.0}))
    return forms._plus(start, forms._times(forms._value(given["weight"]), way))


def _cast(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    source = given["src"] if operator_name(node) == "copy" else given["self"]
    exact = source.meta["val"].is_floating_point() and node.meta["val"].is_floating_point()
    return forms._value(source) if exact else None


def _whole(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    same = given["self"].meta["val"].shape == node.meta["val"].shape
    return forms._value(given["self"]) if same else None


def _reshape(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return forms._reordered(given["self"], node)


def _written_over(forms: LinearForms, node: fx.Node, given: dict[str, Any]) -> Form | None:
    return forms._reordered(given["src"], node) if given.get("step", 1) == 1 else None


def _inverse(forms: LinearForms, argument: Any) -> Form | None:
    number = forms._constants.number(argument)
    return {(): 1.0 / number} if number else None


def _negative(number: Any) -> Any:
    return -number


_RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "addcmul": _add_product,
    "addcdiv": _add_quotient,
    "lerp": _interpolate,
    **dict.fromkeys(("clone", "_to_copy", "to", "alias", "detach", "contiguous", "copy"), _cast),
    **dict.fromkeys(("expand", "slice"), _whole),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "select"), _reshape
    ),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _written_over),
}
