"""ONNX's operators on integers, written with real numbers between DequantizeLinear and QuantizeLinear.

    DequantizeLinear: y = (x - z) * s          QuantizeLinear: y = saturate(round(x / s) + z)

ConvInteger and MatMulInteger are sums of products of at most 255 * 255; float32 holds 258 of them exactly, longer sums
are taken in parts that are added as int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx

from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Node, Tensor, Unsupported

EXACT_TERMS = 2**24 // 255**2
"""Products of two 8-bit numbers whose sum float32 holds exactly."""
FLOAT, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
NARROW = (1, 2)
"""Bytes of the integers that float32 holds exactly."""


def _kind(dtype: np.dtype[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _real(scope: Scope, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == np.float32 else scope.op("Cast", tensor, to=FLOAT)


def _is_zero(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.data is not None and not tensor.data.any())


def _aligned(scope: Scope, node: Node, parameter: Tensor) -> Tensor:
    """A scale or zero point in a shape that broadcasts with the node's first input."""
    x, block = node.x, int(node.attribute("block_size", 0))
    if parameter.size == 1:
        return scope.op("Reshape", parameter, np.zeros(0, np.int64))
    axis = node.axis(1)
    if not block:
        return scope.op("Reshape", parameter, np.array([-1 if a == axis else 1 for a in range(x.rank)], np.int64))
    shape = np.array([*parameter.shape[: axis + 1], block, *parameter.shape[axis + 1 :]], np.int64)
    repeated = scope.op("Expand", scope.op("Unsqueeze", parameter, np.array([axis + 1], np.int64)), shape)
    whole = np.array([s * block if a == axis else s for a, s in enumerate(parameter.shape)], np.int64)
    joined = scope.op("Reshape", repeated, whole)
    if whole[axis] == x.shape[axis]:
        return joined
    return scope.op("Slice", joined, *(np.array([n], np.int64) for n in (0, x.shape[axis], axis)))


def expand_dequantize(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """(x - zero point) * scale."""
    x, scale, zero = node.x, node.tensor(1), node.tensor(2) if node.has(2) else None
    if zero is None or _is_zero(zero):
        values = _real(scope, x)
    elif x.dtype.itemsize in NARROW:
        values = scope.op("Sub", _real(scope, x), _real(scope, _aligned(scope, node, zero)))
    else:
        values = _real(scope, scope.op("Sub", x, _aligned(scope, node, zero)))
    values = scope.op("Mul", values, _real(scope, _aligned(scope, node, scale)))
    return [values if scale.dtype == np.float32 else scope.op("Cast", values, to=_kind(scale.dtype))]


def expand_quantize(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """saturate(round(x / scale) + zero point), rounding half to even."""
    x, scale, zero = node.x, node.tensor(1), node.tensor(2) if node.has(2) else None
    told = int(node.attribute("output_dtype", 0))
    dtype = zero.dtype if zero is not None else onnx.helper.tensor_dtype_to_np_dtype(told or onnx.TensorProto.UINT8)
    if dtype.kind not in "iu" or dtype.itemsize not in NARROW:
        raise Unsupported("integers of this type are not known", str(dtype), "int8, uint8, int16, uint16")
    steps = scope.op("Round", scope.op("Div", _real(scope, x), _real(scope, _aligned(scope, node, scale))))
    if zero is not None and not _is_zero(zero):
        steps = scope.op("Add", steps, _real(scope, _aligned(scope, node, zero)))
    low, high = (np.array(limit, np.float32) for limit in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    return [scope.op("Cast", scope.op("Clip", steps, low, high), to=_kind(dtype))]


def _centered(scope: Scope, node: Node, index: int, zero: int, shape: Sequence[int]) -> Tensor:
    """Input `index` less its zero point (input `zero`, seen in `shape` where there are several), as real numbers."""
    values = _real(scope, node.tensor(index))
    if not node.has(zero) or _is_zero(node.tensor(zero)):
        return values
    point = node.tensor(zero)
    aligned = scope.op("Reshape", _real(scope, point), np.array(shape if point.size > 1 else (), np.int64))
    return scope.op("Sub", values, aligned)


def _part(scope: Scope, tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    if (start, stop) == (0, tensor.shape[axis]):
        return tensor
    return scope.op("Slice", tensor, *(np.array([n], np.int64) for n in (start, stop, axis)))


def _summed(scope: Scope, parts: Sequence[Tensor]) -> Tensor:
    """The parts, each exact in float32, added as int32."""
    return reduce(lambda a, b: scope.op("Add", a, b), [scope.op("Cast", part, to=INT32) for part in parts])


def expand_matmul_integer(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """MatMul of real numbers, in parts short enough to be exact."""
    a, b = _centered(scope, node, 0, 2, (-1, 1)), _centered(scope, node, 1, 3, (-1,))
    depth, rows = a.shape[-1], max(b.rank - 2, 0)
    parts = []
    for start in range(0, depth, EXACT_TERMS):
        stop = min(start + EXACT_TERMS, depth)
        left, right = _part(scope, a, a.rank - 1, start, stop), _part(scope, b, rows, start, stop)
        parts.append(scope.op("MatMul", left, right))
    return [_summed(scope, parts)]


def expand_conv_integer(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """Conv of real numbers, over few enough channels at a time to be exact."""
    rank = node.x.rank
    x = _centered(scope, node, 0, 2, ())
    w = _centered(scope, node, 1, 3, (-1, *[1] * (rank - 1)))
    channels, window = w.shape[1], int(np.prod(w.shape[2:]))
    step = EXACT_TERMS // window
    if channels > step and (step == 0 or int(node.attribute("group", 1)) > 1):
        raise Unsupported("its sums are too long", f"{channels * window} products", f"{EXACT_TERMS} in one group")
    parts = []
    for start in range(0, channels, max(step, 1)):
        stop = min(start + step, channels)
        whole = (start, stop) == (0, channels)
        given = x if whole else _part(scope, x, 1, start, stop)
        parts.append(scope.op("Conv", given, _part(scope, w, 1, start, stop), **node.attributes))
    return [_summed(scope, parts)]


EXPANSIONS = (
    Expansion(DEQUANTIZE, expand_dequantize, 10),
    Expansion(QUANTIZE, expand_quantize, 10),
    Expansion("ConvInteger", expand_conv_integer, 10),
    Expansion("MatMulInteger", expand_matmul_integer, 10),
)
