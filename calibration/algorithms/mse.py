"""Range = the one whose 256 integers represent the values seen with the least squared error.

    argmin over low <= 0 <= high of  sum_i (x_i - x_hat_i)^2,  s = (high - low) / 255,
    x_hat_i = s (clip(round(x_i / s) + z, 0, 255) - z),  z = round(-low / s)

A narrower range rounds finer and clips more. Both ends shrink together first, then each alone (Choukroun et al., 2019,
"Low-bit Quantization of Neural Networks for Efficient Inference", section 3.2, by search as in their section 4; Nagel
et al., 2021, "A White Paper on Neural Network Quantization", section 3.1.1). The values are those of a histogram, each
at the centre of its bin, which at the full range is a sixteenth to an eighth of a step wide.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array, Observer
from edgeship.calibration.values.histogram import BINS, Histogram

LEVELS = 256
_SHARES = tuple(k / 50 for k in range(1, 51))
_WORTH = 0.99
"""A narrower range must save at least a hundredth of the error: less is within what bins can tell."""


class Mse:
    """Remembers a histogram."""

    def __init__(self) -> None:
        self._seen = Histogram()

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        self._seen.update(values)

    def merge(self, other: Observer) -> None:
        """Takes in what another Mse saw."""
        if not isinstance(other, Mse):
            raise TypeError(f"an Mse observer cannot merge a {type(other).__name__}")
        self._seen.merge(other._seen)

    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high."""
        low, high = full = self._seen.low, self._seen.high
        values, counts = self._values()
        if not values.size:
            return full
        best = _best(values, counts, [(low * share, high * share) for share in _SHARES])
        if low < 0 < high:
            best = _best(values, counts, [(best[0], high * share) for share in _SHARES] + [best])
            best = _best(values, counts, [(low * share, best[1]) for share in _SHARES] + [best])
        gained = _error(values, counts, *best) <= _WORTH * _error(values, counts, *full)
        return best if gained else full

    def _values(self) -> tuple[Array, Array]:
        """The centres of the bins that hold values and how many each: float64. Bin 0 is zero, which has no error."""
        centres = (np.arange(1, BINS) + 0.5) * self._seen.width
        values = np.concatenate([-centres, centres])
        counts = np.concatenate([self._seen.one_sided(sign)[1:] for sign in (-1, 1)])
        held = counts > 0
        return values[held], counts[held].astype(np.float64)


def _best(values: Array, counts: Array, candidates: list[tuple[float, float]]) -> tuple[float, float]:
    return min(candidates, key=lambda ends: _error(values, counts, *ends))


def _error(values: Array, counts: Array, low: float, high: float) -> float:
    scale = (high - low) / (LEVELS - 1)
    if scale <= 0:
        return float("inf")
    zero = np.rint(-low / scale)
    nearest = np.clip(np.rint(values / scale), -zero, LEVELS - 1 - zero) * scale
    return float(counts @ (values - nearest) ** 2)


ALGORITHM = Mse
