"""A histogram of a stream of values with fixed-size state, which grows with the values and merges without loss.

    width = 2^e,  bin of x = trunc(x / width) in (-BINS, BINS),  e the smallest with max|x| < BINS * 2^e

Bins are aligned on zero and their width is a power of two, so that

- binning is exact: dividing a float by a power of two does not round (an underflow lands in bin 0, where it belongs),
- a coarser histogram is the sum of pairs of bins of a finer one: trunc(trunc(x / w) / 2) = trunc(x / 2w).

Hence the state depends on which values were seen and not on their order or on who saw them: any split of a stream,
merged, is the same histogram. Bin 0 holds (-width, width), which suits values of which many are exactly zero (ReLU).
"""

from __future__ import annotations

import math

import numpy as np

from edgeship.calibration.types import Array
from edgeship.calibration.values.ranges import extremes

BINS = 4096
"""Bins on either side of zero unless told otherwise; between half and all of one side's are in use: 8 to 16 for each of
256 integers."""
_FINEST = -126
"""Bins as wide as float32's smallest normal number; 2^126 is a float32 too."""
_CHUNK = 1 << 16


class Histogram:
    """Counts of values in bins of one width, and their exact extremes."""

    def __init__(self, bins: int = BINS) -> None:
        """Nothing seen yet; `bins`, a power of two, on either side of zero."""
        self.low = 0.0
        self.high = 0.0
        self.exponent = _FINEST
        self._bins = bins
        self._positive = np.zeros(bins, np.int64)
        self._negative = np.zeros(bins, np.int64)  # of |x|, for x < 0; its first bin stays empty

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return int(self._positive.sum() + self._negative.sum())

    def update(self, values: Array) -> None:
        """Takes in finite float32 values of any shape. Raises ValueError when one is NaN or infinite, or none given."""
        low, high = extremes(values)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(_exponent(max(-low, high), self._bins))
        flat = np.asarray(values, np.float32).reshape(-1)
        per_bin = np.float32(math.ldexp(1.0, -self.exponent))
        places = np.empty(min(_CHUNK, flat.size), np.float32)
        bins = np.empty(places.size, np.intp)
        offset = self._bins if low < 0 else 0
        counts = np.zeros(offset + self._bins, np.int64)
        for start in range(0, flat.size, _CHUNK):  # small enough for the processor's cache
            chunk = flat[start : start + _CHUNK]
            index = bins[: chunk.size]
            np.multiply(chunk, per_bin, out=places[: chunk.size])
            index[...] = places[: chunk.size]
            if offset:
                index += offset
            counts += np.bincount(index, minlength=counts.size)
        self._positive += counts[offset:]
        if offset:
            self._negative[1:] += counts[self._bins - 1 : 0 : -1]

    def merge(self, other: Histogram) -> None:
        """Takes in what `other` saw; `other` stays as it is."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._grow(other.exponent)
        halvings = self.exponent - other.exponent
        self._positive += _coarser(other._positive, halvings)
        self._negative += _coarser(other._negative, halvings)
        self._negative_to_zero()

    def one_sided(self, sign: int) -> Array:
        """The counts by |x| of the values with `sign` (1 or -1): int64 (bins,). Zeros count as positive."""
        return (self._positive if sign > 0 else self._negative).copy()

    def magnitudes(self) -> Array:
        """The counts by |x| of all values: int64 (bins,)."""
        return self._positive + self._negative

    def _grow(self, exponent: int) -> None:
        if exponent > self.exponent:
            self._positive = _coarser(self._positive, exponent - self.exponent)
            self._negative = _coarser(self._negative, exponent - self.exponent)
            self._negative_to_zero()
            self.exponent = exponent

    def _negative_to_zero(self) -> None:
        """The bin around zero is one bin, whichever side its values came from."""
        self._positive[0] += self._negative[0]
        self._negative[0] = 0


def _exponent(largest: float, bins: int) -> int:
    """The smallest e with largest < bins * 2^e."""
    if largest == 0:
        return _FINEST
    return max(math.frexp(largest)[1] - (bins.bit_length() - 1), _FINEST)


def _coarser(counts: Array, halvings: int) -> Array:
    """The counts in bins 2^halvings as wide."""
    if halvings <= 0:
        return counts
    group = 1 << min(halvings, counts.size.bit_length() - 1)
    merged = np.zeros_like(counts)
    merged[: counts.size // group] = counts.reshape(-1, group).sum(axis=1)
    return merged
