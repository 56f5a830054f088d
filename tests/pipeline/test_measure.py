"""Latency is taken in turns, in processes of their own, and every figure is a property of the raw times."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array, TensorInfo
from edgeship.pipeline.measure import SETTLE, Measurement, Schedule, Subject, Worker, in_turns, measure
from edgeship.pipeline.measure_worker import random_feeds, serve


def test_statistics_are_properties_of_the_raw_times() -> None:
    measurement = Measurement(tuple(1_000_000 * n for n in range(1, 102)), warmup=5, threads=2)
    assert measurement.runs == 101
    assert measurement.median_ms == pytest.approx(51)
    assert measurement.p90_ms == pytest.approx(91)
    assert measurement.iqr_ms == pytest.approx(50)
    assert measurement.noisy
    assert measurement.to_json()["nanoseconds"][0] == 1_000_000


def test_steady_times_are_not_noisy() -> None:
    assert not Measurement((1_000_000, 1_010_000, 1_020_000, 1_030_000), 0, 1).noisy


@given(st.integers(1, 1000))
def test_turns_add_up_to_the_runs_asked_for(runs: int) -> None:
    turns = list(Schedule(runs=runs).turns())
    assert sum(turns) == runs
    assert max(turns) - min(turns) <= 1


def test_runners_take_turns_after_warming_up_and_settle_at_each_start() -> None:
    calls: list[tuple[str, int]] = []

    def runner(name: str) -> object:
        def run(count: int) -> Sequence[int]:
            calls.append((name, count))
            return list(range(count))

        return run

    seen: list[tuple[int, int]] = []
    times = in_turns(
        [runner("a"), runner("b")],  # type: ignore[list-item]  # plain functions
        Schedule(runs=4, warmup=3),
        lambda done, total: seen.append((done, total)),
    )
    assert calls[:4] == [("a", 3), ("b", 3), ("a", SETTLE + 1), ("b", SETTLE + 1)]
    assert [name for name, _ in calls[2:]] == ["a", "b"] * 4
    assert times == [(SETTLE,) * 4, (SETTLE,) * 4]
    assert seen[-1] == (8, 8)


class FakeSession:
    inputs = (TensorInfo("x", (-1, 3), np.dtype(np.float32)),)
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self) -> None:
        self.feeds: list[Mapping[str, Array]] = []

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.feeds.append(feeds)
        return {}


def conversation(requests: bytes) -> tuple[int, list[dict[str, object]]]:
    answers = io.BytesIO()
    code = serve(io.BytesIO(requests), answers)
    return code, [json.loads(line) for line in answers.getvalue().splitlines()]


def request(payload: bytes, *counts: int) -> bytes:
    header = {"target": "fake", "artifact": "model.fake", "threads": 1, "bytes": len(payload)}
    return json.dumps(header).encode() + b"\n" + payload + b"".join(f"{count}\n".encode() for count in counts)


def npz(**arrays: Array) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stubs take **kwds for allow_pickle
    return buffer.getvalue()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()
    target = SimpleNamespace(open=lambda _path, _threads: fake)
    monkeypatch.setattr("edgeship.targets.base.load", lambda _name: target)
    return fake


def test_a_worker_answers_each_request_with_as_many_times(session: FakeSession) -> None:
    code, answers = conversation(request(npz(x=np.ones((1, 3), np.float32)), 2, 3))
    assert code == 0
    assert answers[0] == {"ready": True}
    assert [len(answer["nanoseconds"]) for answer in answers[1:]] == [2, 3]  # type: ignore[arg-type]  # JSON values
    assert len(session.feeds) == 1 + 2 + 3
    assert np.array_equal(session.feeds[0]["x"], np.ones((1, 3)))


def test_a_worker_without_feeds_makes_its_own(session: FakeSession) -> None:
    conversation(request(npz(), 1))
    assert session.feeds[0]["x"].shape == (1, 3)
    assert np.array_equal(session.feeds[0]["x"], random_feeds(session)["x"])


@pytest.mark.parametrize("requests", [b"", b"not json\n", request(b"not an npz")])
def test_a_worker_that_cannot_work_says_why(session: FakeSession, requests: bytes) -> None:
    code, answers = conversation(requests)
    assert code == 1
    assert "error" in answers[-1]


@pytest.fixture
def artifact(tmp_path: Path, tiny_models: dict[str, bytes]) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models["plain"])
    return path


def test_real_workers_measure_two_artifacts(artifact: Path, tiny_images: Array) -> None:
    subject = Subject("onnxruntime", artifact)
    results = measure([subject, subject], {"image": tiny_images[:1]}, Schedule(runs=7, warmup=2))
    assert [result.runs for result in results] == [7, 7]
    assert all(min(result.nanoseconds) > 0 for result in results)
    assert results[0].machine["cpu"]


def test_an_artifact_that_cannot_be_opened_is_an_input_error(tmp_path: Path, tiny_images: Array) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"onnxruntime: model.onnx cannot be measured: "):
        measure([Subject("onnxruntime", path)], {"image": tiny_images[:1]}, Schedule(runs=1, warmup=0))


@pytest.fixture
def worker(artifact: Path, tiny_images: Array) -> Iterator[Worker]:
    with Worker(Subject("onnxruntime", artifact), {"image": tiny_images[:1]}, 1) as started:
        yield started


def test_an_idle_worker_is_stopped_and_runs_when_it_is_asked(worker: Worker) -> None:
    assert worker._process is not None
    for _ in range(2):
        _, status = os.waitpid(worker._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert len(worker.run(3)) == 3


def test_a_worker_that_dies_is_a_stage_error_naming_the_signal(worker: Worker) -> None:
    assert worker._process is not None
    worker._process.send_signal(signal.SIGKILL)
    with pytest.raises(StageError, match="its process died of signal SIGKILL"):
        worker.run(1)


def test_a_worker_that_takes_too_long_is_a_stage_error(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeship.pipeline.measure.TURN_SECONDS", 0.05)
    with pytest.raises(StageError, match="gave no answer within"):
        worker.run(10_000_000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_a_stopped_worker_does_not_outlive_a_killed_parent(artifact: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from edgeship.pipeline.measure import Subject, Worker\n"
        "with Worker(Subject('onnxruntime', Path(sys.argv[1])), None, 1) as worker:\n"
        "    print(worker._process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(artifact)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    state = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    wait_until(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T")
    parent.kill()
    parent.communicate()
    wait_until(lambda: not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
