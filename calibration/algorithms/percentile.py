"""Range = what is left when at most 0.01 % of all values are cut off at either end.

    high = the smallest bin edge with  #{x_i >= high} <= 0.0001 n,  but not more than max_i x_i; low likewise

(Wu et al., 2020, "Integer Quantization for Deep Learning Inference", section 3.2.) A tensor with values on one side of
zero only is cut on that side only. Zeros count among n, so that a ReLU's output is judged by all of its values.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array, Observer
from edgeship.calibration.values.histogram import Histogram

CUT = 1e-4
"""The largest share of values beyond one end of the range; the 99.99th percentile in the paper's words."""


class Percentile:
    """Remembers a histogram."""

    def __init__(self) -> None:
        self._seen = Histogram()

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        self._seen.update(values)

    def merge(self, other: Observer) -> None:
        """Takes in what another Percentile saw."""
        if not isinstance(other, Percentile):
            raise TypeError(f"a Percentile observer cannot merge a {type(other).__name__}")
        self._seen.merge(other._seen)

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        return max(self._seen.low, -self._end(-1)), min(self._seen.high, self._end(1))

    def _end(self, sign: int) -> float:
        """The edge, as a magnitude, beyond which at most the share `CUT` of the values lies."""
        beyond = np.cumsum(self._seen.one_sided(sign)[::-1])[::-1]  # beyond[i]: values in bin i and further out
        return int(np.count_nonzero(beyond > CUT * self._seen.count)) * self._seen.width


ALGORITHM = Percentile
