"""Differences are what their formulas say, however the samples arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.compare import Comparison, Difference, OutputComparison, classification_output

VALUES = st.floats(-1e3, 1e3, width=32)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=VALUES)
PAIRS = hnp.array_shapes(min_dims=1, max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=VALUES), hnp.arrays(np.float32, shape, elements=VALUES)
    )
)


def difference(x: Array, y: Array, step: float = 0.0) -> Difference:
    comparison = OutputComparison("y", step)
    comparison.update(x, y)
    return comparison.result()


@given(PAIRS)
def test_errors_are_those_of_numpy(pair: tuple[Array, Array]) -> None:
    x, y = (values.astype(np.float64) for values in pair)
    found = difference(*pair, step=0.5)
    assert found.max_abs == pytest.approx(np.abs(x - y).max())
    assert found.mean_abs == pytest.approx(np.abs(x - y).mean())
    assert found.max_steps == pytest.approx(np.abs(x - y).max() / 0.5, abs=1e-4)
    assert found.mean_steps == pytest.approx(np.abs(x - y).mean() / 0.5)
    assert -1 <= found.cosine <= 1


@given(ARRAYS)
def test_equal_outputs_differ_by_nothing(x: Array) -> None:
    found = difference(x, x)
    assert (found.max_abs, found.max_steps, found.sqnr_db) == (0, 0, math.inf)
    assert found.cosine == pytest.approx(1.0)
    assert found.to_json()["sqnr_db"] is None


@given(PAIRS, st.integers(1, 5))
def test_samples_one_by_one_give_the_same_as_all_at_once(pair: tuple[Array, Array], parts: int) -> None:
    x, y = pair[0].ravel(), pair[1].ravel()
    whole = difference(x, y)
    streamed = OutputComparison("y")
    for left, right in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        streamed.update(left, right)
    result = streamed.result()
    assert result.max_abs == whole.max_abs
    assert result.mean_abs == pytest.approx(whole.mean_abs)
    assert result.step == pytest.approx(whole.step)
    assert result.count == whole.count


def test_noise_of_a_hundredth_of_the_power_is_twenty_decibels() -> None:
    x = np.tile(np.array([1.0, -1.0], np.float32), 500)
    assert difference(x, x * np.float32(0.9)).sqnr_db == pytest.approx(20, abs=1e-4)


def test_an_output_that_never_moves_scores_no_decibels_however_large_it_is() -> None:
    x = np.array([10.0, 12.0, 11.0, 9.0], np.float32)
    assert difference(x, np.full_like(x, x.mean())).sqnr_db == pytest.approx(0)


def test_a_float_output_counts_in_255ths_of_its_range() -> None:
    found = difference(np.array([0.0, 2.55], np.float32), np.array([0.02, 2.55], np.float32))
    assert found.step_kind == "equivalent"
    assert found.step == pytest.approx(0.01)
    assert found.max_steps == pytest.approx(2, rel=1e-5)


def test_a_quantized_output_counts_in_its_own_steps() -> None:
    found = difference(np.array([0.0, 1.0]), np.array([0.5, 1.0]), step=0.25)
    assert (found.step_kind, found.max_steps) == ("quantized", 2.0)


def test_a_constant_reference_has_no_step_to_count_in() -> None:
    assert difference(np.ones(3), np.full(3, 2.0)).max_steps == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(StageError, match="'y' of the model has values that are not finite"):
        difference(np.zeros(2), np.array([0.0, bad]))
    with pytest.raises(StageError, match="'y' of the reference has values that are not finite"):
        difference(np.array([0.0, bad]), np.zeros(2))


def test_other_shapes_and_outputs_are_refused() -> None:
    with pytest.raises(StageError, match=r"'y' has the shape \(3,\); the reference has \(2,\)"):
        difference(np.zeros(2), np.zeros(3))
    with pytest.raises(StageError, match="outputs \\['b'\\]; the reference has \\['a'\\]"):
        Comparison().update({"a": np.zeros(1)}, {"b": np.zeros(1)})


def test_nothing_compared_is_no_result() -> None:
    with pytest.raises(StageError, match="at least one sample"):
        OutputComparison("y").result()


def test_agreement_counts_one_decision_for_each_sample_of_a_classifier() -> None:
    comparison = Comparison()
    comparison.update({"logits": np.array([[1.0, 2.0, 3.0]])}, {"logits": np.array([[3.0, 2.0, 1.0]])})
    comparison.update({"logits": np.array([[1.0, 2.0, 3.0]])}, {"logits": np.array([[0.0, 0.0, 0.1]])})
    assert (comparison.decisions, comparison.agreement) == (2, 0.5)


def test_a_tie_decides_nothing_so_either_class_agrees() -> None:
    comparison = Comparison()
    comparison.update({"logits": np.array([[2.0, 2.0, 1.0]])}, {"logits": np.array([[1.0, 2.0, 0.0]])})
    comparison.update({"logits": np.array([[2.0, 2.0, 1.0]])}, {"logits": np.array([[1.0, 0.0, 2.0]])})
    assert (comparison.agreement, comparison.strict_agreement) == (0.5, 0.0)


def test_agreement_counts_one_decision_for_each_anchor_of_a_detector() -> None:
    reference = {"boxes": np.zeros((1, 3, 4)), "scores": np.array([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]])}
    candidate = {"boxes": np.ones((1, 3, 4)), "scores": np.array([[[0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]])}
    comparison = Comparison()
    comparison.update(reference, candidate)
    assert comparison.agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"output": (1, 1000)}, "output"),
        ({"boxes": (1, 10, 4), "x": (1, 10, 2)}, "x"),
        ({"x": (1, 10, 4), "class_scores": (1, 10, 4)}, "class_scores"),
        ({"quality": (1, 1)}, None),
        ({"image": (1, 3, 8, 8)}, None),
        ({"boxes": (1, 10, 4)}, None),
    ],
)
def test_the_output_that_holds_classes_is_found(shapes: dict[str, tuple[int, ...]], expected: str | None) -> None:
    assert classification_output({name: np.zeros(shape) for name, shape in shapes.items()}) == expected


def test_a_model_that_decides_nothing_has_no_agreement() -> None:
    comparison = Comparison()
    comparison.update({"image": np.zeros((1, 3, 2, 2))}, {"image": np.zeros((1, 3, 2, 2))})
    assert comparison.agreement is None
