"""What is done to quantized constants, done to their integers: QuantizeLinear, Clip and Transpose of weights vanish.

Exporters quantize a weight in the graph (float -> QuantizeLinear), narrow it (-> Clip to [-127, 127]), and turn it into
the order of their operators (-> Transpose, Reshape), before DequantizeLinear or after it.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from edgeship.calibration.readback.rewrite import Rewriter, dtype_of, known, place
from edgeship.calibration.types import Array, QuantParams, TensorSpec

_FORMS = {
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
    ir.DataType.INT16: (16, True),
    ir.DataType.UINT16: (16, False),
}
_RESHAPING = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
MOVING = _RESHAPING | {"Clip", "Identity", "Transpose"}
LARGEST = 1 << 28
"""Elements of a constant that is looked at."""


def fold_constants(graph: ir.Graph) -> None:
    """Computes, in place, what the graph does to constants that are quantized in it."""
    for node in list(graph):
        if not node.inputs or node.domain:
            continue
        if node.op_type == "QuantizeLinear":
            _quantize(node)
        elif node.op_type in MOVING:
            _move(node)
            _move_under(node)
    for name in [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    ]:
        del graph.initializers[name]


def _quantize(node: ir.Node) -> None:
    """A constant through QuantizeLinear is its integers."""
    values, scale = known(node.inputs[0]), known(place(node, 1))
    if values is None or scale is None or node.attributes.get_int("block_size", 0) != 0 or values.dtype != np.float32:
        return
    zero = place(node, 2)
    points = np.zeros(scale.shape, np.uint8) if zero is None else known(zero)
    kind = dtype_of(zero) or ir.DataType(node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8
    if points is None or kind not in _FORMS:
        return
    bits, signed = _FORMS[kind]
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    if axis is None:
        scale, points = scale.reshape(()), points.reshape(())
    elif axis < 0:
        axis += values.ndim
    params = QuantParams(scale, points, TensorSpec(bits=bits, signed=signed, axis=axis))
    rewriter = Rewriter(node)
    rewriter.finish([rewriter.constant("integers", params.quantize(values))])


def _move(node: ir.Node) -> None:
    """Integers that a graph narrows or turns are integers."""
    data = known(node.inputs[0])
    if data is None or data.dtype.kind not in "iu" or data.dtype.itemsize > 2:
        return
    result = _evaluated(node, data)
    if result is not None:
        rewriter = Rewriter(node)
        rewriter.finish([rewriter.constant("integers", result)])


def _move_under(node: ir.Node) -> None:
    """What is turned after DequantizeLinear is turned before it, its channel axis with it."""
    source = node.inputs[0]
    dequantize = source.producer() if source is not None else None
    if node.op_type == "Clip" or dequantize is None or dequantize.op_type != "DequantizeLinear" or node.graph is None:
        return
    data, scale = known(dequantize.inputs[0]), known(place(dequantize, 1))
    if data is None or scale is None or dequantize.attributes.get_int("block_size", 0) != 0:
        return
    result = _evaluated(node, data)
    if result is None:
        return
    axis: int | None = None
    if scale.size > 1:
        axis = _axis_after(node, dequantize.attributes.get_int("axis", 1) % data.ndim, data.shape, result.shape)
        if axis is None:
            return
    rewriter = Rewriter(node)
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    inputs = [rewriter.constant("integers", result), *dequantize.inputs[1:]]
    rewriter.finish(rewriter.write("DequantizeLinear", inputs, attributes))
    if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output() and dequantize.graph:
        dequantize.graph.remove(dequantize, safe=True)


def _axis_after(node: ir.Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Where the channel axis is then; None where it is no axis by itself any more."""
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(len(before))[::-1])
        return list(order).index(axis)
    if node.op_type == "Identity":
        return axis
    places = [a for a, size in enumerate(after) if size == before[axis] and prod(after[:a]) == prod(before[:axis])]
    return places[-1] if places else None


def _evaluated(node: ir.Node, data: Array) -> Array | None:
    """The node's result for the integers `data`; None where it takes more than constants."""
    rest = [known(value) for value in node.inputs[1:]]
    given = [value is not None for value in node.inputs[1:]]
    if data.size > LARGEST or any(there and array is None for there, array in zip(given, rest, strict=True)):
        return None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(data.ndim)[::-1])
        return data.transpose(tuple(order))
    if node.op_type == "Identity":
        return data
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    names = [name for name in proto.input if name]
    feeds = dict(zip(names, [data, *(array for array in rest if array is not None)], strict=True))
    imports = node.graph.opset_imports if node.graph is not None else {}
    evaluator = ReferenceEvaluator(proto, opsets={"": int(imports.get("", 13))})
    (result,) = evaluator.run(None, feeds)
    return np.asarray(result, data.dtype)
