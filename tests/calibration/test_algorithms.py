"""Claims that every range algorithm makes, whichever files there are, and those of each alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
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
    with pytest.raises(InputError, match=r"unknown range algorithm 'minmx'.*minmax"):
        algorithms.load("minmx")


@every_algorithm
@given(batches)
def test_the_range_contains_zero(name: str, values: list[np.ndarray]) -> None:
    observer = algorithms.load(name)()
    for batch in values:
        observer.update(batch)
    low, high = observer.range()
    assert low <= 0 <= high


@every_algorithm
@given(batches, st.integers(0, 5))
def test_merged_observers_know_what_one_that_saw_everything_knows(
    name: str, values: list[np.ndarray], cut: int
) -> None:
    whole, first, second = (algorithms.load(name)() for _ in range(3))
    for i, batch in enumerate(values):
        whole.update(batch)
        (first if i < cut else second).update(batch)
    first.merge(second)
    assert first.range() == pytest.approx(whole.range())


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


@given(batches)
def test_minmax_covers_everything_seen(values: list[np.ndarray]) -> None:
    observer = algorithms.load("minmax")()
    for batch in values:
        observer.update(batch)
    everything = np.concatenate([batch.reshape(-1) for batch in values])
    assert observer.range() == (min(0.0, float(everything.min())), max(0.0, float(everything.max())))
