"""Rewriting by rules: a table of (operators, check, rewrite) applied until none fires.

A rule is data; passes and the legalization of the lowering bring their own tables. What a rule may
build, and that signatures stay right, is the business of `ir.edit.Editor`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from odsora_compiler.errors import PassError
from odsora_compiler.ir.edit import Editor
from odsora_compiler.ir.function import Function


@dataclass(frozen=True)
class Rule:
    """One rewrite of one operator node.

    `targets`: the operators it looks at; empty for all. `check(node)`: whether it applies.
    `rewrite(editor, node)` builds the replacement just before `node` and returns it. `why`: the
    reason the rule exists, in a line.
    """

    name: str
    why: str
    targets: frozenset[Any]
    check: Callable[[fx.Node], bool]
    rewrite: Callable[[Editor, fx.Node], fx.Node]


def rewrite(function: Function, rules: Iterable[Rule], author: str) -> Counter[str]:
    """Apply `rules` to `function` in place until none fires; how often each did.

    The first rule in order that accepts a node rewrites it; new nodes and the users of the
    replacement are looked at again. The replacement takes the node's name and provenance. Raises
    `PassError` where rules undo one another.
    """
    table = list(rules)
    editor = Editor(function, author)
    fired: Counter[str] = Counter()
    pending = deque(function.operators())
    waiting = set(pending)
    budget = 100 * len(pending) + 1000
    while pending:
        node = pending.popleft()
        waiting.discard(node)
        if node._erased:
            continue
        rule = next((rule for rule in table if _accepts(rule, node)), None)
        if rule is None:
            continue
        fired[rule.name] += 1
        if fired.total() > budget:
            raise PassError(
                f"{author}: the rules do not come to an end in function '{function.name}' "
                f"(last: '{rule.name}' at '{node.name}')",
                "Two rules undo each other, or one accepts what it makes itself.",
            )
        for again in _apply(rule, editor, node):
            if again not in waiting:
                waiting.add(again)
                pending.append(again)
    editor.erase_dead()
    return fired


def _accepts(rule: Rule, node: fx.Node) -> bool:
    return (not rule.targets or node.target in rule.targets) and rule.check(node)


def _apply(rule: Rule, editor: Editor, node: fx.Node) -> list[fx.Node]:
    """Replace `node`; returns the nodes to look at again."""
    last_before = node.prev
    replacement = rule.rewrite(editor.before(node), node)
    editor.replace(node, replacement)
    made = []
    following = last_before.next
    while following is not node:
        if following.op == "call_function":
            made.append(following)
        following = following.next
    name = node.name
    editor.erase(node)
    if replacement in made:
        replacement.name = name
    return [*made, *(user for user in replacement.users if user.op == "call_function")]
