"""Scores and their intervals are those of the formulas' papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError
from edgeship.pipeline.scoring import Score, class_scores, drop_of, paired_interval, wilson_interval


def test_the_wilson_interval_is_that_of_the_textbooks() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_proportion(counts: tuple[int, int]) -> None:
    right, total = counts
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1


@pytest.mark.parametrize("total", range(1, 50))
def test_the_interval_of_none_begins_with_0_and_that_of_all_ends_with_100(total: int) -> None:
    none, every = Score([False] * total).to_json(), Score([True] * total).to_json()
    assert none["interval"][0] == 0.0
    assert every["interval"][1] == 100.0


def test_no_observations_have_no_interval() -> None:
    with pytest.raises(ValueError, match="0 of 0"):
        wilson_interval(0, 0)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 400))
def test_a_paired_interval_mirrors_when_the_models_change_places(lost: int, won: int, same: int) -> None:
    low, high = paired_interval(lost, won, lost + won + same)
    other_low, other_high = paired_interval(won, lost, lost + won + same)
    assert (low, high) == pytest.approx((-other_high, -other_low))
    assert -1 <= low <= high <= 1


def test_a_paired_interval_is_agresti_and_mins() -> None:
    # Agresti and Min (2005), section 4: 1144 + 2 cases; b = 132 + 0.5, c = 107 + 0.5.
    low, high = paired_interval(132, 107, 1144)
    middle = (132 - 107) / 1146
    assert (low + high) / 2 == pytest.approx(middle)
    assert high - middle == pytest.approx(1.959964 * np.sqrt(240 - 25**2 / 1146) / 1146)


def score(*answers: tuple[int, int], classes: int = 10) -> Score:
    result = Score()
    for first, label in answers:
        values = -np.abs(np.arange(classes, dtype=np.float32) - first)
        result.update(values[None], label)
    return result


def test_top1_and_top5_count_right_answers() -> None:
    result = score((3, 3), (3, 4), (3, 9), (0, 0))
    assert (result.n, result.top1, result.top5) == (4, 50.0, 75.0)


def test_five_classes_have_no_top5() -> None:
    assert score((1, 1), classes=5).top5 is None


def test_a_label_that_is_no_class_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"label 10 is not among the model's 10 classes, 0..9"):
        score((1, 10))


def test_the_drop_is_in_points_and_paired() -> None:
    reference = score((1, 1), (2, 2), (3, 3), (4, 5))
    candidate = score((1, 1), (2, 2), (3, 4), (4, 4))
    facts = drop_of(candidate, reference)
    assert (facts["drop"], facts["lost"], facts["won"]) == (0.0, 1, 1)
    worse = drop_of(score((1, 1), (2, 3), (3, 4), (4, 5)), reference)
    assert worse["drop"] == 50.0
    assert worse["drop_interval"][0] < 50.0 < worse["drop_interval"][1] + 25


def test_scores_are_found_among_the_outputs() -> None:
    outputs = {"features": np.zeros((1, 3, 4, 4)), "logits": np.ones((1, 7))}
    found = class_scores(outputs)
    assert found is not None
    assert found.shape == (1, 7)
    assert class_scores({"boxes": np.zeros((1, 10, 4))}) is None
