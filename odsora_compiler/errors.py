"""The family of errors: each names the thing that was wrong and says what to do about it.

The command-line tools print these without a traceback. `WorkError`s end with exit code 1 (the work
failed), `UsageError`s with exit code 2 (the command was wrong).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OdsoraError(Exception):
    """Base of every error this project raises on purpose.

    `message` says what was wrong with which file, node or option; `hint` what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(OdsoraError):
    """The command, an option or a name in it was wrong; nothing was started."""

    exit_code = 2


class CaptureError(OdsoraError):
    """A model file could not be loaded or its model could not be traced."""


class WeightsError(OdsoraError):
    """A weights file is missing, truncated, or does not fit the model."""


class VerificationError(OdsoraError):
    """A program, chunk or output is not what it was declared to be."""


class PassError(OdsoraError):
    """A pass failed or did not keep what it declared."""


class PluginError(OdsoraError):
    """Plugins contradict each other."""


class LoweringError(OdsoraError):
    """A function could not be converted to a Core ML package."""


class PackageError(OdsoraError):
    """A saved package or bundle is damaged, incomplete or of an unknown version."""


class UnsupportedOpError(PackageError):
    """The interpreter of saved packages lacks an operation."""


class RunError(OdsoraError):
    """A bundle could not be run on the given inputs."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """A sentence that suggests the names in `known` closest to `wrong`, or lists them all."""
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    return "Known names: " + (", ".join(names) if names else "none") + "."
