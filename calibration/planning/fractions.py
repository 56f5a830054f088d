"""Multipliers at which no integer lands near a rounding boundary.

An int8 kernel multiplies an integer accumulator with r = s_x s_w / s_y and rounds. With r = m / D and D odd, every
product is a whole number of D-ths; a boundary n + 1/2 is none, and the nearest product is 1 / 2D away:

    |a m / D - (n + 1/2)| = |2 a m - (2 n + 1) D| / 2D >= 1 / 2D        (an odd number is not 0)

So arithmetic that is off by less than 1 / 2D of a step (float32 sums in any order, float multipliers, fixed point with
20 bits) rounds every accumulator to the same integer. D is kept near `BASE`, and grows only where r is smaller than
1 / BASE: r moves by less than 2 / BASE of itself, 0.2 %.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array

BASE = 1023
"""1 / 2D is 2.4 to 4.9e-4 of a step then. float32 is off by up to 5e-5 in a product, by 1e-4 in sums of thousands."""
MOST = float(1 << 22)
"""Denominators beyond it say nothing: float32 does not tell their fractions apart."""


def at_least(multipliers: Array) -> Array:
    """The nearest such m / D not under each multiplier: float64, same shape; beyond `MOST` as they are."""
    given = np.asarray(multipliers, np.float64)
    numerator = np.maximum(np.ceil(BASE * given * (1 - 1e-9)), 1.0)
    whole = np.floor(numerator / given * (1 + 1e-9))
    return _fraction(given, numerator, whole - (whole % 2 == 0))


def at_most(multipliers: Array) -> Array:
    """The nearest such m / D not over each multiplier: float64, same shape; beyond `MOST` as they are."""
    given = np.asarray(multipliers, np.float64)
    numerator = np.maximum(np.ceil(BASE * given * (1 - 1e-9)), 1.0)
    whole = np.ceil(numerator / given * (1 - 1e-9))
    return _fraction(given, numerator, whole + (whole % 2 == 0))


def _fraction(given: Array, numerator: Array, denominator: Array) -> Array:
    return np.asarray(np.where(denominator > MOST, given, numerator / np.maximum(denominator, 1.0)))
