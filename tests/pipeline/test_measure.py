"""Latency is taken in short rounds, in processes of their own, and every figure is a property of the raw times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.benchmark.measure import SETTLE, Schedule, in_turns, measure, warm_up
from edgeship.pipeline.benchmark.operators import profile
from edgeship.pipeline.devices.host import HostDevice
from edgeship.pipeline.devices.worker import REFERENCE, Subject, Worker


@given(st.integers(1, 3000), st.integers(1, 5))
def test_rounds_add_up_to_the_runs_asked_for_in_launches_of_equal_rounds(runs: int, launches: int) -> None:
    rounds = Schedule(runs=runs, launches=launches).rounds()
    assert sum(map(sum, rounds)) == runs
    assert len({len(launch) for launch in rounds}) == 1
    assert min(min(launch) for launch in rounds) >= 1
    assert len(rounds) == max(1, min(launches, runs // 20))


def test_runners_take_turns_and_settle_at_each_start() -> None:
    calls: list[tuple[str, int]] = []

    def runner(name: str) -> Callable[[int], Sequence[int]]:
        def run(count: int) -> Sequence[int]:
            calls.append((name, count))
            return list(range(count))

        return run

    seen: list[int] = []
    times = in_turns([runner("a"), runner("b")], [1, 2], seen.append)
    assert calls == [("a", SETTLE + 1), ("b", SETTLE + 1), ("a", SETTLE + 2), ("b", SETTLE + 2)]
    assert times == [[SETTLE, SETTLE, SETTLE + 1]] * 2
    assert seen == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("medians", "ran", "settled"),
    [
        ([100, 100], 2, True),
        ([100, 99, 1], 2, True),
        ([100, 90, 80, 79.9], 4, True),
        ([100, 120], 2, True),
        ([100 * 0.9**n for n in range(12)], 10, False),
    ],
)
def test_a_runner_warms_up_until_it_no_longer_gets_faster(medians: list[float], ran: int, settled: bool) -> None:
    left = iter(medians)
    assert warm_up(lambda count: [round(1000 * next(left))] * count, 20) == (ran * 20, settled)


def test_no_warm_up_runs_when_none_is_wanted() -> None:
    assert warm_up(lambda _: pytest.fail("ran"), 0) == (0, True)


@pytest.fixture
def artifact(tmp_path: Path, tiny_models: dict[str, bytes]) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_models["plain"])
    return path


def test_real_workers_measure_artifacts_and_the_reference_in_the_same_rounds(
    artifact: Path, tiny_images: Array
) -> None:
    subjects = [Subject(REFERENCE, None), Subject("onnxruntime", artifact), Subject("onnxruntime", artifact, 2)]
    results = measure(subjects, {"image": tiny_images[:1]}, Schedule(runs=40, warmup=2, launches=2))
    assert [result.runs for result in results] == [40, 40, 40]
    assert all(min(result.nanoseconds) > 0 for result in results)
    assert {result.launches for result in results} == {results[0].launches}
    assert [len(result.load_ms) for result in results] == [2, 2, 2]
    assert [result.threads for result in results] == [1, 1, 2]
    assert results[1].machine["cpu"]["cores"] >= 1
    if sys.platform == "linux":
        assert results[1].peak_bytes is not None
        assert results[1].idle_bytes is not None
        assert results[1].peak_bytes > results[1].idle_bytes > 1 << 20
        assert 0 <= results[1].machine["steal"] <= 1


def test_an_artifact_that_cannot_be_opened_is_an_input_error(tmp_path: Path, tiny_images: Array) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"model\.onnx"):
        measure([Subject("onnxruntime", path)], {"image": tiny_images[:1]}, Schedule(runs=1, warmup=0))


def test_a_runtime_that_refuses_an_artifact_is_an_input_error_of_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"^onnxruntime: model.onnx cannot be run: "):
        Worker(HostDevice(), Subject("onnxruntime", path)).__enter__()


@pytest.fixture
def worker(artifact: Path, tiny_images: Array) -> Iterator[Worker]:
    with Worker(HostDevice(), Subject("onnxruntime", artifact)) as started:
        started.feed([tiny_images[:1]])
        yield started


def test_a_workers_outputs_are_those_of_the_targets_session(worker: Worker, artifact: Path, tiny_images: Array) -> None:
    from edgeship.targets.base import load

    expected = load("onnxruntime").open(artifact).run({"image": tiny_images[:1]})
    (found,) = worker.run([tiny_images[:1]])
    assert np.array_equal(found, expected["logits"])


def test_an_idle_worker_is_stopped_and_runs_when_it_is_asked(worker: Worker) -> None:
    assert worker._process is not None
    for _ in range(2):
        _, status = os.waitpid(worker._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert len(worker.time(3)) == 3


def test_a_worker_that_dies_is_a_stage_error_naming_the_signal(worker: Worker) -> None:
    assert worker._process is not None
    worker._process.send_signal(signal.SIGKILL)
    with pytest.raises(StageError, match="its process died of signal SIGKILL"):
        worker.time(1)


def test_a_worker_that_takes_too_long_is_a_stage_error(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostDevice, "silence", 0.05)
    with pytest.raises(StageError, match="gave no answer within"):
        worker.time(10_000_000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_a_stopped_worker_does_not_outlive_a_killed_parent(artifact: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from edgeship.pipeline.devices.host import HostDevice\n"
        "from edgeship.pipeline.devices.worker import Subject, Worker\n"
        "with Worker(HostDevice(), Subject('onnxruntime', Path(sys.argv[1]))) as worker:\n"
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


def test_the_profile_of_an_onnx_model_names_the_kernels_that_run(artifact: Path) -> None:
    times = profile("onnxruntime", artifact)
    operators = [entry.operator for entry in times]
    assert operators.count("Conv") == 2  # its Relus run inside the convolutions
    assert "Gemm" in operators
    assert all(entry.us >= 0 for entry in times)
    assert sum(entry.us for entry in times) > 0


def test_the_profile_of_a_tflite_model_times_every_operator(tmp_path: Path, tiny_models: dict[str, bytes]) -> None:
    import onnx
    import onnx_ir as ir

    from edgeship.targets.base import ConvertOptions, load
    from edgeship.targets.tflite import flatfile

    model = ir.serde.deserialize_model(onnx.load_from_string(tiny_models["residual"]))
    path = tmp_path / "model.tflite"
    path.write_bytes(load("tflite").convert(model, ConvertOptions()))
    content = flatfile.load(path)
    names = flatfile.operator_names(content)
    times = profile("tflite", path)
    assert [entry.operator for entry in times] == [
        names[operator.opcodeIndex] for operator in content.subgraphs[0].operators
    ]
    assert all(entry.us > 0 for entry in times)
