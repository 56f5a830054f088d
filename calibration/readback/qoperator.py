"""Operators that take the scales of their operands themselves, as QDQ.

    y = Q(op(DQ(x), DQ(w), ...))      bias integers b at scale s_x * s_w: DQ(b)

QLinearConv and QLinearMatMul are the standard's; the others are ONNX Runtime's (com.microsoft), as its quantizer writes
them in QOperator format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import UnsupportedError
from edgeship.calibration.readback.rewrite import Affine, Rewriter, dtype_of, known, place, rank_of
from edgeship.calibration.types import Finding

_TENSOR_ATTRIBUTES = frozenset({"channels_last", "opset"})


def write_qdq(graph: ir.Graph) -> None:
    """Rewrites the quantized operators of `graph` in place. Raises UnsupportedError with all that cannot be."""
    findings = []
    for node in list(graph):
        if node.op_type not in QOPERATORS:
            continue
        channels_last = node.attributes.get_int("channels_last", 0)
        if channels_last:
            where = f"{node.op_type} {node.name!r}"
            findings.append(Finding(where, "has its channels last", "channels_last = 1", "channels first, as in ONNX"))
            continue
        QOPERATORS[node.op_type](node, Rewriter(node))
    if findings:
        raise UnsupportedError("the quantized model cannot be read:", findings)


def _affine(node: ir.Node, rewriter: Rewriter, scale: int, zero_point: int, like: ir.Value | None = None) -> Affine:
    """The parameters at these places, numbers as scalars; a zero point left out is a 0 of the type of `like`."""
    step, zero = place(node, scale), place(node, zero_point)
    if step is None:
        raise UnsupportedError(
            "the quantized model cannot be read:",
            [Finding(f"{node.op_type} {node.name!r}", "has no scale", f"input {scale} is left out", "a scale")],
        )
    if zero is None:
        kind = dtype_of(like) or ir.DataType.UINT8
        steps = known(step)
        zero = rewriter.constant("zero_point", np.zeros(() if steps is None else steps.shape, kind.numpy()))
    return Affine(_flat(rewriter, step), _flat(rewriter, zero))


def _flat(rewriter: Rewriter, value: ir.Value) -> ir.Value:
    """A constant parameter as a scalar or a row."""
    array = known(value)
    if array is None or array.ndim == (0 if array.size == 1 else 1):
        return value
    return rewriter.constant(value.name or "parameter", array.reshape(() if array.size == 1 else -1))


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return [attribute for name, attribute in node.attributes.items() if name not in _TENSOR_ATTRIBUTES]


def _bias(rewriter: Rewriter, value: ir.Value, x: Affine, w: Affine, factor: float = 1.0) -> ir.Value:
    """int32 at scale s_x * s_w as real numbers."""
    left, right = known(x.scale), known(w.scale)
    if left is None or right is None:
        (scale,) = rewriter.write("Mul", [x.scale, w.scale])
        return rewriter.real(value, Affine(scale, None), 0)
    product = left.astype(np.float32) * right.astype(np.float32) * np.float32(factor)
    data = known(value)
    if product.size > 1 and data is not None and data.ndim > 1 and data.size == product.size:
        value = rewriter.constant("bias", data.reshape(-1))
    scale = rewriter.constant("bias_scale", product)
    return rewriter.real(value, Affine(scale, None), 0 if product.ndim else None)


def _conv(node: ir.Node, rewriter: Rewriter) -> None:
    x, w = _affine(node, rewriter, 1, 2), _affine(node, rewriter, 4, 5)
    inputs = [rewriter.real(_value(node, 0), x), rewriter.real(_value(node, 3), w, 0)]
    bias = place(node, 8)
    if bias is not None:
        inputs.append(_bias(rewriter, bias, x, w))
    (y,) = rewriter.write("Conv", inputs, _attributes(node))
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 6, 7))])


def _matmul(node: ir.Node, rewriter: Rewriter) -> None:
    a, b = _affine(node, rewriter, 1, 2), _affine(node, rewriter, 4, 5)
    rows, columns = (rank_of(_value(node, index)) for index in (0, 3))
    left = rewriter.real(_value(node, 0), a, _axis(a, None if rows is None else max(rows - 2, 0)))
    right = rewriter.real(_value(node, 3), b, _axis(b, None if columns is None else columns - 1))
    (y,) = rewriter.write("MatMul", [left, right])
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 6, 7))])


def _axis(meaning: Affine, axis: int | None) -> int | None:
    scales = known(meaning.scale)
    return axis if scales is None or scales.size > 1 else None


def _gemm(node: ir.Node, rewriter: Rewriter) -> None:
    a, b = _affine(node, rewriter, 1, 2), _affine(node, rewriter, 4, 5)
    by_rows = node.attributes.get_int("transB", 0)
    inputs = [rewriter.real(_value(node, 0), a), rewriter.real(_value(node, 3), b, _axis(b, 0 if by_rows else 1))]
    bias, alpha = place(node, 6), node.attributes.get_float("alpha", 1.0)
    if bias is not None:
        inputs.append(_bias(rewriter, bias, a, b, alpha))
    (y,) = rewriter.write("Gemm", inputs, _attributes(node))
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 7, 8, node.inputs[0])) if place(node, 7) else y])


def _pointwise(op_type: str) -> Callable[[ir.Node, Rewriter], None]:
    """Of operators of one operand: (x, scale, zero, y scale, y zero)."""

    def write(node: ir.Node, rewriter: Rewriter) -> None:
        x = rewriter.real(_value(node, 0), _affine(node, rewriter, 1, 2, node.inputs[0]))
        (y,) = rewriter.write(op_type, [x], _attributes(node))
        rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 3, 4, node.inputs[0]))])

    return write


def _elementwise(op_type: str) -> Callable[[ir.Node, Rewriter], None]:
    """Of operators of two operands: (a, scale, zero, b, scale, zero, y scale, y zero)."""

    def write(node: ir.Node, rewriter: Rewriter) -> None:
        operands = [
            rewriter.real(_value(node, at), _affine(node, rewriter, at + 1, at + 2, node.inputs[at])) for at in (0, 3)
        ]
        (y,) = rewriter.write(op_type, operands)
        rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 6, 7, node.inputs[0]))])

    return write


def _mean(node: ir.Node, rewriter: Rewriter) -> None:
    """ReduceMean, whose axes are an attribute up to opset 17 and an input from then on."""
    x = rewriter.real(_value(node, 0), _affine(node, rewriter, 1, 2, node.inputs[0]))
    axes, kept = node.attributes.get("axes"), [a for n, a in node.attributes.items() if n == "keepdims"]
    imports = rewriter.graph.opset_imports
    if axes is None:
        (y,) = rewriter.write("ReduceMean", [x], kept)
    elif imports.get("", 0) < 18:
        (y,) = rewriter.write("ReduceMean", [x], [*kept, axes])
    else:
        (y,) = rewriter.write("ReduceMean", [x, rewriter.constant("axes", np.array(axes.as_ints(), np.int64))], kept)
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 3, 4, node.inputs[0]))])


def _softmax(node: ir.Node, rewriter: Rewriter) -> None:
    """Softmax over one axis, or, as of an opset before 13, over all from `axis` on."""
    x = rewriter.real(_value(node, 0), _affine(node, rewriter, 1, 2, node.inputs[0]))
    rank, old = rank_of(node.inputs[0]), node.attributes.get_int("opset", 13) < 13
    axis = node.attributes.get_int("axis", 1 if old else -1)
    if old and axis not in (-1, (rank or 0) - 1):
        finding = Finding(f"{node.op_type} {node.name!r}", "is over several axes", f"axis {axis}", "the last axis")
        raise UnsupportedError("the quantized model cannot be read:", [finding])
    (y,) = rewriter.write("Softmax", [x], [ir.AttrInt64("axis", axis)])
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 3, 4, node.inputs[0]))])


def _concat(node: ir.Node, rewriter: Rewriter) -> None:
    """Concat: (y scale, y zero, then tensor, scale, zero of each operand)."""
    operands = [
        rewriter.real(_value(node, at), _affine(node, rewriter, at + 1, at + 2, node.inputs[at]))
        for at in range(2, len(node.inputs), 3)
    ]
    (y,) = rewriter.write("Concat", operands, _attributes(node))
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 0, 1, node.inputs[2]))])


def _where(node: ir.Node, rewriter: Rewriter) -> None:
    """Where: (condition, then tensor, scale, zero of both, y scale, y zero)."""
    operands = [
        rewriter.real(_value(node, at), _affine(node, rewriter, at + 1, at + 2, node.inputs[at])) for at in (1, 4)
    ]
    (y,) = rewriter.write("Where", [_value(node, 0), *operands])
    rewriter.finish([rewriter.integers(y, _affine(node, rewriter, 7, 8, node.inputs[1]))])


def _value(node: ir.Node, index: int) -> ir.Value:
    value = place(node, index)
    if value is None:
        finding = Finding(f"{node.op_type} {node.name!r}", "lacks an operand", f"input {index}", "a tensor")
        raise UnsupportedError("the quantized model cannot be read:", [finding])
    return value


QOPERATORS: Mapping[str, Callable[[ir.Node, Rewriter], None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "QLinearAdd": _elementwise("Add"),
    "QLinearMul": _elementwise("Mul"),
    "QLinearSigmoid": _pointwise("Sigmoid"),
    "QLinearLeakyRelu": _pointwise("LeakyRelu"),
    "QLinearAveragePool": _pointwise("AveragePool"),
    "QLinearGlobalAveragePool": _pointwise("GlobalAveragePool"),
    "QLinearReduceMean": _mean,
    "QLinearSoftmax": _softmax,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
}
"""How each is written."""
