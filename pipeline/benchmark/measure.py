"""Returns latency: each artifact alone in its own process, all of them in turns on an otherwise idle machine.

Two runtimes in one process ruin each other's times, and times taken one artifact after the other compare two states of
the machine. So every artifact gets a worker process, and the workers run in short rounds (A B A B ...). The whole is
done in a few launches, each with fresh processes, because the same code in another process is up to a percent faster or
slower.

Before its first round a worker runs until it no longer gets faster: blocks of `warmup` inferences, until a block's
median is not more than 2 % below the fastest block before it, and at most `MOST_BLOCKS` of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from edgeship.calibration.types import Array
from edgeship.pipeline.benchmark.statistics import Measurement
from edgeship.pipeline.devices.base import Device
from edgeship.pipeline.devices.host import HostDevice
from edgeship.pipeline.devices.worker import Subject, Worker
from edgeship.targets.base import BorderSession, load

ROUNDS = 60
"""Rounds in all launches together: enough for the bootstrap, and each short enough to see one state of the machine."""
LAUNCH_RUNS = 20
"""The fewest timed inferences for which another launch is worth the time it takes."""
SETTLE = 2
"""Inferences at the start of each turn that are not counted: the caches are the other artifact's."""
STEADY = 0.02
MOST_BLOCKS = 10


@dataclass(frozen=True)
class Schedule:
    """How to measure: timed inferences of each artifact, the least warm-up, and launches they are spread over."""

    runs: int = 200
    warmup: int = 20
    launches: int = 5

    def rounds(self) -> list[list[int]]:
        """For each launch the number of timed inferences in each of its rounds; together they are `runs`."""
        launches = max(1, min(self.launches, self.runs // LAUNCH_RUNS))
        each = max(1, min(self.runs, ROUNDS) // launches)
        total = launches * each
        counts = [self.runs * (place + 1) // total - self.runs * place // total for place in range(total)]
        return [counts[launch * each : (launch + 1) * each] for launch in range(launches)]


Runner = Callable[[int], Sequence[int]]
"""Runs this many inferences and returns the nanoseconds each took."""


@dataclass
class Record:
    """What is gathered of one subject over the launches."""

    nanoseconds: list[int] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    idle_bytes: list[int] = field(default_factory=list)
    warmup: int = 0
    settled: bool = True


def warm_up(runner: Runner, least: int) -> tuple[int, bool]:
    """How many inferences ran until the runner no longer got faster, and whether that was reached; none for 0."""
    if not least:
        return 0, True
    fastest = float(median(runner(least)))
    for block in range(2, MOST_BLOCKS + 1):
        latest = float(median(runner(least)))
        if latest >= (1 - STEADY) * fastest:
            return block * least, True
        fastest = latest
    return MOST_BLOCKS * least, False


def in_turns(
    runners: Sequence[Runner], rounds: Sequence[int], progress: Callable[[int], None] | None = None
) -> list[list[int]]:
    """The times of each runner, taken in turns; `rounds` gives the number of each turn."""
    times: list[list[int]] = [[] for _ in runners]
    for count in rounds:
        for runner, taken in zip(runners, times, strict=True):
            taken.extend(runner(SETTLE + count)[SETTLE:])
            if progress:
                progress(count)
    return times


def measure(
    subjects: Sequence[Subject],
    feeds: Mapping[str, Array] | None,
    schedule: Schedule,
    progress: Callable[[int, int], None] | None = None,
    device: Device | None = None,
) -> list[Measurement]:
    """The latency of each subject on `feeds` (None: seeded random values), each in its own process, in turns.

    `device` is connected already; None is this machine. Raises InputError for an artifact that cannot be loaded,
    StageError when a worker dies, fails or takes too long, DeviceError when the device is lost.
    """
    from edgeship.pipeline.machine import busy_between

    where = device or HostDevice()
    arrays = [_own_inputs(subject, feeds) for subject in subjects]
    records = [Record() for _ in subjects]
    plan = schedule.rounds()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, schedule.runs * len(subjects))

    facts: list[dict[str, Any]] = []
    for rounds in plan:
        with _started(subjects, where) as workers:
            facts.append(workers[0].facts())
            for worker, own, record in zip(workers, arrays, records, strict=True):
                _prepare(worker, own, record, schedule.warmup)
            taken = in_turns([worker.time for worker in workers], rounds, advance)
            for worker, record, times in zip(workers, records, taken, strict=True):
                record.nanoseconds += times
                record.peak_bytes += [peak for peak in [worker.peak_bytes()] if peak is not None]
            facts.append(workers[0].facts())
    machine = busy_between(facts[0], facts[-1])
    launches = tuple(tuple(rounds) for rounds in plan)
    return [_measurement(record, subject, machine, launches) for subject, record in zip(subjects, records, strict=True)]


def _own_inputs(subject: Subject, feeds: Mapping[str, Array] | None) -> list[Array] | None:
    """The artifact's own inputs for `feeds`; None where the worker makes up its own."""
    if subject.artifact is None:
        return None
    session = load(subject.target).open(subject.artifact)  # raises InputError before anything is started
    if feeds is None:
        return None
    if isinstance(session, BorderSession):
        return session.enter({info.name: feeds[info.name] for info in session.inputs if info.name in feeds})
    return [feeds[info.name] for info in session.inputs]


@contextlib.contextmanager
def _started(subjects: Sequence[Subject], device: Device) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Worker(device, subject)) for subject in subjects]


def _prepare(worker: Worker, arrays: list[Array] | None, record: Record, least: int) -> None:
    record.load_ms.append(worker.loaded["load_ms"])
    record.idle_bytes += [idle for idle in [worker.loaded["idle_bytes"]] if idle is not None]
    record.first_ms.append(worker.feed(arrays))
    warmup, settled = warm_up(worker.time, least)
    record.warmup = max(record.warmup, warmup)
    record.settled &= settled


def _measurement(
    record: Record, subject: Subject, machine: Mapping[str, Any], launches: tuple[tuple[int, ...], ...]
) -> Measurement:
    return Measurement(
        nanoseconds=tuple(record.nanoseconds),
        warmup=record.warmup,
        threads=subject.threads,
        machine=machine,
        launches=launches,
        load_ms=tuple(record.load_ms),
        first_ms=tuple(record.first_ms),
        peak_bytes=max(record.peak_bytes, default=None),
        idle_bytes=max(record.idle_bytes, default=None),
        settled=record.settled,
    )
