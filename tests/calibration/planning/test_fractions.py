"""Multipliers with odd denominators: near what was asked for, and no integer near a rounding boundary."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeship.calibration.planning.fractions import BASE, MOST, at_least, at_most

MULTIPLIERS = st.floats(1e-5, 8.0)


@given(MULTIPLIERS)
def test_they_move_by_less_than_two_thousandths(multiplier: float) -> None:
    above, below = float(at_least(np.array(multiplier))), float(at_most(np.array(multiplier)))
    assert multiplier * (1 - 1e-8) <= above < multiplier * (1 + 2.05 / BASE)
    assert multiplier * (1 - 2.05 / BASE) < below <= multiplier * (1 + 1e-8)


@given(MULTIPLIERS, st.integers(-(1 << 24), 1 << 24))
def test_no_integer_comes_near_a_boundary(multiplier: float, integer: int) -> None:
    for chosen in (at_least(np.array(multiplier)), at_most(np.array(multiplier))):
        exact = Fraction(float(chosen)).limit_denominator(int(MOST))
        assert exact.denominator % 2 == 1
        product = integer * exact
        distance = abs(product - (product.numerator // product.denominator) - Fraction(1, 2))
        assert distance >= Fraction(1, 2 * exact.denominator)


def test_what_is_chosen_once_stays() -> None:
    chosen = at_least(np.geomspace(1e-5, 8, 1000))
    assert at_least(chosen) == pytest.approx(chosen, rel=1e-9)


def test_multipliers_too_small_to_tell_apart_stay_as_they_are() -> None:
    assert at_least(np.array(1e-9)) == at_most(np.array(1e-9)) == 1e-9
