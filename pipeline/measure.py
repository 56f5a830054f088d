"""Returns latency: each artifact alone in its own process, all of them in turns on an otherwise idle machine.

Two runtimes in one process ruin each other's times, and times taken one artifact after the other compare two states of
the machine. So every artifact gets a worker process, the workers run in turns (A B A B ...), and a worker whose turn it
is not is stopped, so that its threads cannot spin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array

TURNS = 10
SETTLE = 2
"""Inferences at the start of each turn that are not counted: the caches are the other artifact's."""
LOAD_SECONDS = 120.0
TURN_SECONDS = 600.0
NOISY = 0.10


@dataclass(frozen=True)
class Measurement:
    """Times of one artifact, in the order they were taken, and the circumstances; figures are properties."""

    nanoseconds: tuple[int, ...]
    warmup: int
    threads: int
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """How many inferences were timed."""
        return len(self.nanoseconds)

    def percentile(self, percent: float) -> float:
        """Milliseconds that `percent` of the inferences stay below, linearly interpolated."""
        return float(np.percentile(np.asarray(self.nanoseconds, np.float64), percent)) / 1e6

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        """The 90th percentile in milliseconds."""
        return self.percentile(90)

    @property
    def iqr_ms(self) -> float:
        """The interquartile range in milliseconds."""
        return self.percentile(75) - self.percentile(25)

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range exceeds a tenth of the median: something else was running."""
        return self.iqr_ms > NOISY * self.median_ms

    def to_json(self) -> dict[str, Any]:
        """The figures and the raw times as plain values."""
        return {
            "median_ms": round(self.median_ms, 4),
            "p90_ms": round(self.p90_ms, 4),
            "iqr_ms": round(self.iqr_ms, 4),
            "noisy": self.noisy,
            "runs": self.runs,
            "warmup": self.warmup,
            "threads": self.threads,
            "nanoseconds": list(self.nanoseconds),
        }


@dataclass(frozen=True)
class Subject:
    """An artifact to measure and the target whose runtime opens it."""

    target: str
    artifact: Path

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.target}: {self.artifact.name}"


@dataclass(frozen=True)
class Schedule:
    """How to measure: threads of each runtime, timed inferences of each artifact, and warm-up before them."""

    threads: int = 1
    runs: int = 200
    warmup: int = 20

    def turns(self) -> Iterator[int]:
        """The number of timed inferences of each turn; they add up to `runs`."""
        turns = min(TURNS, self.runs)
        for turn in range(turns):
            yield self.runs * (turn + 1) // turns - self.runs * turn // turns


Runner = Callable[[int], Sequence[int]]
"""Runs this many inferences and returns the nanoseconds each took."""


def in_turns(
    runners: Sequence[Runner], schedule: Schedule, progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, ...]]:
    """The times of each runner, taken in turns after a warm-up of each."""
    for runner in runners:
        if schedule.warmup:
            runner(schedule.warmup)
    times: list[list[int]] = [[] for _ in runners]
    for count in schedule.turns():
        for runner, taken in zip(runners, times, strict=True):
            taken.extend(runner(SETTLE + count)[SETTLE:])
            if progress:
                progress(sum(map(len, times)), schedule.runs * len(runners))
    return [tuple(taken) for taken in times]


def measure(
    subjects: Sequence[Subject],
    feeds: Mapping[str, Array] | None,
    schedule: Schedule,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """The latency of each subject on `feeds` (None: seeded random values), each in its own process, in turns.

    Raises InputError for an artifact that cannot be loaded, StageError when a worker dies, fails or takes too long.
    """
    from edgeship.pipeline.machine import machine_facts

    machine = machine_facts()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(subject, feeds, schedule.threads)) for subject in subjects]
        times = in_turns([worker.run for worker in workers], schedule, progress)
    return [Measurement(taken, schedule.warmup, schedule.threads, machine) for taken in times]


class Worker:
    """A child process with one artifact loaded in its runtime; it stands still except in its turn."""

    def __init__(self, subject: Subject, feeds: Mapping[str, Array] | None, threads: int) -> None:
        self._subject = subject
        self._threads = threads
        self._payload = _npz(feeds or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in _end; a pipe nobody reads could fill up

    def __enter__(self) -> Worker:
        command = [sys.executable, "-m", "edgeship.pipeline.measure_worker"]
        self._process = subprocess.Popen(  # noqa: S603  # our own module, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            # not the terminal's group, so that Ctrl-C reaches the parent alone; but in its session, so that the system
            # wakes (SIGCONT) and ends (SIGHUP) a stopped worker whose parent was killed
            process_group=0 if os.name == "posix" else None,
        )
        try:
            header = {
                "target": self._subject.target,
                "artifact": str(self._subject.artifact),
                "threads": self._threads,
                "bytes": len(self._payload),
            }
            self._ask(json.dumps(header).encode() + b"\n" + self._payload, LOAD_SECONDS)
            self._signal("SIGSTOP")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, count: int) -> Sequence[int]:
        """Nanoseconds of each of `count` inferences."""
        self._signal("SIGCONT")
        answer = self._ask(f"{count}\n".encode(), TURN_SECONDS)
        self._signal("SIGSTOP")
        return cast(list[int], answer["nanoseconds"])

    def _ask(self, message: bytes, seconds: float) -> dict[str, Any]:
        process = self._running()
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says more
            process.stdin.write(message)  # type: ignore[union-attr]  # opened as a pipe
            process.stdin.flush()  # type: ignore[union-attr]  # opened as a pipe
        line = self._read_line(time.monotonic() + seconds, seconds)
        answer = cast(dict[str, Any], json.loads(line))
        if "error" in answer:
            kind = InputError if answer.get("input") else StageError
            raise kind(f"{self._subject.label} cannot be measured: {answer['error']}")
        return answer

    def _read_line(self, deadline: float, seconds: float) -> bytes:
        pipe = cast(io.BufferedReader, self._running().stdout)
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise StageError(f"{self._subject.label} gave no answer within {seconds:.0f} s; it was stopped")
                part = os.read(pipe.fileno(), 1 << 20)
                if not part:
                    raise StageError(f"{self._subject.label}: its process died {self._last_words()}")
                line += part
        return line

    def _last_words(self) -> str:
        process = self._running()
        code = process.wait(timeout=10)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        how = f"of signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{how}{': ' + said[-1] if said else ''}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the worker is used as a context manager")
        return self._process

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)  # not on Windows, where idle threads of a runtime may spin for a moment
        process = self._running()
        if number is not None and process.poll() is None:
            process.send_signal(number)

    def _end(self) -> None:
        process = self._running()
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, self._said):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _npz(feeds: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **dict(feeds))
    return buffer.getvalue()
