"""Layers whose activations are quantized at run time, as float layers with quantized weights.

    DynamicQuantizeLinear(x) -> x_q, s, z;  MatMulInteger(x_q, w_q, z, z_w) -> Cast -> Mul by s s_w
    becomes  MatMul(x, DequantizeLinear(w_q, s_w, z_w))

(the form that ONNX Runtime's dynamic quantizer writes; ConvInteger alike). The weights keep their integers; how the
activations are rounded is up to the runtime, as it is there.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.readback.rewrite import Affine, Rewriter, known, place, rank_of

_FLOAT = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def write_weight_only(graph: ir.Graph) -> None:
    """Rewrites, in place, every layer whose activations are quantized for it alone and at run time."""
    for node in list(graph):
        if node.op_type in _FLOAT and not node.domain:
            _rewrite(node)


def _rewrite(node: ir.Node) -> None:
    dynamic, weights = _producer(node.inputs[0], "DynamicQuantizeLinear"), node.inputs[1]
    if dynamic is None or weights is None or known(weights) is None or place(node, 2) is not dynamic.outputs[2]:
        return
    cast = _only_reader(node.outputs[0], "Cast")
    product = None if cast is None else _only_reader(cast.outputs[0], "Mul")
    if cast is None or product is None or cast.attributes.get_int("to", 0) != int(ir.DataType.FLOAT):
        return
    scale = _weight_scale(product, cast.outputs[0], dynamic.outputs[1])
    steps = known(scale)
    if scale is None or steps is None or (steps.size > 1 and node.op_type == "ConvInteger"):
        return
    rewriter = Rewriter(product)
    rank, zero = rank_of(weights), place(node, 3)
    axis = None if steps.size == 1 or rank is None else rank - 1
    if zero is not None and (points := known(zero)) is not None and points.size == 1 and steps.size == 1:
        zero = rewriter.constant("zero_point", points.reshape(steps.shape))
    real = rewriter.real(weights, Affine(scale, zero), axis)
    rewriter.finish(rewriter.write(_FLOAT[node.op_type], [dynamic.inputs[0], real], node.attributes.values()))
    for idle in (cast, node, dynamic):
        if idle.graph is not None and not any(value.uses() or value.is_graph_output() for value in idle.outputs):
            idle.graph.remove(idle, safe=True)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type and not value.is_graph_output() else None


def _weight_scale(product: ir.Node, real: ir.Value, scale: ir.Value) -> ir.Value | None:
    """s_w of a product by s s_w; None for any other product."""
    factors = _producer(next((value for value in product.inputs if value is not real), None), "Mul")
    if factors is None or scale not in factors.inputs:
        return None
    return next((value for value in factors.inputs if value is not scale), None)
