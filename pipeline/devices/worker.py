"""Returns answers of a runner: a process, here or on a device, with one artifact loaded in its runtime."""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.devices.base import Device, DeviceError, Launch
from edgeship.pipeline.devices.runner import pack, unpack

REFERENCE = "reference"
LOAD_SECONDS = 120.0


@dataclass(frozen=True)
class Subject:
    """An artifact and the target whose runtime opens it, on so many threads; the reference workload has no artifact."""

    target: str
    artifact: Path | None
    threads: int = 1

    @property
    def label(self) -> str:
        """How messages call it."""
        return self.target if self.artifact is None else f"{self.target}: {self.artifact.name}"


class Worker:
    """A process with one artifact loaded; where signals reach it, it stands still except in its turn."""

    def __init__(self, device: Device, subject: Subject) -> None:
        self._subject = subject
        self._device = device
        self._launch: Launch = device.launch(subject.target)
        self._process: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed in _end; a pipe nobody reads could fill up
        self.loaded: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        artifact = self._subject.artifact
        place = "" if artifact is None else self._device.push(artifact)
        self._process = subprocess.Popen(  # noqa: S603  # our own command, no shell
            list(self._launch.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            # not the terminal's group, so that Ctrl-C reaches the parent alone; but in its session, so that the system
            # wakes (SIGCONT) and ends (SIGHUP) a stopped worker whose parent was killed
            process_group=0 if os.name == "posix" else None,
        )
        try:
            request = {"target": self._subject.target, "artifact": place, "threads": self._subject.threads}
            self.loaded = self._ask("load", request, min(LOAD_SECONDS, self._device.silence))
            self._signal("SIGSTOP")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def feed(self, arrays: Sequence[Array] | None) -> float:
        """Milliseconds of the first inference, on `arrays` or seeded random values, which are kept for `time`."""
        answer = self._in_turn("feed", {"arrays": pack(list(arrays)) if arrays else None})
        return float(answer["first_ms"])

    def time(self, count: int) -> Sequence[int]:
        """Nanoseconds of each of `count` inferences."""
        return cast(list[int], self._in_turn("time", {"count": count})["nanoseconds"])

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """The artifact's outputs for its inputs, both in its own order, layout and element types."""
        return cast(list[Array], unpack(self._in_turn("run", {"arrays": pack(list(arrays))})["arrays"]))

    def peak_bytes(self) -> int | None:
        """The largest resident memory of the process so far."""
        return cast("int | None", self._in_turn("memory", {})["peak_bytes"])

    def facts(self) -> dict[str, Any]:
        """What the worker's machine says of itself."""
        return cast(dict[str, Any], self._in_turn("facts", {})["facts"])

    def _in_turn(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        self._signal("SIGCONT")
        answer = self._ask(what, request, self._device.silence)
        self._signal("SIGSTOP")
        return answer

    def _ask(self, what: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._running()
        with contextlib.suppress(BrokenPipeError):  # the answer, or its absence, says more
            process.stdin.write(json.dumps({"do": what, **request}).encode() + b"\n")  # type: ignore[union-attr]  # opened as a pipe
            process.stdin.flush()  # type: ignore[union-attr]  # opened as a pipe
        line = self._read_line(time.monotonic() + seconds, seconds)
        try:
            answer = cast(dict[str, Any], json.loads(line))
        except ValueError:
            raise DeviceError(f"{self._where()} answered {line[:80]!r}; accepted: a JSON object a line") from None
        if "error" in answer:
            kind = InputError if answer.get("input") else StageError
            raise kind(f"{self._where()} cannot be run: {answer['error']}")
        return answer

    def _read_line(self, deadline: float, seconds: float) -> bytes:
        pipe = cast(io.BufferedReader, self._running().stdout)
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise StageError(f"{self._where()} gave no answer within {seconds:.0f} s; it was stopped")
                part = os.read(pipe.fileno(), 1 << 20)
                if not part:
                    raise self._death()
                parts.append(part)
        return b"".join(parts)

    def _death(self) -> Exception:
        code = self._running().wait(timeout=10)
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        error = self._launch.explain(code, said[-1].strip() if said else "")
        return type(error)(f"{self._where()}: {error}")

    def _where(self) -> str:
        place = "" if self._device.address == "host" else f" on {self._device.address}"
        return f"{self._subject.label}{place}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the worker is used as a context manager")
        return self._process

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)  # not on Windows, where idle threads of a runtime may spin for a moment
        process = self._running()
        if self._launch.stops and number is not None and process.poll() is None:
            process.send_signal(number)

    def _end(self) -> None:
        process = self._running()
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # a runner on a device ends when its requests do
        if not self._launch.stops:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, self._said):
            if pipe:
                pipe.close()
