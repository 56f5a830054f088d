"""Returns an artifact as C source, for targets that also run where there are no files."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from edgeship.calibration.errors import InputError
from edgeship.targets.base import Target


class CSource(Protocol):
    """A C file and its header."""

    @property
    def source(self) -> str:
        """The array's definition."""

    @property
    def header(self) -> str:
        """Its declaration."""


@runtime_checkable
class InC(Protocol):
    """What a target has that can be compiled in."""

    def c_source(self, content: bytes, name: str) -> CSource:
        """The artifact as C. Raises UnsupportedError with what keeps it from running there."""


def c_source(target: Target, content: bytes, name: str) -> CSource:
    """The artifact of `target` as C, its array and header called after `name`. Raises InputError for other targets."""
    found: Any = target
    if not isinstance(found, InC):
        raise InputError(f"target {target.name} has no form in C; accepted: tflite, for TensorFlow Lite Micro")
    return found.c_source(content, name)
