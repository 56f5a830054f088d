"""Normalizations of 8-bit tensors, written so that every runtime computes the very same numbers.

    LayerNormalization over n elements of real = s (q - z):     S = sum q,  Q = sum q^2,  m = S / n
        v = max(Q / n - m^2, 0) + epsilon / s^2,  d = sqrt(v)
        y = (q - m) (2 / (d + v / d)) scale + bias
    LpNormalization, p = 2:                                      y = (q - z) / sqrt(sum (q - z)^2)

Neither depends on the scale, the first not on the zero point either, so both can read the integers. Their sums are
whole numbers, which float32 holds exactly below 2^24 in whatever order they are added, and what is left are single
operations that IEEE 754 rounds one way. XNNPACK's square root is now and then a unit in the last place off, which does
not show in d + v / d: that is 2 sqrt(v) in whole such units, whatever d. A runtime's own LayerNormalization adds
fractions in an order of its own: two of them differ in the last place, and one quantized element in a million is
another integer. An LpNormalization whose result leaves the model stays: nothing makes more of its last place.

`edgeship.calibration.readback.exact` makes the operators of it again, for runtimes that have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import attribute, constant_array, node_key, value_name
from edgeship.calibration.types import EXACT_ROW, Array

INTEGERS = "__integers"
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
_AXES_OPSET = 13
"""The first operator set whose ReduceSum takes axes as an input."""


def exact(model: ir.Model) -> ir.Model:
    """`model`, a QDQ model, with the normalizations of 8-bit tensors computed from integers; it is changed in place.

    The DequantizeLinear that they read stays, whether or not others read it: layers are compared at it.
    """
    if model.opset_imports.get("", 0) >= _AXES_OPSET:
        writer = _Writer(model.graph)
        for node in list(model.graph):
            dequantize = _integers_of(node)
            if dequantize is not None and node.op_type == "LayerNormalization":
                writer.layer_norm(node, dequantize)
            elif dequantize is not None and int(attribute(node, "p", 2)) == 2 and _is_read(node):
                writer.lp_norm(node, dequantize)
    return model


def _integers_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of one 8-bit tensor that a normalization reads; None where it reads anything else."""
    if node.op_type not in {"LayerNormalization", "LpNormalization"} or node.domain not in {"", "ai.onnx"}:
        return None
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    if maker is None or maker.op_type != "DequantizeLinear" or len(maker.inputs) < 3 or maker.inputs[0] is None:
        return None
    source, scale, zero_point = maker.inputs[0].producer(), constant_array(maker.inputs[1]), maker.inputs[2]
    zero = constant_array(zero_point)
    if source is None or source.op_type != "QuantizeLinear" or scale is None or scale.size != 1 or zero is None:
        return None
    return maker if ir.DataType.from_numpy(zero.dtype) in _BYTES else None


def _is_read(node: ir.Node) -> bool:
    """Whether other nodes compute with what the node makes, quantized or not."""
    values = [node.outputs[0]]
    for value in values:
        for reader, _ in value.uses():
            if reader.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
                return True
            values.extend(reader.outputs)
    return False


def row(node: ir.Node) -> tuple[int, int] | None:
    """How many trailing axes a LayerNormalization goes over and how many elements these have, where both are known."""
    scale = constant_array(node.inputs[1])
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    axis = int(attribute(node, "axis", -1))
    if scale is None or (axis >= 0 and rank is None):
        return None
    axes = -axis if axis < 0 else int(rank or 0) - axis
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = scale.ndim == axes and (bias is None or constant_array(bias) is not None)
    rest = [value for value in node.outputs[1:] if value.name and (value.uses() or value.is_graph_output())]
    return (axes, scale.size) if plain and not rest and scale.size <= EXACT_ROW else None


class _Writer:
    """Writes normalizations anew; what several read of one tensor is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[str, ir.Value] = {}

    def _whole(self, node: ir.Node, dequantize: ir.Node, zero_point: Array) -> ir.Value:
        """Integers as real numbers: their DequantizeLinear with the scale 1."""
        name = f"{value_name(dequantize.outputs[0])}{INTEGERS}" + ("" if zero_point.any() else "_raw")
        if name not in self._made:
            nodes = _Nodes(self._graph, name, node)
            scale, zero = nodes.constant("scale", np.array(1, np.float32)), nodes.constant("zero_point", zero_point)
            shape = dequantize.outputs[0].shape
            self._made[name] = nodes.write("DequantizeLinear", [dequantize.inputs[0], scale, zero], "", shape)
        return self._made[name]

    def lp_norm(self, node: ir.Node, dequantize: ir.Node) -> None:
        """Lets an LpNormalization read integers."""
        zero_point = constant_array(dequantize.inputs[2])
        if zero_point is not None:
            node.replace_input_with(0, self._whole(node, dequantize, zero_point))

    def layer_norm(self, node: ir.Node, dequantize: ir.Node) -> None:
        """Writes a LayerNormalization in single operations."""
        found, scale, zero_point = row(node), constant_array(dequantize.inputs[1]), constant_array(dequantize.inputs[2])
        if found is None or scale is None or zero_point is None:
            return
        axes, count = found
        x = self._whole(node, dequantize, np.zeros_like(zero_point))
        nodes = _Nodes(self._graph, node_key(node), node)
        epsilon = float(attribute(node, "epsilon", 1e-5)) / float(scale.reshape(())) ** 2
        parameters = (nodes.number("size", count), nodes.number("epsilon", epsilon))
        last = nodes.constant("axes", np.arange(-axes, 0, dtype=np.int64))
        one = None if x.shape is None else ir.Shape([*list(x.shape)[:-axes], *[1] * axes])
        mean, inverse = _statistics(nodes, x, last, parameters, one)
        centred = nodes.write("Sub", [x, mean], "centred", x.shape)
        result = nodes.write("Mul", [centred, inverse], "normal", x.shape)
        result = nodes.write("Mul", [result, node.inputs[1]], "scaled", x.shape)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = nodes.write("Add", [result, node.inputs[2]], "shifted", x.shape)
        old, name = node.outputs[0], node.outputs[0].name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        result.name = name


def _statistics(
    nodes: _Nodes, x: ir.Value, axes: ir.Value, parameters: tuple[ir.Value, ir.Value], shape: ir.Shape | None
) -> tuple[ir.Value, ir.Value]:
    """Mean and 1 / deviation of the rows of `x`; `parameters` are the size of a row and what is added to variances."""
    size, epsilon = parameters
    square = nodes.write("Mul", [x, x], "square", x.shape)
    total = nodes.write("ReduceSum", [x, axes], "sum", shape, keepdims=1)
    squares = nodes.write("ReduceSum", [square, axes], "sum_of_squares", shape, keepdims=1)
    mean = nodes.write("Div", [total, size], "mean", shape)
    difference = nodes.write(
        "Sub",
        [nodes.write("Div", [squares, size], "mean_square", shape), nodes.write("Mul", [mean, mean], "m2", shape)],
        "difference",
        shape,
    )
    variance = nodes.write("Add", [nodes.write("Relu", [difference], "variance", shape), epsilon], "spread", shape)
    root = nodes.write("Sqrt", [variance], "root", shape)
    twice = nodes.write("Add", [root, nodes.write("Div", [variance, root], "quotient", shape)], "twice", shape)
    return mean, nodes.write("Div", [nodes.number("two", 2), twice], "inverse", shape)


class _Nodes:
    """Nodes in front of another, and their constants, under names that begin with `stem`."""

    def __init__(self, graph: ir.Graph, stem: str, before: ir.Node) -> None:
        self._graph, self._stem, self._before = graph, stem, before

    def constant(self, name: str, array: Array) -> ir.Value:
        """A new initializer."""
        name = f"{self._stem}/{name}"
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def number(self, name: str, value: float) -> ir.Value:
        """A scalar constant."""
        return self.constant(name, np.array(value, np.float32))

    def write(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, shape: ir.Shape | None, **attributes: int
    ) -> ir.Value:
        """The result of a new node called `name`, or as the stem where that is empty."""
        full = f"{self._stem}/{name}" if name else self._stem
        value = ir.Value(name=full, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
        node = ir.node(op_type, list(inputs), attributes, name=full, outputs=[value])
        self._graph.insert_before(self._before, node)
        return value
