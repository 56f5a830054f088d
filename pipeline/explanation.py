"""Returns why layers differ: what lies beyond a layer's range, how much of the range is used, and what follows.

saturated   values at an end of the integer range whose reference lies beyond it by more than a step
spread      the standard deviation of the reference, in quantization steps: how many integers typical values use
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.calibration.types import Array

if TYPE_CHECKING:
    from edgeship.pipeline.layers import LayerDifference

DIVERGED_DB = 20.0
"""Under this much signal to noise (an amplitude of a tenth) a layer's output is another one."""
MANY = 1e-3
COARSE = 4.0
"""Typical values on fewer integers than this leave the layer 3 bits."""


@dataclass(frozen=True)
class Use:
    """How a layer's values use its integer range [low, high]."""

    low: float
    high: float
    saturated: int
    count: int
    spread: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"range": [self.low, self.high], "saturated": self.saturated, "spread_steps": round(self.spread, 4)}


class RangeUse:
    """Counts over samples for one layer with the given range and quantization step; memory does not grow."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self._low, self._high, self._step = low, high, step
        self._saturated = self._count = 0
        self._sum = self._square = 0.0

    def update(self, reference: Array, candidate: Array) -> None:
        """Takes in one sample's values."""
        near = 0.5 * self._step
        beyond = (candidate >= self._high - near) & (reference > self._high + self._step)
        beyond |= (candidate <= self._low + near) & (reference < self._low - self._step)
        self._saturated += int(beyond.sum())
        self._count += reference.size
        self._sum += float(reference.sum(dtype=np.float64))
        self._square += float(np.square(reference, dtype=np.float64).sum())

    def result(self) -> Use:
        """What was counted."""
        count = max(self._count, 1)
        variance = max(0.0, self._square / count - (self._sum / count) ** 2)
        return Use(self._low, self._high, self._saturated, self._count, math.sqrt(variance) / self._step)


def explain(layers: Sequence[LayerDifference], budget: float) -> list[str]:
    """The first layer that diverges and the likely cause, in words; empty where none does.

    Against a quantized reference a layer diverges that is off by more than `budget` steps by itself; against a float
    one the first under 20 dB does.
    """
    judged = [layer for layer in layers if layer.own is not None]
    if judged:
        first = next((layer for layer in judged if layer.own is not None and layer.own.max_steps > budget), None)
    else:
        first = next((layer for layer in layers if layer.difference.sqnr_db < DIVERGED_DB), None)
    if first is None:
        return []
    return [f"first to diverge: {first.name} ({first.operator}); likely cause: {cause_of(first, layers)}"]


def cause_of(layer: LayerDifference, layers: Sequence[LayerDifference]) -> str:
    """What most likely makes the layer differ."""
    use = layer.use
    if use is not None and use.saturated > MANY * use.count:
        return (
            f"{100 * use.saturated / use.count:.2g} % of its values lie beyond [{use.low:.4g}, {use.high:.4g}], the "
            "range that was chosen: more calibration samples, a wider algorithm, or an override of its range"
        )
    if layer.own is not None:
        share = layer.own.mean_steps / layer.own.max_steps if layer.own.max_steps else 0.0
        if share < MANY:
            return "few of its values are off, by much: channels that clip, or have other weights"
        return "it computes something else from the same inputs: other weights or another kernel"
    if use is not None and use.spread < COARSE:
        return (
            f"its typical values use {use.spread:.1f} integers: a few extremes decide the range "
            f"[{use.low:.4g}, {use.high:.4g}]; try algorithm percentile or mse, equalize, or int16 for it"
        )
    before = [each for each in layers[: layers.index(layer)] if math.isfinite(each.difference.sqnr_db)]
    if before and before[-1].difference.sqnr_db - layer.difference.sqnr_db < 6:
        return "noise that has accumulated in the layers before it: see `edgeship sensitivity` for the dearest"
    return "the rounding of its own weights or output: try the refinements weight_scale and equalize"
