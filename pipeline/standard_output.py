"""Returns a stretch of time in which nothing reaches the process's standard output, not even from C++.

`contextlib.redirect_stdout` replaces the Python object only; libraries written in C++ write to file descriptor 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_DESCRIPTOR = 1
_lock = threading.Lock()
_inside = 0
_kept: int | None = None


@contextlib.contextmanager
def closed_output() -> Iterator[None]:
    """What is written to file descriptor 1 meanwhile is dropped; what came before and comes after arrives.

    Several threads may be inside: the descriptor comes back with the last one. Standard error stays as it is.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _kept  # noqa: PLW0603 - the descriptor belongs to the process
    with _lock:
        if not _inside:
            _flush()
            try:
                _kept = os.dup(_DESCRIPTOR)
            except OSError:  # the process was started without a standard output
                _kept = None
            else:
                _onto_nothing()
        _inside += 1


def _leave() -> None:
    global _inside, _kept  # noqa: PLW0603 - the descriptor belongs to the process
    with _lock:
        _inside -= 1
        if _inside or _kept is None:
            return
        _flush()  # C keeps what it has written until its buffer is full
        os.dup2(_kept, _DESCRIPTOR)
        os.close(_kept)
        _kept = None


def _onto_nothing() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, _DESCRIPTOR)
    os.close(nothing)


def _flush() -> None:
    """Empties Python's buffers and C's."""
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed pipe or stream has nothing to lose
                stream.flush()
    ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
