from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeship.calibration.values.histogram import BINS, Histogram

streams = st.lists(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=2, max_side=6),
        elements=st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(0.0)),
    ),
    min_size=1,
    max_size=5,
)


def of(batches: list[np.ndarray]) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def state(histogram: Histogram) -> tuple[object, ...]:
    sides = (tuple(histogram.one_sided(1)), tuple(histogram.one_sided(-1)))
    return histogram.low, histogram.high, histogram.exponent, *sides


@settings(deadline=None, max_examples=50)
@given(streams, st.integers(0, 5))
def test_any_split_of_a_stream_merges_to_the_same_histogram(batches: list[np.ndarray], cut: int) -> None:
    first, second = of(batches[:cut]), of(batches[cut:])
    first.merge(second)
    assert state(first) == state(of(batches))


@settings(deadline=None, max_examples=50)
@given(streams)
def test_the_order_of_the_batches_does_not_matter(batches: list[np.ndarray]) -> None:
    assert state(of(batches)) == state(of(batches[::-1]))


@settings(deadline=None, max_examples=50)
@given(streams)
def test_every_value_is_counted_in_its_bin(batches: list[np.ndarray]) -> None:
    histogram = of(batches)
    values = np.concatenate([batch.reshape(-1) for batch in batches]).astype(np.float64)
    bins = np.trunc(values / histogram.width).astype(int)
    assert histogram.count == values.size
    assert histogram.one_sided(1) == pytest.approx(np.bincount(bins[bins >= 0], minlength=BINS))
    assert histogram.one_sided(-1) == pytest.approx(np.bincount(-bins[bins < 0], minlength=BINS))
    assert histogram.magnitudes().sum() == values.size


def test_at_least_half_of_the_bins_are_in_use() -> None:
    for largest in (1.0, 6.0, 1.9999, 2.0, 1e-20, 3e38):
        histogram = of([np.array([0.0, largest], np.float32)])
        assert BINS / 2 <= np.flatnonzero(histogram.one_sided(1)).max() < BINS


def test_a_histogram_has_the_same_size_whatever_it_saw() -> None:
    small, large = of([np.ones(1, np.float32)]), of([np.random.default_rng(0).normal(size=100_000).astype(np.float32)])
    assert small.one_sided(1).nbytes == large.one_sided(1).nbytes == BINS * 8


def test_merging_leaves_the_other_as_it_is() -> None:
    first, second = of([np.array([100.0], np.float32)]), of([np.array([-1.0, 0.5], np.float32)])
    before = state(second)
    first.merge(second)
    assert state(second) == before
