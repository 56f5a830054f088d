"""All operators the converter knows, by their ONNX names; one family of them per file."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from edgeship.targets.tflite.expansion import Expansion
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import (
    activation,
    attention,
    bitwise,
    control,
    conv_space,
    conv_transpose,
    deform,
    detection,
    einsum,
    elementwise,
    fold,
    index,
    integer,
    logic,
    loss,
    matmul,
    normalization,
    pool,
    quantize,
    rearrange,
    recurrent,
    reduce,
    resize,
    sampling,
    scatter,
    shape,
    signal,
    softmax,
    sort,
    unary,
)

FAMILIES: tuple[ModuleType, ...] = (
    activation,
    attention,
    bitwise,
    control,
    conv_space,
    conv_transpose,
    deform,
    detection,
    einsum,
    elementwise,
    fold,
    index,
    integer,
    logic,
    loss,
    matmul,
    normalization,
    pool,
    quantize,
    rearrange,
    recurrent,
    reduce,
    resize,
    sampling,
    scatter,
    shape,
    signal,
    softmax,
    sort,
    unary,
)
"""Each has `OPS`, operators with a conversion of their own, or `EXPANSIONS`, operators written as other ONNX operators,
or both.
"""
REGISTRY: Mapping[str, Op] = {op.onnx: op for family in FAMILIES for op in getattr(family, "OPS", ())}
EXPANSIONS: Mapping[str, Expansion] = {
    item.onnx: item for family in FAMILIES for item in getattr(family, "EXPANSIONS", ())
}
