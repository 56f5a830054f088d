"""Layers with int8 weights and float activations -> integer kernels that quantize the activations at run time.

    x -> DynamicQuantizeLinear -> x_q, s_x, z_x
    y = (sum (x_q - z_x) w_q) s_x s_w[c] + b     (ConvInteger, MatMulInteger; Cast, Mul, Add in float32)

ONNX Runtime fuses the MatMul form into one kernel (DynamicQuantizeMatMul). `simulated` is the same in float
arithmetic: what the artifact is compared with. Only of a model in which nothing but weights is quantized: where some
activations have ranges that were chosen beforehand, float ones are float because somebody wanted them so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import attribute, constant_array, is_float, node_key
from edgeship.calibration.readback.quantized import quantizes_activations
from edgeship.calibration.types import Array


def make_dynamic(model: ir.Model) -> None:
    """Rewrites the layers of `model` that have int8 weights and float activations, in place.

    What nothing reads is dropped, also where no layer is rewritten.
    """
    writer = _Writer(model.graph)
    for node in [] if quantizes_activations(model.graph) else list(model.graph):
        dequantize = weight_only(node)
        if dequantize is not None:
            writer.rewrite(node, dequantize)
    writer.remove_idle()


def simulated(model: ir.Model) -> ir.Model:
    """What the rewritten model computes, in float: activations rounded at run time, weights as they are."""
    if quantizes_activations(model.graph):
        return model
    copy = model.clone()
    writer = _Writer(copy.graph)
    for node in list(copy.graph):
        if weight_only(node) is not None:
            node.replace_input_with(0, writer.rounded(node))
    return copy


def weight_only(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of the node's int8 weights where its activations are float; else None."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"} or len(node.inputs) < 2:
        return None
    data, weight = node.inputs[0], node.inputs[1]
    dequantize = weight.producer() if weight is not None else None
    if data is None or dequantize is None or dequantize.op_type != "DequantizeLinear" or not is_float(data):
        return None
    source = data.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        return None
    integers, scale = constant_array(dequantize.inputs[0]), constant_array(dequantize.inputs[1])
    if integers is None or scale is None or integers.dtype != np.int8 or _has_zero_point(dequantize):
        return None
    return dequantize if _fits(node, integers, scale) else None


def _has_zero_point(dequantize: ir.Node) -> bool:
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if zero_point is None:
        return False
    array = constant_array(zero_point)
    return array is None or bool(array.any())


def _fits(node: ir.Node, integers: Array, scale: Array) -> bool:
    """Whether the scale can be applied behind the sum: one number, or one per output channel."""
    if node.op_type == "Conv":
        return scale.size in (1, integers.shape[0])
    if node.op_type == "Gemm":
        plain = (
            not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
        )
        return plain and scale.size in (1, integers.shape[0 if attribute(node, "transB", 0) else 1])
    return integers.ndim == 2 and scale.size in (1, integers.shape[1])


class _Writer:
    """Adds nodes; what several layers need of one value is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._quantized: dict[ir.Value, ir.Node] = {}
        self._real: dict[ir.Value, ir.Value] = {}

    def _node(
        self, op: str, inputs: list[ir.Value], name: str, before: ir.Node, attributes: dict[str, int] | None = None
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes or {}, name=name)
        node.outputs[0].name = name
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, name: str, values: Array) -> ir.Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _dynamic(self, data: ir.Value, before: ir.Node) -> ir.Node:
        if data not in self._quantized:
            node = ir.node("DynamicQuantizeLinear", [data], name=f"{data.name}__dynamic", num_outputs=3)
            for output, suffix in zip(node.outputs, ("q", "scale", "zero_point"), strict=True):
                output.name = f"{data.name}__dynamic_{suffix}"
            self._graph.insert_before(before, node)
            self._quantized[data] = node
        return self._quantized[data]

    def rounded(self, node: ir.Node) -> ir.Value:
        """The node's data as its integer kernel sees it."""
        data = node.inputs[0]
        if data is None:
            raise ValueError(f"{node_key(node)} has no data input")
        if data not in self._real:
            dynamic = self._dynamic(data, node)
            real = self._node("DequantizeLinear", list(dynamic.outputs), f"{data.name}__dynamic_real", node)
            real.type, real.shape = ir.TensorType(ir.DataType.FLOAT), data.shape
            self._real[data] = real
        return self._real[data]

    def rewrite(self, node: ir.Node, dequantize: ir.Node) -> None:
        """Puts the integer form in the place of one layer."""
        data, output, source = node.inputs[0], node.outputs[0], dequantize.inputs[0]
        integers, scale = constant_array(source), constant_array(dequantize.inputs[1])
        if data is None or source is None or integers is None or scale is None:
            raise ValueError(f"{node_key(node)} has no int8 weights")
        stem = str(output.name)
        dynamic = self._dynamic(data, node)
        x, x_scale, x_zero = dynamic.outputs
        if node.op_type == "Conv":
            inner = ir.node("ConvInteger", [x, source, x_zero], name=node_key(node))
            inner.attributes.update(dict(node.attributes.items()))
            column = (1, -1, *(1,) * (integers.ndim - 2))
        else:
            if attribute(node, "transB", 0):
                source = self._constant(f"{source.name}__transposed", np.ascontiguousarray(integers.T))
            zero = self._constant(f"{source.name}__zero", np.zeros((), np.int8))
            inner = ir.node("MatMulInteger", [x, source, x_zero, zero], name=node_key(node))
            column = (-1,)
        inner.outputs[0].name = f"{stem}__sum"
        self._graph.insert_before(node, inner)
        real = self._node("Cast", [inner.outputs[0]], f"{stem}__sum_float", node, {"to": int(ir.DataType.FLOAT)})
        factor = scale.reshape(column) if scale.size > 1 else scale.reshape(())
        weights = self._constant(f"{source.name}__factor", np.asarray(factor, np.float32))
        both = self._node("Mul", [x_scale, weights], f"{stem}__scale", node)
        result = self._node("Mul", [real, both], f"{stem}__scaled", node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            result = self._node("Add", [result, self._bias(bias, column)], f"{stem}__biased", node)
        self._replace(node, output, result)

    def _bias(self, bias: ir.Value, column: tuple[int, ...]) -> ir.Value:
        array = constant_array(bias)
        if array is None or len(column) == 1:
            return bias
        return self._constant(f"{bias.name}__column", np.ascontiguousarray(array.reshape(column)))

    def _replace(self, node: ir.Node, output: ir.Value, result: ir.Value) -> None:
        name, result.type, result.shape = output.name, output.type, output.shape
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        result.name = name

    def remove_idle(self) -> None:
        """Removes the DequantizeLinear nodes and constants that nothing reads any more."""
        for node in [n for n in self._graph if n.op_type == "DequantizeLinear" and not n.outputs[0].uses()]:
            if not node.outputs[0].is_graph_output():
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
