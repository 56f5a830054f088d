"""Returns failures a person can act on: every error edgeship raises on purpose, each with its exit code.

The kinds live in the lowest package because every layer raises them; `pipeline.cli` is the only place that turns one
into an exit code and a sentence on stderr.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        super().__init__("\n".join([message, *(f"  - {finding}" for finding in self.findings)]))

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, tuple[Finding, ...]]]:
        return type(self), (self.message, self.findings)  # it crosses process borders with its findings


class GateError(EdgeshipError):
    """A gate of the recipe was not met: artifacts are kept, the release is not made."""

    exit_code: ClassVar[int] = 3
