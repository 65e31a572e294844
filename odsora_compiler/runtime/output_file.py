"""A file that a run writes: checked before anything is computed, complete or untouched after it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from odsora_compiler.errors import RunError, UsageError


def check_output_file(path: Path, force: bool) -> None:
    """Raise `UsageError` when no file can be written at `path`, or one is there and not `force`."""
    folder = path.absolute().parent
    # Not by Path, whose questions raise where a name is too long; touch below says so.
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder", "Create it, or choose another place.")
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder", "Name a file.")
    if os.path.exists(path) and not force:
        raise UsageError(f"{path} exists", "Give --force to replace it, or choose another place.")
    partial = _partial(path)
    try:
        # Asked of the file system itself: permissions alone do not tell of read-only disks.
        try:
            partial.touch()
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror})", "Choose another place."
        ) from error


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends well, else it goes.

    Raises `RunError` where the file system refuses.
    """
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk of {path.absolute().parent} is full",
                "Free some space or choose another place; nothing was left there.",
            ) from error
        raise RunError(
            f"{path} cannot be written ({error.strerror or error})", "Choose another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Of this process alone, so that two runs do not write into one file."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
