"""Ranges of values -> scale and zero point.

Asymmetric: scale = (high - low) / (qmax - qmin), zero_point = round(qmin - low / scale), with low <= 0 <= high so
that zero is exact (padding and ReLU need it). Symmetric: scale = max(|low|, |high|) / qmax, zero_point = 0.
(TensorFlow Lite 8-bit quantization specification; Jacob et al., 2018, section 3.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from edgeship.calibration.types import Array, FixedOutput, QuantParams, TensorSpec

NOTHING = 1e-9
"""Narrower than this is rounding noise around a constant zero: float32 sums of numbers near 1 are not this exact."""


@dataclass(frozen=True)
class Range:
    """An interval that contains zero."""

    low: float = 0.0
    high: float = 0.0

    @property
    def span(self) -> float:
        """Its length."""
        return self.high - self.low

    @property
    def is_nothing(self) -> bool:
        """Whether all values in it are zero, but for rounding noise."""
        return self.span < NOTHING

    def within(self, other: Range, tolerance: float) -> bool:
        """Whether no value lies outside `other` by more than `tolerance`."""
        return self.low >= other.low - tolerance and self.high <= other.high + tolerance


def union(ranges: Iterable[Range]) -> Range:
    """The smallest range that holds all of them."""
    every = [Range(), *ranges]
    return Range(min(r.low for r in every), max(r.high for r in every))


def extremes(values: Array) -> tuple[float, float]:
    """The smallest and largest of `values`. Raises ValueError when there are none, or any is NaN or infinite."""
    if values.size == 0:
        raise ValueError("it is empty")
    low, high = float(np.min(values)), float(np.max(values))
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.size(values) - np.isfinite(values).sum())
        raise ValueError(f"{bad} of its {values.size} values are NaN or infinite")
    return low, high


class Extremes:
    """The smallest and largest of a stream of values and zero."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def update(self, values: Array) -> None:
        """Takes in one batch of float32 values. Raises ValueError when a value is NaN or infinite, or there is none."""
        low, high = extremes(values)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def settled(self, low: float, high: float) -> bool:
        """Whether no value in [low, high] would change anything."""
        return self.low <= low and self.high >= high


def range_of(values: Array) -> Range:
    """The range of an array's values and zero."""
    return Range(min(0.0, float(values.min())), max(0.0, float(values.max()))) if values.size else Range()


def choose(values: Range, spec: TensorSpec) -> QuantParams:
    """Per-tensor parameters that represent `values` with the integers of `spec`.

    A tensor that was never anything but zero gets the range [0, 1]: any scale represents what was seen, this one
    neither overflows the bias nor the requantization multiplier, and keeps small surprises visible.
    """
    if values.is_nothing:
        values = Range(0.0, 1.0)
    if spec.symmetric:
        scale = max(-values.low, values.high) / spec.qmax
        return QuantParams(np.asarray(scale), np.zeros(()), spec)
    scale = values.span / (spec.qmax - spec.qmin)
    zero_point = round(spec.qmin - values.low / scale)
    return QuantParams(np.asarray(scale), np.asarray(min(max(zero_point, spec.qmin), spec.qmax)), spec)


def around_zero(values: Range, spec: TensorSpec) -> QuantParams:
    """Parameters like `choose` gives for an asymmetric format, but with zero point 0."""
    scale = choose(values, replace(spec, symmetric=True)).scale
    return QuantParams(scale, np.zeros(()), spec)


def fixed(demand: FixedOutput, spec: TensorSpec) -> QuantParams:
    """The parameters that a kernel insists on."""
    return QuantParams(np.asarray(demand.scale), np.asarray(demand.zero_point), spec)


def representable(params: QuantParams) -> Range:
    """The range that per-tensor parameters represent."""
    low = (params.spec.qmin - int(params.zero_point)) * float(params.scale)
    high = (params.spec.qmax - int(params.zero_point)) * float(params.scale)
    return Range(low, high)
