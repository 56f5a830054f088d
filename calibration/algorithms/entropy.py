"""Range = the one whose integers lose the least information about the distribution of the values.

    T = argmin_T KL(P || Q),  KL(P || Q) = sum_i P_i log(P_i / Q_i)

P is the histogram of |x| up to T with all that lies beyond added to its last bin; Q is the histogram up to T pressed
into as many levels as there are integers and spread again over the bins that hold values. (Migacz, 2017, "8-bit
Inference with TensorRT", slides 20-38.) [0, T] has the wider side's share of 256 levels: all of them for a ReLU, 128
where both sides are alike. The bin around zero is set to its neighbour's count, as NVIDIA's pytorch-quantization does
(calib/histogram.py, v2.1): a ReLU's zeros are represented exactly by every range and would drown everything else.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array, Observer
from edgeship.calibration.values.histogram import Histogram

LEVELS = 256
_STRIDE = 16
_TOGETHER = 2
"""Bins of the histogram that make one of the search's: 2048 as TensorRT has them, four times as fast as 4096."""
_NEVER = 1e-9
"""The probability given to a bin that holds only what lies beyond: finite, so that a gap before an outlier counts."""


class Entropy:
    """Remembers a histogram."""

    def __init__(self) -> None:
        self._seen = Histogram()

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        self._seen.update(values)

    def merge(self, other: Observer) -> None:
        """Takes in what another Entropy saw."""
        if not isinstance(other, Entropy):
            raise TypeError(f"an Entropy observer cannot merge a {type(other).__name__}")
        self._seen.merge(other._seen)

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        low, high = self._seen.low, self._seen.high
        counts = self._seen.magnitudes().reshape(-1, _TOGETHER).sum(axis=1).astype(np.float64)
        width = self._seen.width * _TOGETHER
        counts[0] = counts[1]
        levels = round(LEVELS * max(-low, high) / (high - low)) if high > low else LEVELS
        used = int(np.flatnonzero(counts).max(initial=0)) + 1
        ends = [used, *range(used - used % _STRIDE, levels - 1, -_STRIDE)]  # the widest wins a tie
        threshold = min(ends, key=lambda end: _divergence(counts, end, levels)) * width
        return max(low, -threshold), min(high, threshold)


def _divergence(counts: Array, end: int, levels: int) -> float:
    """KL(P || Q) of the range that ends with bin `end`; 0 where there is nothing to press together."""
    kept = counts[:end]
    total = counts.sum()
    if not counts[end:].any() and end <= levels:
        return 0.0
    if not kept.any() or end < levels:
        return float("inf")
    p = kept.copy()
    p[-1] += counts[end:].sum()
    starts = np.arange(levels) * end // levels
    held = kept > 0
    mass = np.add.reduceat(kept, starts)
    bins = np.add.reduceat(held.astype(np.float64), starts)
    level = np.repeat(mass / np.maximum(bins, 1), np.diff(np.append(starts, end)))
    q = np.maximum(np.where(held, level, 0.0) / kept.sum(), _NEVER)
    p /= total
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


ALGORITHM = Entropy
