"""Returns failures a person can act on: every error edgeship raises on purpose, each with its exit code.

The kinds live in the lowest package because every layer raises them; `pipeline.cli` is the only place that turns one
into an exit code and a sentence on stderr.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from edgeship.calibration.types import Finding


class EdgeshipError(Exception):
    """One sentence that says what failed, where, the value seen, and what would be accepted."""

    exit_code: ClassVar[int] = 1


class InputError(EdgeshipError):
    """The command line, the recipe or an input file is wrong; nothing was written."""

    exit_code: ClassVar[int] = 2


class StageError(EdgeshipError):
    """A stage could not do its work on input that was well formed."""


class UnsupportedError(EdgeshipError):
    """A model has nodes that a target cannot take; `findings` lists all of them, found before anything was written."""

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        self.message, self.findings = message, tuple(findings)
        super().__init__(_sentence(message.rstrip(":"), self.findings))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[Finding, ...]]]:
        return type(self), (self.message, self.findings)  # it crosses process borders with its findings


def _sentence(message: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return message
    if len(findings) == 1:
        return f"{message}: {findings[0]}"
    listed = [f"  - {finding}" for finding in findings]
    return "\n".join([f"{message} for {len(findings)} reasons, first {findings[0]}", *listed])


class GateError(EdgeshipError):
    """A gate of the recipe was not met: artifacts are kept, the release is not made."""

    exit_code: ClassVar[int] = 3


def nearest(name: str, known: Iterable[str], most: int = 8) -> str:
    """The end of a sentence about an unknown `name`: what there is, or the closest of many, and what was meant."""
    import difflib

    every = sorted(known)
    close = difflib.get_close_matches(name, every, n=most, cutoff=0.5)
    listed = f"; there are: {', '.join(every)}" if len(every) <= most else ""
    if not listed:
        listed = f"; the nearest of {len(every)} are: {', '.join(close or every[:most])}"
    return listed + (f"; did you mean {close[0]!r}?" if close else "")
