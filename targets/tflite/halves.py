"""float32 constants that are stored in float16: those of a model with float16 weights, where no value changes."""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array

SMALLEST = 64
"""Elements of a constant that is worth the operator which dequantizes it."""


def as_half(data: Array | None) -> Array | None:
    """The constant in float16; None for one that is small, not float32, or has values that float16 has not."""
    if data is None or data.dtype != np.float32 or data.size < SMALLEST:
        return None
    with np.errstate(over="ignore"):
        half = data.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), data) else None
