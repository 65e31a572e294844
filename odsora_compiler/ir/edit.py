"""Graph editing: the one way in which passes change a graph.

An `Editor` keeps what FX alone does not: `meta['val']` of new nodes, provenance, unique names, the
order of definition and use, and the function's signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from odsora_compiler.errors import PassError
from odsora_compiler.ir.function import Function, Provenance
from odsora_compiler.ir.inference import fake_tensor, infer
from odsora_compiler.ir.weights import WeightSpec


class Editor:
    """Edits one function on behalf of `author` (a pass's name).

    New nodes go before the node given to `before` / after the one given to `after`, or else before
    the output; they take their provenance from `like`, or from the node they were placed at.
    """

    def __init__(self, function: Function, author: str) -> None:
        self.function = function
        self.graph = function.graph
        self.author = author
        self._point: fx.Node = function.output_node
        self._origin: Provenance | None = None

    def before(self, node: fx.Node) -> Editor:
        """Place the next new nodes just before `node`. Returns the editor."""
        self._point = node
        self._origin = node.meta.get("provenance")
        return self

    def after(self, node: fx.Node) -> Editor:
        """Place the next new nodes after `node` and after all placeholders. Returns the editor."""
        following = node.next
        while following.op == "placeholder":
            following = following.next
        self._point = following
        self._origin = node.meta.get("provenance")
        return self

    def call(
        self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """Add an operator call; shapes and dtypes are inferred.

        Raises `PassError` when the operator refuses the arguments.
        """
        try:
            value = infer(target, args, kwargs)
        except Exception as error:
            raise PassError(
                f"{self.author}: cannot build {target}{_describe(args)} "
                f"in function '{self.function.name}': {error}"
            ) from error
        with self.graph.inserting_before(self._point):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        node.meta["provenance"] = self._provenance(like)
        return node

    def weight(self, name: str, spec: WeightSpec) -> fx.Node:
        """A node that reads the weight `name` of the component's store."""
        with self.graph.inserting_before(self._point):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = fake_tensor(spec.shape, spec.dtype)
        node.meta["provenance"] = self._provenance(None)
        return node

    def copy(self, node: fx.Node, mapping: Callable[[fx.Node], fx.Node], **changes: Any) -> fx.Node:
        """Copy an operator node, its inputs mapped; `args=` and `kwargs=` replace the originals."""
        args = changes.get("args", node.args)
        kwargs = changes.get("kwargs", node.kwargs)
        target: Any = node.target
        return self.call(
            target,
            *fx.node.map_arg(args, mapping),
            like=node,
            **fx.node.map_arg(kwargs, mapping),
        )

    def replace(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node] | None = None) -> None:
        """Let `new` stand where `old` stood, for all users or those given.

        What `new` is computed from keeps `old`. Raises `PassError` when shape or dtype differ (a
        function's values keep theirs), or when a user comes before `new`.
        """
        was, now = _shapes(old.meta["val"]), _shapes(new.meta["val"])
        if was != now:
            raise PassError(
                f"{self.author}: '{new.name}' cannot replace '{old.name}': it is {now}, not {was}"
            )
        behind = _behind(new, old)
        chosen = set(old.users) - behind if users is None else set(users) - behind
        for user in chosen & set(old.users):
            if user < new:
                raise PassError(
                    f"{self.author}: '{new.name}' cannot replace '{old.name}' for '{user.name}', "
                    "which comes before it"
                )
        old.replace_all_uses_with(
            new, delete_user_cb=lambda user: user in chosen, propagate_meta=False
        )

    def set_argument(self, node: fx.Node, index: int, value: Any) -> None:
        """Give operator `node` another positional argument and infer its value anew.

        Raises `PassError` when that changes the node's shape or dtype, or the operator refuses it.
        """
        if index >= len(node.args):
            raise PassError(f"{self.author}: '{node.name}' has no positional argument {index}")
        args = (*node.args[:index], value, *node.args[index + 1 :])
        target: Any = node.target
        try:
            value_now = infer(target, args, node.kwargs)
        except Exception as error:
            raise PassError(
                f"{self.author}: {target} of '{node.name}' refuses {value!r}: {error}"
            ) from error
        if value_now is not node.meta["val"] and _shapes(value_now) != _shapes(node.meta["val"]):
            raise PassError(f"{self.author}: the new argument changes the shape of '{node.name}'")
        node.args = args
        node.meta["provenance"] = node.meta["provenance"].by(self.author)

    def erase(self, node: fx.Node) -> None:
        """Remove a node nothing uses."""
        self.graph.erase_node(node)

    def erase_dead(self) -> int:
        """Remove every operator and weight node whose value reaches no output; how many."""
        count = 0
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                self.graph.erase_node(node)
                count += 1
        return count

    def _provenance(self, like: fx.Node | None) -> Provenance:
        origin = like.meta.get("provenance") if like is not None else self._origin
        return (origin or Provenance()).by(self.author)


def _behind(node: fx.Node, limit: fx.Node) -> set[fx.Node]:
    """`node` and all it is computed from, no further back than `limit`."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        here = pending.pop()
        if here not in found and limit < here:
            found.add(here)
            pending += here.all_input_nodes
    return found


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    return tuple(_shapes(item) for item in value)


def _describe(args: tuple[Any, ...]) -> str:
    def text(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            value = arg.meta.get("val")
            return f"{arg.name}{list(value.shape)}" if isinstance(value, torch.Tensor) else arg.name
        return str(arg)

    return "(" + ", ".join(text(arg) for arg in args) + ")"
