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
        threshold = _end(counts, levels) * width
        return max(low, -threshold), min(high, threshold)


def _end(counts: Array, levels: int) -> int:
    """How many bins the range takes that loses the least; the widest of those that lose as little."""
    used = int(np.flatnonzero(counts).max(initial=0)) + 1
    if used <= levels:
        return used
    ends = np.array([used, *range(used - used % _STRIDE, levels - 1, -_STRIDE)])
    return int(ends[_divergences(counts, ends, levels).argmin()])


def _divergences(counts: Array, ends: Array, levels: int) -> Array:
    """KL(P || Q) of the range that ends with each of `ends`, at least `levels` bins; infinite for one without values.

    All bins of a level have one Q, so sums over a range's bins are differences of running sums:
    total * KL = sum_i c_i log c_i - total log total - sum_L m_L log Q_L, m_L the level's count, and the last bin's c_i
    and m_L with what lies beyond.
    """
    seen, held, own = (np.concatenate(([0.0], np.cumsum(each))) for each in (counts, counts > 0, counts * _log(counts)))
    borders = np.arange(levels + 1) * ends[:, np.newaxis] // levels
    mass, bins = np.diff(seen[borders], axis=1), np.diff(held[borders], axis=1)
    total, kept, last = seen[-1], seen[ends], counts[ends - 1]
    beyond = total - kept
    q = np.maximum(mass / (np.maximum(bins, 1) * np.maximum(kept, 1)[:, np.newaxis]), _NEVER)
    of_last = np.where(last > 0, q[:, -1], _NEVER)
    with_beyond = last + beyond
    p_log_p = own[ends] - last * _log(last) + with_beyond * _log(with_beyond) - total * np.log(total)
    p_log_q = (mass * np.log(q)).sum(axis=1) + beyond * np.log(of_last)
    return np.where(kept > 0, (p_log_p - p_log_q) / total, np.inf)


def _log(counts: Array) -> Array:
    """log c, and 0 for c = 0."""
    return np.asarray(np.log(np.maximum(counts, 1)))


ALGORITHM = Entropy
