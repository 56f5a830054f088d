"""Range = [min, max] of everything seen: nothing is cut, one outlier sets the scale.

low = min(0, min_i x_i), high = max(0, max_i x_i)  (Jacob et al., 2018, section 3; zero must be exactly representable).
"""

from __future__ import annotations

from edgeship.calibration.types import Observer
from edgeship.calibration.values.ranges import Extremes


class MinMax(Extremes):
    """Remembers two numbers."""

    def merge(self, other: Observer) -> None:
        """Takes in what another MinMax saw."""
        if not isinstance(other, MinMax):
            raise TypeError(f"a MinMax observer cannot merge a {type(other).__name__}")
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        return self.low, self.high


ALGORITHM = MinMax
