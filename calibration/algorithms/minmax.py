"""Range = [min, max] of everything seen: nothing is cut, one outlier sets the scale.

low = min(0, min_i x_i), high = max(0, max_i x_i)  (Jacob et al., 2018, section 3; zero must be exactly representable).
"""

from __future__ import annotations

from edgeship.calibration.types import Array, Observer
from edgeship.calibration.values.ranges import extremes


class MinMax:
    """Remembers two numbers."""

    def __init__(self) -> None:
        self._low = 0.0
        self._high = 0.0

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        low, high = extremes(values)
        self._low = min(self._low, low)
        self._high = max(self._high, high)

    def merge(self, other: Observer) -> None:
        """Takes in what another MinMax saw."""
        if not isinstance(other, MinMax):
            raise TypeError(f"a MinMax observer cannot merge a {type(other).__name__}")
        self._low = min(self._low, other._low)
        self._high = max(self._high, other._high)

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        return self._low, self._high


ALGORITHM = MinMax
