"""Samples at computed places: per axis a few pixels (taps) and their weights, taken with one GATHER for all axes.

For a coordinate c, nearest takes round(c); linear floor(c) and the next, weighted 1 - |d|; cubic (Keys, a = -0.75) the
four around it: near ones (a + 2)|d|^3 - (a + 3)|d|^2 + 1, far ones a|d|^3 - 5a|d|^2 + 8a|d| - 4a, d being the distance.
Beyond the image: weight zero, the border pixel, or the reflection `low + R - |(c - low) mod 2R - R|` at `low` and
`low + R`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Operand
from edgeship.targets.tflite.ops.steps import Steps

A = -0.75
ROUNDING = 1.5 * 2**23
"""A float32 of this size has no fraction: adding it rounds to an integer, up to 2^22."""
OFFSETS = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}
FAR, NEAR = (A, -5 * A, 8 * A, -4 * A), (A + 2, -(A + 3), 0.0, 1.0)
POLYNOMIALS = np.array([FAR, NEAR, NEAR, FAR], np.float32)
"""Per tap, the coefficients of |d|^3, |d|^2, |d| and 1."""


@dataclass(frozen=True)
class Sampler:
    """How an image of `sizes` is sampled: `method` nearest, linear or cubic; `padding` zeros, border or reflection.

    `aligned`: reflections happen at the centres of the border pixels, not at their outer edges.
    """

    sizes: tuple[int, ...]
    method: str
    padding: str = "zeros"
    aligned: bool = False

    def taps(self, steps: Steps, at: Operand) -> tuple[Operand, Operand | None]:
        """Flat pixel indices (int32) and weights (None: all one), each [N, P, T], for coordinates [N, P, axes]."""
        if self.method == "nearest":  # half to even; the reference kernels have no ROUND
            at = steps.binary("SUB", steps.binary("ADD", at, ROUNDING), ROUNDING)
        if self.padding == "border" and self.method != "cubic":  # cubic clamps its taps: as PyTorch, ONNX Runtime
            at = self._clamped(steps, at, 1)
        elif self.padding == "reflection":
            at = self._reflected(steps, at, 1)
        count, points, axes = at.shape
        wide = steps.reshape(at, (count, points, axes, 1))
        offsets = np.array(OFFSETS[self.method], np.float32)
        pixels, weights = wide, None
        if self.method != "nearest":
            pixels = steps.binary("ADD", steps.unary("FLOOR", wide), offsets)
            weights = self._weights(steps, steps.unary("ABS", steps.binary("SUB", wide, pixels)))
        if self.padding == "reflection":
            pixels = self._reflected(steps, pixels, 2)
        inside = self._clamped(steps, pixels, 2)
        if self.padding == "zeros":
            valid = steps.cast(steps.compare("EQUAL", inside, pixels), np.float32)
            weights = valid if weights is None else steps.binary("MUL", weights, valid)
        index = self._combined(steps, steps.cast(inside, np.int32), self.sizes)
        return index, None if weights is None else self._combined(steps, weights, None)

    def _vector(self, values: Sequence[float], trailing: int) -> Array:
        """One value per axis, to go with [N, P, axes] (trailing 1) or [N, P, axes, taps] (trailing 2)."""
        return np.asarray(values, np.float32).reshape(-1, *(1,) * (trailing - 1))

    def _clamped(self, steps: Steps, at: Operand, trailing: int) -> Operand:
        bound = steps.term(self._vector([size - 1 for size in self.sizes], trailing), at)
        return steps.binary("MINIMUM", steps.binary("MAXIMUM", at, 0.0), bound)

    def _reflected(self, steps: Steps, at: Operand, trailing: int) -> Operand:
        low = 0.0 if self.aligned else -0.5
        spans = [max(size - 1, 1) if self.aligned else size for size in self.sizes]
        span = self._vector(spans, trailing)
        phase = steps.binary("FLOOR_MOD", steps.binary("SUB", at, low), 2 * span)
        return steps.binary(
            "SUB", steps.term(span + np.float32(low), at), steps.unary("ABS", steps.binary("SUB", phase, span))
        )

    def _weights(self, steps: Steps, distance: Operand) -> Operand:
        if self.method == "linear":
            return steps.binary("SUB", steps.term(1.0, distance), distance)
        cube, square, line, one = POLYNOMIALS.T
        result = steps.binary("ADD", steps.binary("MUL", distance, cube), square)
        for coefficients in (line, one):
            result = steps.binary("ADD", steps.binary("MUL", result, distance), coefficients)
        return result

    def _combined(self, steps: Steps, per_axis: Operand, sizes: Sequence[int] | None) -> Operand:
        """[N, P, axes, K] as [N, P, K ** axes]: flat indices (`sizes` given) or products of weights."""
        count, points, axes, taps = per_axis.shape
        parts = [steps.slice(per_axis, 2, axis, 1) for axis in range(axes)]
        result = steps.reshape(parts[0], (count, points, taps, 1))
        for axis in range(1, axes):
            if sizes is None:
                result = steps.binary("MUL", result, parts[axis])
            else:
                result = steps.binary("ADD", steps.binary("MUL", result, sizes[axis]), parts[axis])
            result = steps.reshape(result, (count, points, result.shape[2] * result.shape[3], 1))
        return steps.reshape(result, (count, points, taps**axes))


def sample(steps: Steps, pixels: Operand, index: Operand, weights: Operand | None) -> Operand:
    """The weighted sums [N, P, C] of the taps of `pixels` [N, pixels, C]."""
    count, points, taps = index.shape
    channels = pixels.shape[-1]
    places = steps.reshape(index, (count, points * taps))
    values = steps.gather(pixels, places, 1, batch_dims=1)
    if taps == 1:
        return values if weights is None else steps.binary("MUL", values, weights)
    values = steps.reshape(values, (count * points, taps, channels))
    if weights is not None:
        values = steps.binary("MUL", values, steps.reshape(weights, (count * points, taps, 1)))
    return steps.reshape(steps.reduce("SUM", values, 1), (count, points, channels))
