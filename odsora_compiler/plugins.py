"""Plugins: distributions that add passes, found through the entry point group `odsora.plugins`.

A plugin is a module (or object) with the hook below. One that fails to import is reported and left
out; the others still load. `ODSORA_PLUGINS=` (set, but empty) switches discovery off except for the
built-in passes; a comma-separated list of entry point names loads those only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from odsora_compiler.errors import PluginError, UsageError, nearest

if TYPE_CHECKING:
    from odsora_compiler.pipeline.base import Pass

GROUP = "odsora.plugins"
BUILTIN_DISTRIBUTION = "odsora-compiler"
_PROJECT = "odsora"

hookspec = pluggy.HookspecMarker(_PROJECT)
hookimpl = pluggy.HookimplMarker(_PROJECT)


class Hooks:
    """What a plugin may implement."""

    @hookspec
    def odsora_passes(self) -> Iterable[type[Pass]]:  # type: ignore[empty-body]
        """Return the pass classes this plugin adds; each has a `name` of its own.

        Called once, when the registry is built. Implement it in the module that the entry point
        names::

            from odsora_compiler.plugins import hookimpl

            @hookimpl
            def odsora_passes():
                from my_plugin.passes import MyPass
                return [MyPass]
        """


@dataclass(frozen=True)
class Registered:
    """A pass and the distribution it came from."""

    cls: type[Pass]
    distribution: str


class Registry(Mapping[str, Registered]):
    """Pass name → pass class and its distribution.

    `skipped` says which plugins could not be loaded, and why.
    """

    def __init__(self, passes: Mapping[str, Registered], skipped: Iterable[str] = ()) -> None:
        self._passes = dict(sorted(passes.items()))
        self.skipped = tuple(skipped)

    def __getitem__(self, name: str) -> Registered:
        return self._passes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    def find(self, name: str) -> type[Pass]:
        """The pass class; raises `UsageError` with the nearest names."""
        if name not in self._passes:
            raise UsageError(f"there is no pass '{name}'", nearest(name, self._passes))
        return self._passes[name].cls


def load_registry(
    entry_points: Iterable[metadata.EntryPoint] | None = None,
    report: Callable[[str], None] | None = None,
) -> Registry:
    """Load the plugins and collect their passes.

    `entry_points`: what to load instead of what is installed. `report` is given a sentence for each
    plugin left out (default: a line on stderr). Raises `PluginError` when two distributions
    register one pass name.
    """
    tell = report or (lambda text: print(f"odsora: {text}", file=sys.stderr))
    found = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    manager = pluggy.PluginManager(_PROJECT)
    manager.add_hookspecs(Hooks)
    distributions: dict[int, str] = {}
    skipped: list[str] = []

    def leave_out(what: str, error: BaseException) -> None:
        skipped.append(f"{what} is left out: {type(error).__name__}: {error}")
        tell(skipped[-1])

    ordered = sorted(found, key=lambda item: (_distribution(item), item.name))
    for name in sorted(_wanted(os.environ) - {entry.name for entry in ordered}):
        known = nearest(name, {entry.name for entry in ordered})
        tell(f"ODSORA_PLUGINS names '{name}', which is not installed. {known}")
    for entry in _selected(ordered):
        name = f"{_distribution(entry)}:{entry.name}"
        try:
            plugin = entry.load()
            manager.register(plugin, name=name)
            manager.check_pending()
        except (Exception, SystemExit) as error:
            if manager.has_plugin(name):
                manager.unregister(name=name)
            leave_out(f"plugin '{entry.name}' of {_distribution(entry)}", error)
            continue
        distributions[id(plugin)] = _distribution(entry)
    passes: dict[str, Registered] = {}
    for implementation in manager.hook.odsora_passes.get_hookimpls():
        distribution = distributions[id(implementation.plugin)]
        try:
            registered: Any = implementation.function()
            classes: list[type[Pass]] = [_checked(item) for item in registered]
        except (Exception, SystemExit) as error:
            leave_out(f"plugin '{implementation.plugin_name}'", error)
            continue
        for cls in classes:
            _add(passes, cls, distribution)
    return Registry(passes, skipped)


def _add(passes: dict[str, Registered], cls: type[Pass], distribution: str) -> None:
    name = cls.name
    if name in passes and passes[name].cls is not cls:
        raise PluginError(
            f"pass '{name}' is registered by both {passes[name].distribution} and {distribution}",
            "Uninstall one of them, or choose the plugins to load with ODSORA_PLUGINS=name,name.",
        )
    passes[name] = Registered(cls, distribution)


def _selected(found: list[metadata.EntryPoint]) -> Iterator[metadata.EntryPoint]:
    everything = "ODSORA_PLUGINS" not in os.environ
    wanted = _wanted(os.environ)
    for entry in found:
        if everything or _distribution(entry) == BUILTIN_DISTRIBUTION or entry.name in wanted:
            yield entry


def _wanted(environment: Mapping[str, str]) -> set[str]:
    names = environment.get("ODSORA_PLUGINS", "").split(",")
    return {name.strip() for name in names if name.strip()}


def _checked(item: Any) -> type[Pass]:
    """`item`, or TypeError when it is no pass class: one with a name, options and `run`."""
    name = getattr(item, "name", None)
    if not isinstance(item, type) or not callable(getattr(item, "run", None)):
        raise TypeError(f"odsora_passes returned {item!r}, which is no pass class")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise TypeError(f"pass class {item.__name__} has no usable name: {name!r}")
    waiting = any(isinstance(value, dataclasses.Field) for value in vars(item).values())
    settings = getattr(item, "__dataclass_params__", None)
    if waiting or (settings is not None and not settings.frozen):
        raise TypeError(f"pass class {item.__name__} has options, but no @dataclass(frozen=True)")
    checked: type[Pass] = item
    return checked


def _distribution(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
