"""Range = exponential moving average of each batch's [min, max]: one odd batch moves it little.

    low_n = sum_k d^(n-k) min_k / sum_k d^(n-k),  d = 0.99, likewise high

(Jacob et al., 2018, section 3.1, "exponential moving averages"; the division by the sum of the weights, as in Kingma
and Ba, 2015, section 3, keeps the first batches from counting too much.) The weights follow the order of the batches:
`merge` takes the other observer's batches as those that came later.
"""

from __future__ import annotations

from edgeship.calibration.types import Array, Observer
from edgeship.calibration.values.ranges import extremes

DECAY = 0.99
"""The weight of a batch halves every 69 batches; of 100, the first counts a third of the last."""


class MovingAverage:
    """Remembers two weighted sums and how many batches they are of."""

    def __init__(self) -> None:
        self._low = 0.0
        self._high = 0.0
        self._batches = 0

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        low, high = extremes(values)
        self._low = DECAY * self._low + min(0.0, low)
        self._high = DECAY * self._high + max(0.0, high)
        self._batches += 1

    def merge(self, other: Observer) -> None:
        """Takes in what another MovingAverage saw, as batches that came later."""
        if not isinstance(other, MovingAverage):
            raise TypeError(f"a MovingAverage observer cannot merge a {type(other).__name__}")
        age = DECAY**other._batches
        self._low = age * self._low + other._low
        self._high = age * self._high + other._high
        self._batches += other._batches

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        if not self._batches:
            return 0.0, 0.0
        weight = (1 - DECAY**self._batches) / (1 - DECAY)
        return self._low / weight, self._high / weight


ALGORITHM = MovingAverage
