"""The output path of a compile: checked before the work, complete or untouched after it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from odsora_compiler.errors import LoweringError, UsageError

VERIFY_LEVELS = ("structure", "numeric", "full")


def check_settings(precision: str, target: str, verify: str) -> None:
    """Raise `UsageError` on a setting this release does not know."""
    for what, value, known in (
        ("precision", precision, ("fp16", "fp32")),
        ("target", target, ("iOS18",)),
        ("level of verification", verify, VERIFY_LEVELS),
    ):
        if value not in known:
            raise UsageError(f"unknown {what} '{value}'", f"Use {' or '.join(known)}.")


def check_output(out: Path, force: bool) -> None:
    """Raise `UsageError` when a bundle cannot be put at `out`."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists", "Give --force to replace it, or another -o.")
    if out.exists() and not (out / "manifest.json").is_file():
        raise UsageError(
            f"{out} exists and is not a bundle", "It is not replaced; choose another -o."
        )
    if out.is_symlink() and not out.exists():
        raise UsageError(f"{out} is a link to nothing", "Remove it, or choose another -o.")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such folder", "Create it, or choose another -o.")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not writable", "Choose another -o.")


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and goes otherwise.

    What a killed process left there is removed.
    """
    check_output(out, force)
    out = out.absolute()
    _sweep(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UsageError(
            f"{out.parent} is not writable ({error.strerror})", "Choose another -o."
        ) from error
    lock = _lock(folder)
    try:
        folder.chmod(0o755)
        yield folder
        _put(folder, out, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoweringError(
                f"the disk of {out.parent} is full",
                "Free some space or choose another -o; nothing was left there.",
            ) from error
        raise LoweringError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(out: Path) -> None:
    """Remove folders for `out` whose processes ended without doing so (killed, power lost)."""
    for folder in out.parent.iterdir():
        if not (folder.name.startswith(f".{out.name}.") and folder.name.endswith(".partial")):
            continue
        lock = _lock(folder)
        if lock is None:
            continue
        # A folder that was just made may not have been locked yet.
        if time.time() - folder.stat().st_mtime > _SECONDS_TO_LOCK:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


_SECONDS_TO_LOCK = 60


def _lock(folder: Path) -> int | None:
    """Hold `folder` until the number is closed or the process ends; None where another holds it."""
    number = None
    try:
        number = os.open(folder, os.O_RDONLY)
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # Also where the file system has no locks, or the folder is gone already.
        if number is not None:
            os.close(number)
        return None
    return number


def _put(folder: Path, out: Path, force: bool) -> None:
    if not out.exists():
        folder.rename(out)
        return
    if not force:
        raise UsageError(f"{out} came into being meanwhile", "Give --force to replace it.")
    old = folder.with_suffix(".old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)
