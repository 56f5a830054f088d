"""Returns the multiply-accumulates of a model, node by node.

Conv: output elements * (input channels / groups) * kernel elements. Gemm and MatMul: output elements * shared axis.
ConvTranspose: input elements * (output channels / groups) * kernel elements. Everything else counts as none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from edgeship.calibration.errors import InputError

WEIGHT_INPUT: Mapping[str, int] = {
    "Conv": 1,
    "ConvInteger": 1,
    "ConvTranspose": 1,
    "DynamicQuantizeMatMul": 1,
    "FusedConv": 1,
    "FusedGemm": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
"""The operators that multiply and accumulate, ONNX's and ONNX Runtime's, and which input is their weight."""
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "FusedConv", "QLinearConv"})
_GEMMS = frozenset({"FusedGemm", "Gemm", "QGemm"})

Shapes = Mapping[str, tuple[int, ...]]


def node_key(node: ir.Node) -> str:
    """What a node is called in reports: its name, or its first output's."""
    return node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type


def count_macs(model: ir.Model) -> dict[str, int]:
    """Multiply-accumulates by node, for the nodes that have any; one sample where the batch is dynamic.

    Raises InputError when the shapes that decide the number are unknown.
    """
    shapes = infer_shapes(model)
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in WEIGHT_INPUT:
            continue
        key = node_key(node)
        if key in counts:
            key = f"{key} ({node.outputs[0].name})"
        counts[key] = _macs(node, shapes)
    return counts


def infer_shapes(model: ir.Model) -> Shapes:
    """The static shapes of values by name, a dynamic batch taken as 1; values whose shape stays open are left out."""
    import onnx

    proto = onnx.ModelProto()
    try:
        proto.CopyFrom(ir.to_proto(model))
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the model cannot be written as ONNX: {str(error).strip().splitlines()[0][:200]}") from error
    constant = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name not in constant and dimensions and not dimensions[0].HasField("dim_value"):
            dimensions[0].dim_value = 1
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""  # ONNX Runtime's own have the standard's shapes, which onnx infers
    del proto.graph.value_info[:]  # it may still tell of the dynamic batch, as the outputs may
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the model's shapes do not fit together: {str(error).strip().splitlines()[0]}") from error
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dimensions = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dimensions):
            shapes.setdefault(value.name, tuple(dim.dim_value for dim in dimensions))
    return shapes


def _macs(node: ir.Node, shapes: Shapes) -> int:
    def shape(value: ir.Value | None) -> tuple[int, ...]:
        if value is None or value.name is None or value.name not in shapes:
            what = value.name if value is not None else "an input"
            raise InputError(
                f"{node.op_type} {node_key(node)}: its work cannot be counted, the shape of {what!r} is unknown"
            )
        return shapes[value.name]

    weight = shape(node.inputs[WEIGHT_INPUT[node.op_type]])
    if node.op_type == "ConvTranspose":
        return math.prod(shape(node.inputs[0])) * math.prod(weight[1:])
    if node.op_type in _CONVOLUTIONS:
        return math.prod(shape(node.outputs[0])) * math.prod(weight[1:])
    if node.op_type in _GEMMS:
        rows = shape(node.inputs[0])
        return math.prod(weight) * rows[1 if _flag(node, "transA") else 0]
    return math.prod(shape(node.outputs[0])) * shape(node.inputs[0])[-2 if _flag(node, "transA") else -1]


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())
