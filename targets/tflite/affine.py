"""What QuantizeLinear and DequantizeLinear say of integers, read as TFLite stores them: signed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeship.calibration.types import Array, QuantParams, TensorSpec
from edgeship.targets.tflite.graph import DEQUANTIZE, Tensor, Unsupported

INTEGERS = {
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
    ir.DataType.INT16: (16, True),
    ir.DataType.INT32: (32, True),
}
"""Bits, and whether signed, of the integers that a tensor can be stored in."""


def integer_type(node: ir.Node, inputs: list[Tensor | None]) -> ir.DataType:
    """The integers that QuantizeLinear makes or DequantizeLinear reads."""
    zero, x = inputs[2] if len(inputs) > 2 else None, inputs[0]
    if zero is not None and not zero.quant:
        return ir.DataType.from_numpy(zero.dtype)
    if node.op_type == DEQUANTIZE and x is not None:
        told = node.inputs[0].dtype if node.inputs[0] is not None else None
        return told or ir.DataType.from_numpy(x.dtype)
    return ir.DataType(node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8


def is_shifted(zero_points: list[Tensor | None]) -> bool:
    """Whether a zero point is not 0, which TFLite's 16-bit kernels do not know."""
    return any(tensor is not None and bool(tensor.values().any()) for tensor in zero_points)


def quant_params(scale: Array, zero: Array | None, dtype: ir.DataType, axis: int) -> tuple[QuantParams, int]:
    """The parameters as signed integers, and what was subtracted to make them signed."""
    bits, signed = INTEGERS[dtype]
    shift = 0 if signed else 128
    if scale.size == 1:
        scale = scale.reshape(())
    if zero is None or not zero.any():
        points: Array = np.broadcast_to(np.int64(0), scale.shape)  # takes no memory
    else:
        points = zero.astype(np.int64).reshape(scale.shape)
    spec = TensorSpec(bits=bits, signed=True, axis=axis if scale.ndim else None)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise Unsupported("scales must be finite and positive", f"the smallest is {scale.min()}")
    return QuantParams(scale, points - shift if shift else points, spec), shift
