"""Returns a QDQ graph whose activations are unsigned: q_u8 = q_s8 + 128, zero point + 128, the scale as it is.

The real numbers are the very same, scale * (q - zero point). ONNX Runtime's x86 fusions want unsigned activations: it
turns some signed tensors into unsigned ones itself and not others (those with several readers), and then leaves the
layers between in float. Weights stay int8 and biases int32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

OFFSET = 128
_WEIGHT_PLACE = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1,)}
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Tile"}
    | {"Transpose", "Unsqueeze"}
)
"""Operators that integers pass through unchanged, so that adding a constant before or after is the same."""
_QDQ = ("QuantizeLinear", "DequantizeLinear")
Group = dict[ir.Value, None]
"""An ordered set: what is made must not depend on addresses."""


def make_unsigned(model: ir.Model, *, weights: bool = False) -> None:
    """Rewrites int8 activations of `model` in place, and with `weights` int8 weights too.

    What integer operators compute stays as it is.
    """
    _type_moved(model.graph)
    writer = _Writer(model.graph)
    for group in _groups(model.graph):
        if _is_between(group, model.graph, weights=weights):
            for value in group:
                writer.shift_value(value)
            for node in _quantizers(group):
                writer.shift_zero_point(node)


def _type_moved(graph: ir.Graph) -> None:
    """Sets the types that a file may leave to inference: of quantized tensors, and of what is moved of them."""
    for node in graph:
        if node.op_type == "QuantizeLinear":
            _typed_output(node)
        elif node.op_type in _MOVES and node.inputs[0] is not None:
            for output in node.outputs:
                if output.type is None:
                    output.type = node.inputs[0].type


def _is_signed(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.INT8


def _groups(graph: ir.Graph) -> Iterator[Group]:
    """Sets of int8 values that must change together: those that a moving operator connects."""
    seen: Group = {}
    for start in _signed_values(graph):
        if start in seen:
            continue
        group, waiting = {start: None}, [start]
        while waiting:
            value = waiting.pop()
            nodes = [node for node, _ in value.uses()]
            producer = value.producer()
            nodes += [producer] if producer is not None else []
            for node in nodes:
                if node.op_type not in _MOVES:
                    continue
                for other in (*node.inputs, *node.outputs):
                    if other is not None and _is_signed(other) and other not in group:
                        group[other] = None
                        waiting.append(other)
        seen |= group
        yield group


def _signed_values(graph: ir.Graph) -> Iterator[ir.Value]:
    zero_points = {node.inputs[2] for node in graph if node.op_type in _QDQ and len(node.inputs) > 2}
    for node in graph:
        if node.op_type == "QuantizeLinear" and _is_signed(node.outputs[0]):
            yield node.outputs[0]
        elif node.op_type == "DequantizeLinear" and _is_signed(node.inputs[0]) and node.inputs[0] not in zero_points:
            yield node.inputs[0]  # type: ignore[misc]  # _is_signed saw a value


def _typed_output(node: ir.Node) -> None:
    output = node.outputs[0]
    if output.dtype is None:
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        attribute = node.attributes.get("output_dtype")
        if zero_point is not None and zero_point.dtype is not None:
            output.dtype = zero_point.dtype
        elif attribute is not None and attribute.as_int():
            output.dtype = ir.DataType(attribute.as_int())
        else:
            output.dtype = ir.DataType.UINT8


def _is_between(group: Group, graph: ir.Graph, *, weights: bool) -> bool:
    """Whether the values lie between QuantizeLinear or constants and DequantizeLinear only, and may be shifted."""
    inputs = set(graph.inputs)
    for value in group:
        producer = value.producer()
        if value in inputs or value.is_graph_output():
            return False
        if producer is not None and producer.op_type not in _MOVES and producer.op_type != "QuantizeLinear":
            return False
        for node, _ in value.uses():
            if node.op_type == "DequantizeLinear":
                if not weights and _feeds_weight(node):
                    return False
            elif node.op_type not in _MOVES:
                return False
    return True


def _feeds_weight(dequantize: ir.Node) -> bool:
    """Whether what is dequantized is a layer's weight: constant, at a weight's place."""
    at_weight = any(place in _WEIGHT_PLACE.get(node.op_type, ()) for node, place in dequantize.outputs[0].uses())
    source = dequantize.inputs[0]
    while source is not None and source.producer() is not None:
        producer = source.producer()
        if producer is None or producer.op_type not in (*_MOVES, *_QDQ, "Constant"):
            return False
        if producer.op_type == "Constant":
            return at_weight
        source = producer.inputs[0]
    return at_weight and source is not None and source.const_value is not None


def _quantizers(group: Group) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    for value in group:
        producer = value.producer()
        if producer is not None and producer.op_type == "QuantizeLinear":
            found[producer] = None
        for node, _ in value.uses():
            if node.op_type == "DequantizeLinear":
                found[node] = None
    return list(found)


class _Writer:
    """Shifts values and zero points; zero points that are shared are made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[ir.Value | None, ir.Value] = {}

    def shift_value(self, value: ir.Value) -> None:
        value.type = ir.TensorType(ir.DataType.UINT8)  # a new one: clones of a model share type objects
        if value.const_value is not None:
            shifted = value.const_value.numpy().astype(np.int16) + OFFSET
            value.const_value = ir.Tensor(shifted.astype(np.uint8), name=value.name)

    def shift_zero_point(self, node: ir.Node) -> None:
        old = node.inputs[2] if len(node.inputs) > 2 else None
        if old is None:
            node.resize_inputs(3)
        node.replace_input_with(2, self._zero_point(old, node))
        attribute = node.attributes.get("output_dtype")
        if attribute is not None and attribute.as_int():
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.UINT8))

    def _zero_point(self, old: ir.Value | None, node: ir.Node) -> ir.Value:
        key = old if old is not None else node.inputs[1]
        if key in self._made:
            return self._made[key]
        if old is not None:
            constant = ir.convenience.get_const_tensor(old)
            if constant is None:
                raise ValueError(f"{node.name}: the zero point {old.name!r} is computed; accepted: a constant")
            integers = constant.numpy().astype(np.int16)
        else:
            scale = node.inputs[1]
            tensor = ir.convenience.get_const_tensor(scale) if scale is not None else None
            integers = np.zeros(tensor.shape.numpy() if tensor is not None else (), np.int16)
        stem = f"{(key.name if key is not None else None) or node.outputs[0].name}_u8"
        name, suffix = stem, 0
        while name in self._graph.initializers:
            suffix += 1
            name = f"{stem}{suffix}"
        value = ir.Value(name=name, const_value=ir.Tensor((integers + OFFSET).astype(np.uint8), name=name))
        value.shape, value.type = ir.Shape(integers.shape), ir.TensorType(ir.DataType.UINT8)
        self._graph.register_initializer(value)
        self._made[key] = value
        return value
