"""Keeps ONNX Runtime from quantizing the layers that are meant to stay float.

Where a Conv, ConvTranspose or Gemm with float weights stands between a DequantizeLinear and a QuantizeLinear, on its
own or with a Relu or Clip behind it, ONNX Runtime rounds the weights to int8 with one scale per tensor on loading
(its pass WeightBiasQuantization, at every level of optimization) and computes in float all the same. That costs the
very accuracy that the layer is float for: one of MobileNetV1's was off by 25 steps. A MatMul with a constant term
counts as the Gemm that it becomes. The pass has no switch in the model. It passes over a layer whose result goes
through another operator first, and the larger of the result and the lowest number there is, is the result.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import activation_inputs, constant_array, value_name

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PASSED = ("Relu", "Clip", "Add", "Mul", "BatchNormalization")
"""What may stand between a layer and QuantizeLinear; with a constant, ONNX Runtime first writes it into the layer."""
LOWEST = "lowest_float32"


def keep_float(model: ir.Model) -> None:
    """Puts a Max behind every float layer whose weights ONNX Runtime would round; the model is changed in place."""
    lowest: ir.Value | None = None
    for node in list(model.graph):
        if not _would_be_rounded(node):
            continue
        if lowest is None:
            tensor = ir.tensor(np.array(np.finfo(np.float32).min, np.float32), name=LOWEST)
            lowest = ir.Value(name=LOWEST, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
            model.graph.register_initializer(lowest)
        result = node.outputs[0]
        same = ir.Value(name=f"{value_name(result)}__same", type=result.type, shape=result.shape)
        result.replace_all_uses_with(same)
        node.append(ir.node("Max", [result, lowest], name=f"{value_name(result)}__kept", outputs=[same]))


def _would_be_rounded(node: ir.Node) -> bool:
    if node.op_type not in LAYERS or node.domain not in {"", "ai.onnx"} or node.outputs[0].is_graph_output():
        return False
    data, weights = node.inputs[0], node.inputs[1]
    source = data.producer() if data is not None else None
    constant = weights is not None and weights.dtype == ir.DataType.FLOAT and constant_array(weights) is not None
    if not constant or source is None or source.op_type != "DequantizeLinear":
        return False
    return _is_rounded(node, needs_term=node.op_type == "MatMul")  # with a term it becomes a Gemm


def _is_rounded(node: ir.Node, *, needs_term: bool) -> bool:
    """Whether what the node makes goes to QuantizeLinear, through what is written into the layer or not."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if not needs_term and any(reader.op_type == "QuantizeLinear" for reader in readers):
        return True
    return any(
        reader.op_type in PASSED
        and len(activation_inputs(reader)) == 1
        and _is_rounded(reader, needs_term=needs_term and reader.op_type != "Add")
        for reader in readers
    )
