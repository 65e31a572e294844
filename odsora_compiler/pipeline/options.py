"""Options of passes: from pipeline text to typed dataclass fields and back."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from odsora_compiler.errors import UsageError, nearest
from odsora_compiler.pipeline.base import Pass

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


class ByteSize(int):
    """A number of bytes, written `170MB`, `1.5GB`, `64MiB` or `4096`."""

    @classmethod
    def parse(cls, text: str) -> ByteSize:
        """Raises ValueError on anything that is not a positive size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?i?B?)", text.strip())
        if not match or match[2] not in _UNITS:
            raise ValueError(f"'{text}' is not a size such as 256MB or 1.5GiB")
        size = cls(Decimal(match[1]) * _UNITS[match[2]])
        if size <= 0:
            raise ValueError("a size must be positive")
        return size

    def __str__(self) -> str:
        for unit in ("GB", "MB", "kB"):
            if self >= _UNITS[unit] and self % _UNITS[unit] == 0:
                return f"{int(self) // _UNITS[unit]}{unit}"
        return str(int(self))


def construct(cls: type[Pass], texts: Mapping[str, str], where: str) -> Pass:
    """The pass with these options; `where` is quoted in errors.

    Raises `UsageError` naming option, type and example on an unknown name or a value of the wrong
    type.
    """
    fields = option_fields(cls)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in fields:
            known = nearest(key, fields) if fields else "It takes no options."
            raise UsageError(f"{where}: pass '{cls.name}' has no option '{key}'", known)
        try:
            values[key] = _parse(text, hints[key])
        except ValueError as error:
            raise UsageError(
                f"{where}: option '{key}' of pass '{cls.name}' takes "
                f"{type_text(hints[key])}, not '{text}' ({error})",
                f"For example {cls.name}{{{key}={example(cls, key)}}}",
            ) from error
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"{where}: pass '{cls.name}': {error}") from error
    except TypeError as error:
        raise UsageError(f"{where}: pass '{cls.name}': {error}", "See --describe.") from error


def option_fields(cls: type[Pass]) -> dict[str, dataclasses.Field[Any]]:
    """Option name → dataclass field."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {item.name: item for item in dataclasses.fields(cls)}


def print_value(value: Any) -> str:
    """The text that parses back to `value`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, (tuple, list)):
        return ",".join(print_value(item) for item in value)
    return str(value)


def print_options(instance: Pass) -> dict[str, str]:
    """Options of `instance` that differ from their defaults, as texts."""
    return {
        name: print_value(getattr(instance, name))
        for name, item in option_fields(type(instance)).items()
        if getattr(instance, name) != item.default
    }


def type_text(hint: Any) -> str:
    """The type as a user would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if item is type(None) else type_text(item) for item in arguments)
    if origin is tuple:
        return f"a comma-separated list of {type_text(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(item.value) for item in hint)
    words = {int: "a whole number", float: "a number", bool: "true|false", str: "a word"}
    if hint is ByteSize:
        return "a size (256MB)"
    return words.get(hint, str(hint))


def example(cls: type[Pass], key: str) -> str:
    """A value for the option, in text."""
    default = option_fields(cls)[key].default
    if default not in (None, dataclasses.MISSING):
        return print_value(default)
    hint = typing.get_type_hints(cls)[key]
    inner = next(item for item in typing.get_args(hint) or (hint,) if item is not type(None))
    if isinstance(inner, type) and issubclass(inner, enum.Enum):
        return str(next(iter(inner)).value)
    return {int: "4", float: "0.5", bool: "true", ByteSize: "256MB"}.get(inner, "name")


def _parse(text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments and text == "none":
            return None
        (inner,) = [item for item in arguments if item is not type(None)]
        return _parse(text, inner)
    if origin is tuple:
        return tuple(_parse(item, arguments[0]) for item in text.split(",") if item)
    if hint is ByteSize:
        return ByteSize.parse(text)
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError("write true or false")
        return text == "true"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = {str(item.value): item for item in hint}
        if text not in values:
            raise ValueError(nearest(text, values).rstrip("."))
        return values[text]
    if hint in (int, float, str):
        return hint(text)
    raise ValueError(f"options of type {hint} are not supported")
