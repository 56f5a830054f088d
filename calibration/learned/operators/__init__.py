"""The ONNX operators that torch runs here, by name: one file per family, each ending in a table `OPERATORS`."""

from __future__ import annotations

from collections.abc import Mapping

from edgeship.calibration.learned.call import Operator
from edgeship.calibration.learned.operators import (
    elementwise,
    logic,
    matrix,
    normalization,
    pool,
    quantization,
    reduce,
    resize,
    shape,
)

OPERATORS: Mapping[str, Operator] = {
    **elementwise.OPERATORS,
    **logic.OPERATORS,
    **matrix.OPERATORS,
    **normalization.OPERATORS,
    **pool.OPERATORS,
    **quantization.OPERATORS,
    **reduce.OPERATORS,
    **resize.OPERATORS,
    **shape.OPERATORS,
}
"""Operator type -> the function that computes it."""
