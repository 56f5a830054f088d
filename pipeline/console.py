"""Returns what a person sees of a running flow, on stderr: on a terminal a bar with the time left, else plain lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from edgeship.pipeline.flow import Events, StageResult

PATIENCE = 2.0
"""Seconds after which silence makes people wonder."""
LINE_EVERY = 10.0


class Watch(Protocol):
    """Events with a beginning and an end."""

    def __enter__(self) -> Events:
        """The events."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the terminal as it was."""


def watch() -> Watch:
    """Events for stderr as it is."""
    return TerminalWatch() if sys.stderr.isatty() else LineWatch()


def describe(result: StageResult) -> str:
    """One line about a finished stage."""
    return f"{result.name:<9} {'up to date' if result.cached else duration(result.seconds)}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


class LineWatch:
    """Plain lines for logs: when a stage begins and ends, and how far it is from time to time."""

    def __init__(self, name: str = "") -> None:
        self._stage = name
        self._begun = self._said = time.monotonic()
        self._first, self._last, self._total = 0, 0, 0

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to restore."""

    def started(self, stage: str) -> None:
        """Says which stage begins."""
        self._stage, self._begun = stage, time.monotonic()
        self._said, self._first, self._last, self._total = self._begun, 0, 0, 0
        click.echo(f"{stage} ...", err=True)

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Says how far the stage is, every ten seconds."""
        now = time.monotonic()
        if done < self._last or total != self._total:  # something else begins, or goes on where a killed run was
            self._begun, self._first, self._total = now, done, total
        self._last = done
        if now - self._said < LINE_EVERY or done <= self._first:
            return
        self._said = now
        left = (now - self._begun) / (done - self._first) * (total - done)
        click.echo(f"{self._stage}: {done} of {total} {what}, about {duration(left)} left", err=True)

    def finished(self, result: StageResult) -> None:
        """Says how long it took."""
        click.echo(describe(result), err=True)


class TerminalWatch:
    """A bar that appears when a stage takes longer than two seconds and goes when it is done."""

    def __init__(self, name: str = "") -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage = name
        self._begun = time.monotonic()

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def started(self, stage: str) -> None:
        """Remembers when the stage began."""
        self._stage, self._begun = stage, time.monotonic()
        click.echo(f"{stage} ...", err=True, nl=False)

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Moves the bar."""
        if self._bar is None:
            if time.monotonic() - self._begun < PATIENCE:
                return
            click.echo("\r\033[K", err=True, nl=False)
            self._bar = _make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=total)
        if self._task is not None:
            task = self._bar.tasks[0]
            if done < task.completed or total != task.total:  # something else begins: its speed is another
                self._bar.reset(self._task, total=total, completed=done)
            self._bar.update(self._task, completed=done, total=total, description=f"{self._stage}  {what}")

    def finished(self, result: StageResult) -> None:
        """Replaces the bar by one line."""
        self._close()
        click.echo(f"\r\033[K{describe(result)}", err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def _make_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class StepProgress:
    """Progress of a single command that has no stages, on stderr once it takes longer than two seconds."""

    def __init__(self, name: str) -> None:
        self._events = TerminalWatch(name) if sys.stderr.isatty() else LineWatch(name)

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` steps are finished."""
        self._events.progress(done, total, what)
