from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeship.calibration.values.silhouette import BINS, COUNTED, Silhouette


def of(*batches: np.ndarray) -> Silhouette:
    silhouette = Silhouette()
    for batch in batches:
        silhouette.update(batch)
    return silhouette


def test_small_tensors_are_counted_completely_as_numpy_counts_them() -> None:
    values = np.random.default_rng(0).normal(0.3, 2, 3000).astype(np.float32)
    facts = of(values).to_json()
    edges = facts["width"] * np.arange(1, BINS + 1)
    assert facts["above"] == list(np.trim_zeros(np.histogram(values, edges)[0], "b"))
    assert facts["below"] == list(np.trim_zeros(np.histogram(-values, edges)[0], "b"))
    assert facts["zero"] == (abs(values) < facts["width"]).sum()
    assert facts["counted"] == 3000
    assert (facts["low"], facts["high"]) == (values.min(), values.max())


def test_an_outlier_that_is_not_counted_still_shows_in_the_extremes() -> None:
    values = np.zeros(100 * COUNTED, np.float32)
    values[1] = 1000
    facts = of(values).to_json()
    assert facts["high"] == 1000
    assert facts["counted"] <= COUNTED


def test_every_column_of_a_tensor_with_even_sides_is_counted() -> None:
    columns = np.broadcast_to(np.arange(64, dtype=np.float32), (256, 64))
    facts = of(columns).to_json()
    assert sum(count > 0 for count in (facts["zero"], *facts["above"])) == 64


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32)))
def test_the_bins_hold_every_counted_value(values: np.ndarray) -> None:
    facts = of(values).to_json()
    assert facts["zero"] + sum(facts["above"]) + sum(facts["below"]) == values.size
    for extreme, counts in ((facts["high"], facts["above"]), (-facts["low"], facts["below"])):
        assert len(counts) <= BINS - 1
        assert extreme < facts["width"] * (len(counts) + 1) or not values.any()


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        of(np.array([np.nan], np.float32))
