"""Runs many small jobs in child processes that may crash or hang, and loses none: a crash is that job's result.

Each worker is a process that serves job after job (imports are paid once); when it dies or takes too long, it is
replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Ending = Literal["returned", "raised", "crash", "timeout"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: what it returned, or words about how it failed."""

    ending: Ending
    value: Any
    seconds: float


def run_jobs(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """`function` of every job, in the jobs' order; `function` and jobs must be picklable, `seconds` bounds each job."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    outcomes: list[Outcome | None] = [None] * len(jobs)
    failures: list[Exception] = []

    def serve() -> None:
        worker = _Worker(function)
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                outcomes[index] = worker.run(jobs[index], seconds)
                if progress:
                    progress(sum(outcome is not None for outcome in outcomes), len(jobs))
        except Exception as error:  # told to the caller below: a thread's own exception would be lost
            failures.append(error)
        finally:
            worker.stop()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    _in_turn(threads)
    if failures:
        raise failures[0]
    return [outcome for outcome in outcomes if outcome is not None]


def _in_turn(threads: Iterable[threading.Thread]) -> None:
    started = list(threads)
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


class _Worker:
    """One process at a time; its standard error goes to a file, to be read when it crashes."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        handle, name = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        self.errors = Path(name)

    def run(self, job: Any, seconds: float) -> Outcome:
        if self.process is None or not self.process.is_alive():
            self._start()
        assert self.connection is not None
        begin = time.monotonic()
        try:
            self.connection.send(job)
            if not self.connection.poll(seconds):
                self._end()
                return Outcome("timeout", f"stopped after {seconds:g} s", time.monotonic() - begin)
            ending, value = self.connection.recv()
        except (EOFError, OSError):
            return Outcome("crash", self._last_words(), time.monotonic() - begin)
        return Outcome(ending, value, time.monotonic() - begin)

    def _start(self) -> None:
        self._end()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.errors.write_text("")
        self.process = context.Process(target=_serve, args=(self.function, theirs, str(self.errors)), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(120):
            raise RuntimeError("a worker process did not start within 120 s")
        with contextlib.suppress(EOFError):
            self.connection.recv()

    def _last_words(self) -> str:
        assert self.process is not None
        self.process.join(10)
        code = self.process.exitcode
        lines = [line for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        self._end()
        return f"ended with {code}: {lines[-1][:300] if lines else 'no message'}"

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None

    def stop(self) -> None:
        self._end()
        self.errors.unlink(missing_ok=True)


def _serve(function: Callable[[Any], Any], connection: Connection, errors: str) -> None:
    """The worker's loop: one job in, one result out, until the other end closes."""
    target = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 2)
    os.dup2(target, 1)
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("returned", function(job)))
        except Exception as error:  # whatever a job raises is its result
            connection.send(("raised", f"{type(error).__name__}: {error}"))
