"""Loading a model file and calling its `build`. This runs the file's code."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import itertools
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from odsora_compiler.errors import CaptureError, UsageError, nearest
from odsora_compiler.frontend.spec import ModelSpec, PipelineSpec

_COUNTER = itertools.count()


def load_build(path: Path) -> Callable[..., Any]:
    """Run the model file and return its `build`.

    The file's folder is importable while it and `build` run, so that they can import its
    neighbours. Raises `UsageError` when the file is missing or has no `build`, `CaptureError` when
    it raises.
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
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CaptureError(f"{path}: the model file raised {_describe(error, path)}") from error
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
    hints = _hints(build)
    return {
        name: _convert(name, text, hints.get(name), parameters) for name, text in settings.items()
    }


def call_build(
    build: Callable[..., Any], options: Mapping[str, Any], path: Path
) -> ModelSpec | PipelineSpec:
    """Call `build(**options)`; raises naming the option or the line at fault."""
    parameters = _parameters(build)
    if parameters is not None:
        for name in options:
            if name not in parameters:
                raise UsageError(
                    f"{path}: build() has no option '{name}'", nearest(name, parameters)
                )
    required = [
        name
        for name, parameter in (parameters or {}).items()
        if parameter.default is parameter.empty and name not in options
    ]
    if required:
        raise UsageError(
            f"{path}: build() needs a value for {', '.join(required)}",
            " ".join(f"--set {name}=…" for name in required),
        )
    try:
        with _importable(path.parent):
            spec = build(**options)
    except (Exception, SystemExit) as error:
        raise CaptureError(f"{path}: build() raised {_describe(error, path)}") from error
    if not isinstance(spec, ModelSpec | PipelineSpec):
        raise CaptureError(
            f"{path}: build() returned {type(spec).__name__}, not a ModelSpec",
            "Return odsora_compiler.ModelSpec(module, inputs, axes), or a PipelineSpec.",
        )
    return spec


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


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


def _hints(build: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters; those written with names only a type checker has are left out."""
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(build).parameters.items():
        if isinstance(parameter.annotation, str):
            with contextlib.suppress(NameError):
                hints[name] = eval(parameter.annotation, getattr(build, "__globals__", {}))
        elif parameter.annotation is not parameter.empty:
            hints[name] = parameter.annotation
    return hints


def _convert(
    name: str, text: str, hint: Any, parameters: Mapping[str, inspect.Parameter] | None
) -> Any:
    if parameters is not None and name not in parameters:
        raise UsageError(f"build() has no option '{name}'", nearest(name, parameters))
    default = None if parameters is None else parameters[name].default
    if hint is None and type(default) in _PLAIN:
        hint = type(default)
    try:
        return _typed(text, hint)
    except (ValueError, SyntaxError, TypeError) as error:
        raise UsageError(
            f"option '{name}' of build() takes {_type_name(hint)}, not '{text}'",
            f"For example --set {name}={_example(hint, default)}",
        ) from error


_PLAIN = {bool: "true", int: "1", float: "0.5", str: "name"}


def _typed(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`; None, or a type not known here: as a Python literal.

    Raises ValueError when it is no such value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _first_that_fits(text, arguments)
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in arguments}
        if text not in choices:
            raise ValueError(nearest(text, choices))
        return choices[text]
    if hint is type(None):
        if text.lower() != "none":
            raise ValueError("not none")
        return None
    if hint is str:
        return text
    if hint is Path:
        return Path(text)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("not true or false")
        return text.lower() == "true"
    if hint in (int, float):
        return hint(text)
    if (origin or hint) in (tuple, list):
        inner = text.strip().strip("()[]")
        items = [item.strip() for item in inner.split(",") if item.strip()]
        if origin is tuple and Ellipsis not in arguments:
            return tuple(_typed(item, kind) for item, kind in zip(items, arguments, strict=True))
        return (origin or hint)(_typed(item, arguments[0] if arguments else None) for item in items)
    try:
        return ast.literal_eval(_PYTHON_WORDS.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


_PYTHON_WORDS = {"true": "True", "false": "False", "none": "None"}


def _first_that_fits(text: str, hints: tuple[Any, ...]) -> Any:
    # None first, so that "none" is no word; strings last, because any text is one.
    for hint in sorted(hints, key=lambda item: (item is not type(None), item is str)):
        try:
            return _typed(text, hint)
        except ValueError:
            continue
    raise ValueError("fits none of the types")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _example(hint: Any, default: Any) -> str:
    if default is None or default is inspect.Parameter.empty:
        inner = next((item for item in typing.get_args(hint) or (hint,) if item in _PLAIN), int)
        return _PLAIN[inner]
    if isinstance(default, (tuple, list)):
        return ",".join(map(str, default))
    return str(default)


def _describe(error: BaseException, path: Path) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    at = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{at}"
