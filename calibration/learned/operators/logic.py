"""Comparisons, choices and casts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX's element types (TensorProto.DataType) that torch computes with."""


def _cast(call: Call) -> Tensor:
    wanted = int(call.get("to"))
    if wanted not in _DTYPES:
        raise call.refuse(f"a cast to ONNX element type {wanted}", f"types {', '.join(map(str, sorted(_DTYPES)))}")
    return call.tensor().to(_DTYPES[wanted])


def _where(call: Call) -> Tensor:
    return torch.where(call.tensor(0), call.tensor(1), call.tensor(2))


OPERATORS: Mapping[str, Operator] = {
    "And": lambda call: torch.logical_and(call.tensor(0), call.tensor(1)),
    "Cast": _cast,
    "CastLike": lambda call: call.tensor(0).to(call.tensor(1).dtype),
    "Equal": lambda call: torch.eq(call.tensor(0), call.tensor(1)),
    "Greater": lambda call: torch.gt(call.tensor(0), call.tensor(1)),
    "GreaterOrEqual": lambda call: torch.ge(call.tensor(0), call.tensor(1)),
    "Less": lambda call: torch.lt(call.tensor(0), call.tensor(1)),
    "LessOrEqual": lambda call: torch.le(call.tensor(0), call.tensor(1)),
    "Not": lambda call: torch.logical_not(call.tensor()),
    "Or": lambda call: torch.logical_or(call.tensor(0), call.tensor(1)),
    "Where": _where,
    "Xor": lambda call: torch.logical_xor(call.tensor(0), call.tensor(1)),
}
