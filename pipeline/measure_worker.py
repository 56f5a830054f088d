"""Returns an exit code after timing one artifact on command; started by `measure.Worker`, one process per artifact.

Standard input: a JSON line {"target", "artifact", "threads", "bytes"}, that many bytes of .npz with the feeds, then
lines with a number of inferences each. Standard output: one JSON line for each. The runtime's own messages go to
stderr.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from edgeship.calibration.errors import EdgeshipError, InputError
from edgeship.calibration.types import Array, Session
from edgeship.pipeline.isolation import die_with_parent


def serve(requests: BinaryIO, answers: BinaryIO) -> int:
    """Answers until the requests end."""

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values).encode() + b"\n")
        answers.flush()

    try:
        header = json.loads(requests.readline())
        with np.load(io.BytesIO(requests.read(header["bytes"])), allow_pickle=False) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
        session = _open(header)
        feeds = feeds or random_feeds(session)
        session.run(feeds)
        answer({"ready": True})
        for line in requests:
            answer({"nanoseconds": time_runs(session, feeds, int(line))})
    except EdgeshipError as error:
        answer({"error": str(error), "input": isinstance(error, InputError)})
        return 1
    except Exception as error:  # whatever it is, the parent says it
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _open(header: Mapping[str, Any]) -> Session:
    from pathlib import Path

    from edgeship.targets.base import load

    return load(header["target"]).open(Path(header["artifact"]), header["threads"])


def random_feeds(session: Session) -> dict[str, Array]:
    """Seeded values between 0 and 1 for every input, 1 for each dynamic side."""
    generator = np.random.default_rng(0)
    return {
        info.name: generator.random([max(1, side) for side in info.shape]).astype(info.dtype) for info in session.inputs
    }


def time_runs(session: Session, feeds: Mapping[str, Array], count: int) -> list[int]:
    """Nanoseconds of each of `count` inferences."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(count):
        begun = clock()
        session.run(feeds)
        times.append(clock() - begun)
    return times


def main() -> int:
    """The exit code; keeps the answers apart from what a runtime prints to standard output."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    raise SystemExit(main())
