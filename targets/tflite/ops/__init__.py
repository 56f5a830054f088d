"""All operators the converter knows, by their ONNX names; one family of them per file."""

from __future__ import annotations

from collections.abc import Mapping

from edgeship.targets.tflite.expansion import Expansion
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import (
    activation,
    conv,
    elementwise,
    matmul,
    normalization,
    pool,
    quantize,
    reduce,
    resize,
    shape,
)

FAMILIES = (activation, conv, elementwise, matmul, normalization, pool, quantize, reduce, resize, shape)
REGISTRY: Mapping[str, Op] = {op.onnx: op for family in FAMILIES for op in family.OPS}
EXPANSIONS: Mapping[str, Expansion] = {}
"""Operators written as other ONNX operators, by their ONNX names."""
