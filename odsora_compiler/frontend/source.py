"""Lines of the user's code: which files are theirs, and how a line is named in messages."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep
_COMPILER = str(Path(__file__).parents[1]) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def is_torch(filename: str) -> bool:
    """Whether the file is PyTorch's own."""
    return filename.startswith(_TORCH)


@functools.lru_cache(maxsize=4096)
def is_model_code(filename: str) -> bool:
    """Whether the file is the user's or that of a library of models."""
    if filename.startswith((_TORCH, _COMPILER, "<")):
        return False
    return not filename.startswith(_STDLIB) or _is_library(filename)


def line_name(filename: str, line: int | str | None, where: str) -> str:
    """`"stdit3.py:120 in forward"`."""
    return f"{Path(filename).name}:{line} in {where}"


def running_line() -> str:
    """The innermost line of model code that is being executed, or `""`."""
    frame = sys._getframe(1)
    while frame is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    return line_name(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def running_place() -> str:
    """`running_line` for a message: where that is a library's, also the user's line calling it."""
    frames = []
    frame = sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return _place(frames)


def failing_line(error: BaseException) -> str:
    """The innermost line of model code that the error came through, with its text, or `""`.

    Where that is a library's, also the user's line calling it.
    """
    frames = [
        (frame.filename, frame.lineno, f"{frame.name}: `{frame.line}`")
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return _place(frames[::-1])


def _place(frames: Iterable[tuple[str, int | None, str]]) -> str:
    """Of frames, the innermost first."""
    found: list[str] = []
    for filename, line, where in frames:
        if is_model_code(filename) and not (found and _is_library(filename)):
            found.append(line_name(filename, line, where))
            if not _is_library(filename):
                break
    return ", called at ".join(found)


def _is_library(filename: str) -> bool:
    return "site-packages" in filename
