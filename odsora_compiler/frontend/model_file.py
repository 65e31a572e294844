"""Loading a model file and calling its `build`. This runs the file's code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from odsora_compiler.errors import CaptureError, UsageError, nearest
from odsora_compiler.frontend.spec import ModelSpec

_COUNTER = itertools.count()


def load_build(path: Path) -> Callable[..., Any]:
    """Run the model file and return its `build`.

    The file's folder is importable while it runs, so that it can import its neighbours. Raises
    `UsageError` when the file is missing or has no `build`, `CaptureError` when it raises.
    """
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(
            f"{path}: no such model file",
            nearest(path.name, siblings) if siblings else "MODEL is a .py file or a saved program.",
        )
    name = f"_odsora_model_{next(_COUNTER)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file", "MODEL is a .py file or a saved program.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CaptureError(f"{path}: the model file raised {_describe(error, path)}") from error
    finally:
        sys.path.remove(folder)
    build = getattr(module, "build", None)
    if not callable(build):
        raise UsageError(
            f"{path}: the file has no function 'build'",
            "Define build(**options) that returns odsora_compiler.ModelSpec(module, inputs, axes).",
        )
    checked: Callable[..., Any] = build
    return checked


def parse_options(build: Callable[..., Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Turn the texts of `--set name=value` into values of the types that `build` declares."""
    parameters = _parameters(build)
    hints = typing.get_type_hints(build) if parameters else {}
    return {
        name: _convert(name, text, hints.get(name), parameters) for name, text in settings.items()
    }


def call_build(build: Callable[..., Any], options: Mapping[str, Any], path: Path) -> ModelSpec:
    """Call `build(**options)`; raises naming the option or the line at fault."""
    parameters = _parameters(build)
    if parameters is not None:
        for name in options:
            if name not in parameters:
                raise UsageError(
                    f"{path}: build() has no option '{name}'", nearest(name, parameters)
                )
    try:
        spec = build(**options)
    except Exception as error:
        raise CaptureError(f"{path}: build() raised {_describe(error, path)}") from error
    if not isinstance(spec, ModelSpec):
        raise CaptureError(
            f"{path}: build() returned {type(spec).__name__}, not a ModelSpec",
            "Return odsora_compiler.ModelSpec(module, inputs, axes).",
        )
    return spec


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The options `build` names; None when it takes any (`**options` with nothing named)."""
    parameters = inspect.signature(build).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return None if takes_any else named


def _convert(
    name: str, text: str, hint: Any, parameters: Mapping[str, inspect.Parameter] | None
) -> Any:
    if parameters is not None and name not in parameters:
        raise UsageError(f"build() has no option '{name}'", nearest(name, parameters))
    value: Any = text
    if hint is not str:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
        except (ValueError, SyntaxError):
            value = text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    allowed = tuple(t for t in typing.get_args(hint) or (hint,) if isinstance(t, type))
    if typing.get_origin(hint) in (tuple, list) and isinstance(value, (tuple, list)):
        return typing.get_origin(hint)(value)
    fits = not allowed or isinstance(value, allowed)
    if fits and isinstance(value, bool) and allowed and bool not in allowed:
        fits = False
    if not fits:
        raise UsageError(
            f"option '{name}' of build() takes {_type_name(hint)}, not '{text}'",
            f"For example --set {name}={_example(parameters, name)}",
        )
    return value


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _example(parameters: Mapping[str, inspect.Parameter] | None, name: str) -> str:
    if parameters is None or parameters[name].default is inspect.Parameter.empty:
        return "1"
    return str(parameters[name].default)


def _describe(error: Exception, path: Path) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == path.name
    ]
    at = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{at}"
