"""Returns what a function computes in a child process, under limits of time and memory: crashes become errors.

The function goes to `python -m edgeship.pipeline.isolation` by name (pickle), its arguments over the child's standard
input, its result back over a pipe; no file is made and `__main__` is not imported again. The child leads a session of
its own, so that Ctrl-C reaches the parent alone, which then kills the whole group; on Linux the kernel kills it when
the parent dies.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from edgeship.calibration.errors import EdgeshipError, StageError

Result = TypeVar("Result")
Cause = Literal["crash", "timeout", "memory", "error"]
GIB = 1 << 30
_EXIT_MEMORY = 77
_OUT_OF_MEMORY = (b"bad_alloc", b"MemoryError", b"Cannot allocate memory", b"out of memory")


class IsolationError(StageError):
    """The function did not return: `cause` says whether it crashed, ran out of time or memory, or raised an error."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, cause: Cause) -> None:
        self.cause: Cause = cause
        super().__init__(message)


@dataclass(frozen=True)
class Limits:
    """The most a child may use: wall-clock seconds, and bytes of address space (not enforced on macOS and Windows)."""

    seconds: float = 300.0
    memory: int = 8 * GIB


def run_isolated(function: Callable[..., Result], *args: Any, limits: Limits | None = None) -> Result:
    """What `function(*args)` returns in a child process; function, arguments and result must be picklable.

    Raises IsolationError when the child crashes, exceeds a limit or raises; an EdgeshipError raised there arrives as
    itself.
    """
    limits = limits or Limits()
    name = f"{function.__module__}.{function.__qualname__}"
    # the function's module is looked up on the child's path: the paths come first, before anything is imported
    job = pickle.dumps((list(sys.path), limits.memory)) + pickle.dumps((function, args))
    returncode, output, errors = _communicate(job, name, limits.seconds)
    if returncode == 0:
        status, value = pickle.loads(output)  # noqa: S301  # written by our own child
        if status == "returned":
            return value  # type: ignore[no-any-return]  # the function's own result type
        if status == "edgeship" and isinstance(value, EdgeshipError):
            raise value
        raise IsolationError(f"{name} failed in its child process: {value}", "error")
    raise _explain(name, returncode, errors, limits)


def _communicate(job: bytes, name: str, seconds: float) -> tuple[int, bytes, bytes]:
    child = subprocess.Popen(  # noqa: S603  # this very interpreter and module
        [sys.executable, "-m", __spec__.name if __spec__ else __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        output, errors = child.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise IsolationError(f"{name} was stopped after {seconds:g} s, its time limit", "timeout") from None
    finally:
        _kill_group(child)
    return child.returncode, output, errors


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Leaves no process of the child's session, whatever happened."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _explain(name: str, returncode: int, errors: bytes, limits: Limits) -> IsolationError:
    tail = errors.decode(errors="replace").strip().splitlines()[-1:]
    said = f"; its last words: {tail[0][:200]}" if tail else ""
    if returncode == _EXIT_MEMORY or any(word in errors for word in _OUT_OF_MEMORY):
        return IsolationError(f"{name} ran out of memory (limit: {limits.memory / GIB:.3g} GiB)", "memory")
    if returncode == -signal.SIGKILL:
        return IsolationError(f"{name} was killed (SIGKILL), most likely by the system for want of memory", "memory")
    if returncode < 0:
        return IsolationError(f"{name} crashed with {signal.Signals(-returncode).name}{said}", "crash")
    return IsolationError(f"{name} ended its process with exit code {returncode}{said}", "crash")


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies (prctl(2), PR_SET_PDEATHSIG = 1)."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def _child() -> int:
    die_with_parent()
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the function prints is noise, not its result
    paths, memory = pickle.load(sys.stdin.buffer)  # noqa: S301  # written by our own parent
    sys.path[:] = paths
    _limit_memory(memory)
    try:
        function, args = pickle.load(sys.stdin.buffer)  # noqa: S301  # written by our own parent
        answer: tuple[str, Any] = ("returned", function(*args))
        content = pickle.dumps(answer)
    except MemoryError:
        return _EXIT_MEMORY
    except EdgeshipError as error:
        content = pickle.dumps((type(error).__name__, str(error)))
        with contextlib.suppress(Exception):  # an error that does not survive pickling is told in words
            whole = pickle.dumps(("edgeship", error))
            pickle.loads(whole)  # noqa: S301  # written on the line above
            content = whole
    except Exception as error:  # whatever a foreign library raises is told to the parent
        content = pickle.dumps(("raised", f"{type(error).__name__}: {error}"))
    results.write(content)
    results.close()
    return 0


if __name__ == "__main__":
    code = _child()
    sys.stderr.flush()
    os._exit(code)  # a native library's exit handlers may crash after the work is done
