"""A function in a child process: its result, and what is said of every way in which it can fail."""

from __future__ import annotations

import ctypes
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.pipeline.isolation import IsolationError, Limits, run_isolated

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc, or needs RLIMIT_AS")


def test_the_result_of_the_function_comes_back() -> None:
    assert run_isolated(operator.concat, b"large" * 1_000_000, b"!") == b"large" * 1_000_000 + b"!"


def test_what_the_function_prints_is_not_taken_for_its_result() -> None:
    assert run_isolated(print, "noise on standard output") is None


def test_a_crash_is_told_with_its_signal() -> None:
    with pytest.raises(IsolationError, match=r"string_at crashed with SIGSEGV") as caught:
        run_isolated(ctypes.string_at, 0)
    assert caught.value.cause == "crash"


def test_an_exit_is_told_with_its_code() -> None:
    with pytest.raises(IsolationError, match="exit code 3") as caught:
        run_isolated(os._exit, 3)
    assert caught.value.cause == "crash"


def test_a_function_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(IsolationError, match=r"stopped after 0\.5 s") as caught:
        run_isolated(time.sleep, 60, limits=Limits(seconds=0.5))
    assert caught.value.cause == "timeout"


@LINUX
def test_a_function_that_takes_too_much_memory_is_stopped() -> None:
    with pytest.raises(IsolationError, match=r"ran out of memory \(limit: 1 GiB\)") as caught:
        run_isolated(bytearray, 3 << 30, limits=Limits(memory=1 << 30))
    assert caught.value.cause == "memory"


def test_an_exception_is_told_with_its_kind() -> None:
    with pytest.raises(IsolationError, match="ValueError: invalid literal") as caught:
        run_isolated(int, "seven")
    assert caught.value.cause == "error"


def test_an_error_of_edgeship_arrives_as_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        run_isolated(load_onnx, tmp_path / "missing.onnx")


def test_a_failure_counts_as_a_failed_stage() -> None:
    with pytest.raises(StageError):
        run_isolated(os._exit, 1)


@LINUX
def test_an_interrupted_parent_leaves_no_child() -> None:
    code = "import time; from edgeship.pipeline.isolation import run_isolated; run_isolated(time.sleep, 60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    children = _children_of(parent.pid)
    parent.send_signal(signal.SIGINT)
    parent.wait(30)
    _wait_until_gone(children)


@LINUX
def test_a_killed_parent_leaves_no_child() -> None:
    code = "import time; from edgeship.pipeline.isolation import run_isolated; run_isolated(time.sleep, 60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    children = _children_of(parent.pid)
    parent.kill()
    parent.wait(30)
    _wait_until_gone(children)


def _children_of(pid: int) -> list[int]:
    """The children, once there is one that sleeps in the function: it holds no more than it has read."""
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    for _ in range(3000):
        children = [int(child) for child in listing.read_text().split()]
        if children and all(_sleeps(child) for child in children):
            return children
        time.sleep(0.01)
    raise AssertionError("the parent started no child")


def _sleeps(pid: int) -> bool:
    try:
        return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text() or _limited(pid)
    except OSError:
        return False


def _limited(pid: int) -> bool:
    """Whether the child has set its memory limit, which is the last thing before it calls the function."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return any(line.startswith("Max address space") and "unlimited" not in line.split()[3] for line in lines)


def _wait_until_gone(pids: list[int]) -> None:
    for _ in range(1000):
        if not any(Path(f"/proc/{pid}").exists() and "State:\tZ" not in _status(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"{pids} still run")


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "State:\tZ"
