"""Claims that every range algorithm makes, whichever files there are, and those of each alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeship.calibration import algorithms
from edgeship.calibration.errors import InputError

every_algorithm = pytest.mark.parametrize("name", algorithms.names())
batches = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-1e6, 1e6, width=32)),
    min_size=1,
    max_size=5,
)


def test_minmax_is_found_by_its_file_name() -> None:
    assert "minmax" in algorithms.names()


def test_an_unknown_algorithm_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown range algorithm 'minmx'; there are: .*; did you mean 'minmax'"):
        algorithms.load("minmx")


@every_algorithm
@settings(deadline=None, max_examples=50)
@given(batches)
def test_the_range_contains_zero(name: str, values: list[np.ndarray]) -> None:
    observer = algorithms.load(name)()
    for batch in values:
        observer.update(batch)
    low, high = observer.range()
    assert low <= 0 <= high


@every_algorithm
@settings(deadline=None, max_examples=50)
@given(batches, st.integers(0, 5))
def test_merged_observers_know_what_one_that_saw_everything_knows(
    name: str, values: list[np.ndarray], cut: int
) -> None:
    whole, first, second = (algorithms.load(name)() for _ in range(3))
    for i, batch in enumerate(values):
        whole.update(batch)
        (first if i < cut else second).update(batch)
    first.merge(second)
    assert first.range() == pytest.approx(whole.range(), rel=1e-12, abs=1e-12)


@every_algorithm
def test_many_partial_observers_of_a_long_stream_agree_with_one(name: str) -> None:
    """Four processes with a quarter of the samples each, on values that grow, so that histograms must coarsen."""
    rng = np.random.default_rng(2)
    batches = [(rng.laplace(size=(1, 4, 50)) * 1.2**i).astype(np.float32) for i in range(40)]
    whole, parts = algorithms.load(name)(), [algorithms.load(name)() for _ in range(4)]
    for i, batch in enumerate(batches):
        whole.update(batch)
        parts[i // 10].update(batch)
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].range() == pytest.approx(whole.range(), rel=1e-12)


@every_algorithm
def test_the_state_does_not_grow_with_what_was_seen(name: str) -> None:
    few, many = algorithms.load(name)(), algorithms.load(name)()
    rng = np.random.default_rng(0)
    few.update(rng.normal(size=10).astype(np.float32))
    for _ in range(20):
        many.update(rng.normal(size=10_000).astype(np.float32))
    assert len(pickle.dumps(many)) <= len(pickle.dumps(few)) + 64  # numbers of other lengths


@every_algorithm
def test_a_relu_tensor_keeps_zero_as_its_lower_end(name: str) -> None:
    observer = algorithms.load(name)()
    observer.update(np.maximum(np.random.default_rng(0).normal(size=10_000), 0).astype(np.float32))
    low, high = observer.range()
    assert low == 0
    assert high > 1


@every_algorithm
def test_mirrored_values_give_the_mirrored_range(name: str) -> None:
    values = np.abs(np.random.default_rng(0).laplace(size=10_000)).astype(np.float32)
    plain, mirrored = algorithms.load(name)(), algorithms.load(name)()
    plain.update(values)
    mirrored.update(-values)
    low, high = mirrored.range()
    assert (-high, -low) == pytest.approx(plain.range(), rel=1e-3)


@every_algorithm
def test_an_observer_of_zeros_only_has_an_empty_range(name: str) -> None:
    observer = algorithms.load(name)()
    observer.update(np.zeros((2, 3), np.float32))
    assert observer.range() == (0, 0)


@every_algorithm
def test_no_range_is_wider_than_the_values(name: str) -> None:
    values = np.random.default_rng(3).normal(0.5, 1, 5_000).astype(np.float32)
    observer = algorithms.load(name)()
    observer.update(values)
    low, high = observer.range()
    assert values.min() <= low
    assert high <= values.max()


@every_algorithm
def test_observers_of_different_kinds_do_not_merge(name: str) -> None:
    other = next(n for n in algorithms.names() if n != name)
    with pytest.raises(TypeError, match="cannot merge a"):
        algorithms.load(name)().merge(algorithms.load(other)())


@every_algorithm
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    observer = algorithms.load(name)()
    with pytest.raises(ValueError, match="1 of its 3 values are NaN or infinite"):
        observer.update(np.array([1.0, bad, 2.0], np.float32))


@every_algorithm
def test_an_empty_batch_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        algorithms.load(name)().update(np.zeros((0, 3), np.float32))


@settings(deadline=None, max_examples=50)
@given(batches)
def test_minmax_covers_everything_seen(values: list[np.ndarray]) -> None:
    observer = algorithms.load("minmax")()
    for batch in values:
        observer.update(batch)
    everything = np.concatenate([batch.reshape(-1) for batch in values])
    assert observer.range() == (min(0.0, float(everything.min())), max(0.0, float(everything.max())))


def range_of(name: str, *batches: np.ndarray) -> tuple[float, float]:
    observer = algorithms.load(name)()
    for batch in batches:
        observer.update(batch.astype(np.float32))
    return observer.range()


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    """Of quantizing to 256 levels over [low, high], zero exact."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    return float((((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale - values) ** 2).sum())


def test_percentile_cuts_the_outlier_off() -> None:
    values = np.append(np.random.default_rng(0).normal(size=100_000), [500.0])
    low, high = range_of("percentile", values)
    assert -5 < low < -3
    assert 3 < high < 5


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000))
def test_percentile_cuts_at_most_a_ten_thousandth_off_at_either_end(seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(2, size=20_000).astype(np.float32)
    low, high = range_of("percentile", values)
    assert (values > high).sum() <= 2
    assert (values < low).sum() <= 2


DISTRIBUTIONS = {
    "normal": lambda rng: rng.normal(size=20_000),
    "half normal": lambda rng: np.abs(rng.normal(size=20_000)),
    "relu": lambda rng: np.maximum(rng.normal(size=20_000), 0),
    "laplace": lambda rng: rng.laplace(size=20_000),
    "student": lambda rng: rng.standard_t(3, size=20_000),
    "skewed": lambda rng: rng.gamma(0.5, 2, size=20_000) - 0.3,
    "uniform": lambda rng: rng.uniform(-1, 3, size=20_000),
    "one small side": lambda rng: np.maximum(rng.normal(0, 3, size=20_000), -0.375),
    "half student": lambda rng: np.abs(rng.standard_t(3, size=20_000)),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_mse_has_no_larger_error_than_minmax_on_what_it_saw(kind: str, seed: int) -> None:
    values = DISTRIBUTIONS[kind](np.random.default_rng(seed)).astype(np.float32)
    least = squared_error(values, *range_of("minmax", values))
    assert squared_error(values, *range_of("mse", values)) <= least


def test_mse_lessens_the_error_of_long_tails() -> None:
    values = np.random.default_rng(0).standard_t(3, size=200_000).astype(np.float32)
    assert squared_error(values, *range_of("mse", values)) < 0.75 * squared_error(values, *range_of("minmax", values))


@pytest.mark.parametrize("kind", ["laplace", "student", "half student"])
def test_entropy_is_tighter_than_minmax_on_long_tails(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([DISTRIBUTIONS[kind](rng) for _ in range(50)])
    (low, high), (least, most) = range_of("entropy", values), range_of("minmax", values)
    assert high - low < 0.95 * (most - least)


def test_entropy_keeps_all_of_a_uniform_distribution() -> None:
    values = np.random.default_rng(0).uniform(0, 4, 200_000)
    assert range_of("entropy", values)[1] == pytest.approx(4, rel=0.01)


def test_entropy_ignores_an_outlier_beyond_a_gap() -> None:
    values = np.append(np.abs(np.random.default_rng(0).normal(size=100_000)), [60.0])
    assert range_of("entropy", values)[1] < 10


def test_the_zeros_of_a_relu_do_not_change_the_entropy_range() -> None:
    values = np.abs(np.random.default_rng(0).laplace(size=100_000))
    assert range_of("entropy", values) == range_of("entropy", values, np.zeros(500_000))


def test_a_moving_average_follows_slowly_and_one_odd_batch_moves_it_little() -> None:
    usual = [np.array([-1.0, 2.0])] * 100
    assert range_of("moving_average", *usual) == pytest.approx((-1, 2))
    low, high = range_of("moving_average", *usual, np.array([-1.0, 102.0]))
    assert low == pytest.approx(-1)
    assert 2 < high < 2 + 100 * 0.02
