"""The pipeline text: `tdtm{steps=15 sites=spatial,temporal},cidl{budget=256MB}`.

Pass options stand in braces, separated by spaces; list values by commas. Values may be quoted with
double quotes when they hold spaces, commas or braces. Printing gives back what was parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from odsora_compiler.errors import UsageError

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s{}"]+')


@dataclass(frozen=True)
class PassText:
    """One pass as written: its name and options in order, values unquoted."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return self.name + "{" + " ".join(f"{key}={_quote(v)}" for key, v in self.options) + "}"


def parse_pipeline(text: str) -> tuple[PassText, ...]:
    """Split pipeline text into passes. Raises `UsageError` with the place of a mistake."""
    passes: list[PassText] = []
    position = _skip(text, 0)
    while position < len(text):
        name, position = _match(_NAME, text, position, "a pass name")
        options: list[tuple[str, str]] = []
        position = _skip(text, position)
        if text[position : position + 1] == "{":
            options, position = _options(text, position + 1, name)
        passes.append(PassText(name, tuple(options)))
        position = _skip(text, position)
        if position == len(text):
            break
        if text[position] != ",":
            raise _mistake(text, position, "',' between passes")
        position = _skip(text, position + 1)
        if position == len(text):
            raise _mistake(text, position, "a pass after ','")
    return tuple(passes)


def print_pipeline(passes: tuple[PassText, ...]) -> str:
    """The text of a pipeline."""
    return ",".join(str(item) for item in passes)


def _options(text: str, position: int, name: str) -> tuple[list[tuple[str, str]], int]:
    options: list[tuple[str, str]] = []
    while True:
        position = _skip(text, position)
        if text[position : position + 1] == "}":
            return options, position + 1
        if position == len(text):
            raise _mistake(text, position, f"'}}' to close the options of '{name}'")
        key, position = _match(_NAME, text, position, "an option name or '}'")
        if text[position : position + 1] != "=":
            raise _mistake(text, position, f"'=' after option '{key}'")
        value, position = _match(_VALUE, text, position + 1, f"a value for option '{key}'")
        if any(key == earlier for earlier, _ in options):
            raise UsageError(f"passes '{text}': option '{key}' of '{name}' is given twice")
        options.append((key, _unquote(value)))


def _match(pattern: re.Pattern[str], text: str, position: int, what: str) -> tuple[str, int]:
    found = pattern.match(text, position)
    if not found:
        raise _mistake(text, position, what)
    return found[0], found.end()


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _mistake(text: str, position: int, expected: str) -> UsageError:
    return UsageError(
        f"passes '{text}': expected {expected} at position {position + 1}",
        "Write passes like tdtm{steps=15 sites=spatial,temporal},cidl{budget=256MB}",
    )


def _quote(value: str) -> str:
    if value and _VALUE.fullmatch(value) and not value.startswith('"'):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _unquote(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
