"""What times prove: simulated timings whose truth is known, so that nothing here depends on this machine."""

from __future__ import annotations

import numpy as np
import pytest

from edgeship.pipeline.benchmark.statistics import Measurement, Ratio, quotient, ratio, summarize

LAUNCHES, ROUNDS, EACH = 5, 12, 3


def simulate(
    seed: int, *base_ms: float, noise: float = 0.02, bursts: float = 0.0, drift: float = 0.0, launch: float = 0.004
) -> list[Measurement]:
    """Artifacts of these times, measured in turns on a machine with jitter, other processes' bursts and drift."""
    rng = np.random.default_rng(seed)
    times: list[list[float]] = [[] for _ in base_ms]
    for place in range(LAUNCHES):
        own = np.exp(rng.normal(0, launch, len(base_ms)))
        for index in range(ROUNDS):
            slowness = 1 + drift * (place * ROUNDS + index) / (LAUNCHES * ROUNDS)
            for subject, base in enumerate(base_ms):
                factor = slowness * (rng.uniform(1.3, 3) if rng.random() < bursts else 1)
                jitter = np.exp(np.abs(rng.normal(0, noise, EACH)))
                times[subject] += list(1e6 * base * own[subject] * factor * jitter)
    rounds = ((EACH,) * ROUNDS,) * LAUNCHES
    return [Measurement(tuple(round(value) for value in taken), 20, 1, {}, rounds) for taken in times]


def test_figures_are_properties_of_the_raw_times() -> None:
    measurement = Measurement(tuple(1_000_000 * n for n in range(1, 102)), warmup=5, threads=2)
    assert measurement.runs == 101
    assert measurement.median_ms == pytest.approx(51)
    assert measurement.p90_ms == pytest.approx(91)
    assert measurement.iqr_ms == pytest.approx(50)
    assert measurement.noisy
    assert measurement.to_json()["nanoseconds"][0] == 1_000_000


def test_steady_times_are_not_noisy() -> None:
    assert not Measurement((1_000_000, 1_010_000, 1_020_000, 1_030_000), 0, 1).noisy


@pytest.mark.parametrize(("runs", "p90", "p99"), [(99, False, False), (100, True, False), (1000, True, True)])
def test_a_percentile_is_told_only_when_enough_times_lie_beyond_it(runs: int, p90: bool, p99: bool) -> None:
    measurement = Measurement(tuple(range(1, runs + 1)), 0, 1)
    assert (measurement.p90_ms is not None, measurement.p99_ms is not None) == (p90, p99)


@pytest.mark.parametrize("seed", range(20))
def test_the_ratio_holds_on_a_loaded_and_drifting_machine(seed: int) -> None:
    """The medians of all times are off by several percent there; the rounds' ratios are not."""
    a, b = simulate(seed, 2.0, 1.0, bursts=0.15, drift=0.5)
    assert ratio(a, b).value == pytest.approx(2.0, rel=0.02)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        found = ratio(*simulate(seed, 2.0, 1.0, bursts=0.1))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2.0 <= found.high
    assert held >= 185  # of 200


def test_more_noise_makes_the_interval_wider() -> None:
    def width(noise: float) -> float:
        found = [ratio(*simulate(seed, 1.0, 1.0, noise=noise)) for seed in range(10)]
        return float(np.mean([(one.high or 0) - (one.low or 0) for one in found]))

    assert width(0.2) > 2 * width(0.02)


def test_the_same_times_give_the_same_interval() -> None:
    a, b = simulate(1, 2.0, 1.0)
    assert ratio(a, b) == ratio(a, b)
    assert ratio(a, a) == Ratio(1.0, 1.0, 1.0)


def test_few_rounds_have_no_interval() -> None:
    assert summarize([np.zeros(5)]).interval is None
    assert summarize([np.zeros(6)]).interval == [1.0, 1.0]
    assert quotient([np.zeros(5)], [np.zeros(9)]).interval is None


def test_measurements_of_different_rounds_are_not_compared() -> None:
    (a,) = simulate(1, 1.0)
    with pytest.raises(ValueError, match="same rounds"):
        ratio(a, Measurement(a.nanoseconds, 20, 1))
