"""Returns what a tensor's values look like, for a person: a coarse histogram of a bounded part of them, exact extremes.

Ranges are chosen by the algorithms' own observers; this is what is shown beside the range they chose. It costs the
same whatever the tensor's size: of each sample that it sees every k-th value is counted, k odd, so that it walks
through all columns and channels of a tensor whose sides are even. The extremes are those of all samples where whoever
feeds it shows `extremes` the others too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeship.calibration.types import Array
from edgeship.calibration.values.histogram import Histogram
from edgeship.calibration.values.ranges import Extremes

BINS = 128
"""Bins on either side of zero."""
COUNTED = 4096
"""About so many values of each sample are counted."""


class Silhouette:
    """The outline of a stream of values; takes them in as every statistic of calibration does."""

    def __init__(self, extremes: Extremes | None = None) -> None:
        """Nothing seen yet; `extremes`: those of the same stream, which somebody else shows all of it."""
        self._alone = extremes is None
        self.extremes = Extremes() if extremes is None else extremes
        self._counted = Histogram(BINS)

    def update(self, values: Array) -> None:
        """Takes in one sample's values. Raises ValueError when one is NaN or infinite, or none is given, unless the
        extremes are somebody else's.
        """
        if self._alone:
            self.extremes.update(values)
        flat = np.asarray(values).reshape(-1)
        self._counted.update(flat[:: (flat.size // COUNTED) | 1])

    def to_json(self) -> dict[str, Any]:
        """Exact extremes (zero included) and counts in bins of one `width` on either side of zero.

        `zero` counts (-width, width), `above[i]` counts [(i + 1) width, (i + 2) width), and `below` mirrors it.
        """
        positive, negative = self._counted.one_sided(1), self._counted.one_sided(-1)
        return {
            "low": self.extremes.low,
            "high": self.extremes.high,
            "counted": self._counted.count,
            "width": self._counted.width,
            "zero": int(positive[0]),
            "above": _used(positive[1:]),
            "below": _used(negative[1:]),
        }


def _used(counts: Array) -> list[int]:
    """The counts up to the last that is not zero."""
    return [int(count) for count in np.trim_zeros(counts, "b")]
