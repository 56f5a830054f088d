"""The regression gate, over simulated timings: a slower model fails, a slower host does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeship.calibration.errors import InputError
from edgeship.pipeline.benchmark.baseline import Baseline, read_baseline
from edgeship.pipeline.benchmark.statistics import Measurement

LAUNCHES, ROUNDS, EACH = 5, 12, 3
CPU = {"cpu": {"model": "a cpu", "architecture": "x86_64", "cores": 2, "features": ["avx2"]}}
VNNI = {"cpu": {"model": "another", "architecture": "x86_64", "cores": 2, "features": ["avx2", "avx512_vnni"]}}


def run(
    seed: int, model_ms: float = 3.0, *, host: float = 1.0, bursts: float = 0.1, machine: Any = None
) -> tuple[Measurement, Measurement]:
    """The reference workload (1 ms) and a model, on a host `host` times as slow whose other processes come and go."""
    rng = np.random.default_rng(seed)
    times: list[list[int]] = [[], []]
    for _ in range(LAUNCHES):
        own = np.exp(rng.normal(0, 0.004, 2))
        for _ in range(ROUNDS):
            for place, base in enumerate((1.0, model_ms)):
                burst = rng.uniform(1.2, 2.5) if rng.random() < bursts else 1.0
                jitter = np.exp(np.abs(rng.normal(0, 0.03, EACH)))
                times[place] += [round(value) for value in 1e6 * base * host * own[place] * burst * jitter]
    rounds = ((EACH,) * ROUNDS,) * LAUNCHES
    reference, model = (Measurement(tuple(taken), 20, 1, machine or CPU, rounds) for taken in times)
    return reference, model


def baseline(seed: int, **more: Any) -> Baseline:
    reference, model = run(seed, **more)
    return Baseline({"m": model}, reference, reference.machine)


def decide(then: Baseline, now: tuple[Measurement, Measurement], limit: float = 5.0) -> str:
    change = then.judge("m", now[1], now[0], limit)
    assert change is not None
    return change.decision


def test_of_fifty_slowed_models_at_most_one_is_missed_and_of_fifty_unchanged_ones_at_most_one_refused() -> None:
    missed = sum(decide(baseline(seed), run(1000 + seed, 3.3)) != "slower" for seed in range(50))
    refused = sum(decide(baseline(seed), run(1000 + seed)) == "slower" for seed in range(50))
    assert missed <= 1
    assert refused <= 1


@pytest.mark.parametrize("host", [0.6, 1.7, 3.0])
def test_a_slower_or_faster_host_does_not_change_the_verdict(host: float) -> None:
    assert decide(baseline(1), run(2, host=host)) == "within"
    assert decide(baseline(1), run(2, 3.6, host=host)) == "slower"


def test_a_loaded_host_does_not_refuse_an_unchanged_model() -> None:
    """In two rounds of five something else runs: wider intervals, no alarm; a large change is still seen."""
    decisions = [decide(baseline(seed, bursts=0.4), run(500 + seed, bursts=0.4)) for seed in range(50)]
    assert decisions.count("slower") <= 1
    slowed = [decide(baseline(seed, bursts=0.4), run(500 + seed, 6.0, bursts=0.4)) for seed in range(20)]
    assert slowed.count("slower") >= 19


def test_what_lies_across_the_limit_is_undecided() -> None:
    assert decide(baseline(1), run(2, 3.15)) == "undecided"


def test_another_kind_of_cpu_is_not_compared() -> None:
    change = baseline(1).judge("m", *reversed(run(2, 9.0, machine=VNNI)), 5.0)
    assert change is not None
    assert change.decision == "incomparable"
    assert "avx512_vnni" in str(change)


def test_another_number_of_threads_is_an_input_error() -> None:
    reference, model = run(2)
    twice = Measurement(model.nanoseconds, 20, 2, CPU, model.launches)
    with pytest.raises(InputError, match="measured with 1 threads; now with 2"):
        baseline(1).judge("m", twice, reference, 5.0)


def test_a_model_that_the_baseline_does_not_have_is_not_judged() -> None:
    assert baseline(1).judge("other", *reversed(run(2)), 5.0) is None


def document(reference: Measurement, model: Measurement) -> dict[str, Any]:
    return {"machine": CPU, "reference": reference.to_json(), "models": {"m": model.to_json()}}


def test_a_baseline_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(document(*run(1))))
    now = run(2, 3.6)
    change, again = (then.judge("m", now[1], now[0], 5.0) for then in (read_baseline(path), baseline(1)))
    assert change == again


def test_a_baseline_of_an_older_version_is_compared_without_a_reference(tmp_path: Path) -> None:
    values = document(*run(1))
    del values["reference"]
    for key in ("launches", "settled", "load_ms", "first_ms", "peak_bytes", "idle_bytes", "p99_ms"):
        del values["models"]["m"][key]
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(values))
    now = run(2, 3.6)
    change = read_baseline(path).judge("m", now[1], now[0], 5.0)
    assert change is not None
    assert change.decision == "slower"
    assert not change.normalized
    assert "without allowance for the host" in str(change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("models"),
        lambda values: values["models"]["m"].update(nanoseconds=[]),
        lambda values: values["models"]["m"].update(nanoseconds=[0, 1]),
        lambda values: values["models"]["m"].update(launches=[[1]]),
        lambda values: values["reference"].update(nanoseconds=[1], launches=[[1]]),
        lambda values: values["models"].update(m=3),
    ],
)
def test_a_damaged_baseline_is_an_input_error(tmp_path: Path, damage: Any) -> None:
    values = document(*run(1))
    damage(values)
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="is not the JSON of an earlier bench"):
        read_baseline(path)
