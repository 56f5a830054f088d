"""Resizing along one axis as a constant matrix: `y = M x` with M [out, in].

Row i holds `w(j - c(i))` at column j, c(i) being where output i samples the input (`coordinates` in resize.py).
linear: w(d) = max(0, 1 - |d|). cubic (Keys, 1981): w(d) = (a + 2)|d|^3 - (a + 3)|d|^2 + 1 for |d| <= 1 and
a|d|^3 - 5a|d|^2 + 8a|d| - 4a for |d| < 2. antialias, where the axis shrinks by s < 1: w(s d), and rows that sum to 1.
Columns beyond the border count as the border itself, or not at all (exclude_outside: the row is then scaled to sum 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeship.calibration.types import Array


@dataclass(frozen=True)
class Kernel:
    """How samples are weighed. `cubic` is the constant a; None: linear."""

    cubic: float | None = None
    antialias: bool = False
    exclude_outside: bool = False

    @property
    def reach(self) -> int:
        """How many pixels to either side have a weight."""
        return 1 if self.cubic is None else 2

    def weights(self, distance: Array) -> Array:
        """w(d) for every distance."""
        d = np.abs(distance)
        if self.cubic is None:
            return np.asarray(np.maximum(1 - d, 0))
        a = self.cubic
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weights: Array = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
        return weights


def matrix(kernel: Kernel, coordinates: Array, size: int, scale: float) -> Array:
    """M of shape [len(coordinates), size]."""
    shrink = min(scale, 1.0) if kernel.antialias else 1.0
    reach = int(np.ceil(kernel.reach / shrink))
    offsets = np.arange(-reach, reach + 1)
    columns = np.floor(coordinates).astype(np.int64)[:, None] + offsets
    weights = kernel.weights((columns - coordinates[:, None]) * shrink)
    if kernel.antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    if kernel.exclude_outside:
        weights = np.where((columns < 0) | (columns >= size), 0.0, weights)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    result = np.zeros((len(coordinates), size))
    rows = np.broadcast_to(np.arange(len(coordinates))[:, None], columns.shape)
    np.add.at(result, (rows, columns.clip(0, size - 1)), weights)
    return result
