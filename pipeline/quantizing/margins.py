"""Returns how many decisions a quantized model is expected to have in common with its float model.

    m_j = x_t - x_j,   d_j = (y_t - y_j) - m_j,   s^2 = mean d_j^2 / 2,   P(same) = E_z prod_j Phi(m_j / s + z)

x are the float model's scores and t its decision, y the quantized model's, j the rivals that come next in x; each score
has noise of its own with the deviation s, that of t is s z, z ~ N(0, 1) (by Gauss-Hermite quadrature). Counting
equal decisions tells 98 from 99 percent only with thousands of samples: nearly all are far from a border, and the few
that are not decide. How far each is from its borders is known (m), and how much the integers move it is measured on
every sample alike (s): so some hundred samples say what share will cross one.

Scores that are probabilities are taken by their logarithm, in which the noise is alike for sure and for unsure samples.
"""

from __future__ import annotations

import math

import numpy as np

from edgeship.calibration.types import Array

RIVALS, NODES = 5, 32
LEAST = 1 / 512
"""Half a step of an 8-bit Softmax: smaller probabilities are all the same."""


class Margins:
    """The margins of a classifier's samples, and how far the quantized model moves them."""

    def __init__(self) -> None:
        self._margins: list[Array] = []
        self._moved = 0.0
        self._count = 0

    @property
    def seen(self) -> bool:
        """Whether there was a decision."""
        return bool(self._count)

    def update(self, reference: Array, candidate: Array) -> None:
        """Takes in the scores (n, classes) of both models."""
        x, y = _comparable(reference), _comparable(candidate)
        nearest = np.argsort(-x, axis=1, kind="stable")[:, : RIVALS + 1]
        x, y = np.take_along_axis(x, nearest, axis=1), np.take_along_axis(y, nearest, axis=1)
        margins = x[:, :1] - x[:, 1:]
        self._margins.extend(margins)
        self._moved += float((((y[:, :1] - y[:, 1:]) - margins) ** 2).sum())
        self._count += margins.size

    def expected_agreement(self) -> float:
        """The share of the samples that both models are expected to decide alike, 0..1; 1 where nothing was seen."""
        if not self._moved:
            return 1.0
        own = math.sqrt(self._moved / self._count / 2)
        at, weights = np.polynomial.hermite_e.hermegauss(NODES)
        same = [_normal(row[:, np.newaxis] / own + at).prod(axis=0) @ weights for row in self._margins]
        return min(1.0, float(np.mean(same) / weights.sum()))  # sums of 1 round to a little more


def _comparable(scores: Array) -> Array:
    """The scores as float64, probabilities as their logarithms."""
    scores = np.asarray(scores, np.float64)
    if (scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=0.05):
        return np.asarray(np.log(np.maximum(scores, LEAST)))
    return scores


def _normal(values: Array) -> Array:
    return np.asarray([0.5 * math.erfc(-value / math.sqrt(2)) for value in values.flat]).reshape(values.shape)
