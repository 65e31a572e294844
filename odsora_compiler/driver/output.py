"""The output path of a compile: checked before the work, complete or untouched after it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
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
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such folder", "Create it, or choose another -o.")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not writable", "Choose another -o.")


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and goes otherwise."""
    check_output(out, force)
    out = out.absolute()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise UsageError(
            f"{out.parent} is not writable ({error.strerror})", "Choose another -o."
        ) from error
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
    shutil.rmtree(old, ignore_errors=True)
