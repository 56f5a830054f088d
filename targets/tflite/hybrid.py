"""Layers with int8 weights and float activations: TFLite's hybrid kernels, and what they compute in float arithmetic.

    s = (max(x, 0) - min(x, 0)) / 255, z = round(-128 - min(x, 0) / s), x_q = clip(round(x / s) + z, -128, 127)
    y = s s_w[c] sum (x_q - z) w_q + b

over each image for TRANSPOSE_CONV, and for CONV_2D (grouped ones too) and DEPTHWISE_CONV_2D with weights per channel;
over each row for FULLY_CONNECTED and BATCH_MATMUL with `asymmetric_quantize_inputs` (measured with LiteRT 2.3: the
reference kernels, the optimised ones and XNNPACK agree). Where all scales are one, TFLite's own CONV_2D rounds
symmetrically and XNNPACK's does not: such a layer stays float. So does one in a model where some activations have
ranges that were chosen beforehand: its own are float because somebody wanted them so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeship.calibration.readback.quantized import quantizes_activations
from edgeship.calibration.types import QuantParams, TensorSpec
from edgeship.targets.tflite.graph import Node, Tensor, constant
from edgeship.targets.tflite.op import Op

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RANGE = 255.0
TINY = 1e-30
"""What stands for the range of a tensor of zeros."""


def runs_hybrid(node: Node, op: Op) -> bool:
    """Whether the node's weights are int8, its activations float, and TFLite has the kernel for it."""
    if op.hybrid is None or len(node.inputs) < 2:
        return False
    x, weights, quant = node.x, node.tensor(1), node.tensor(1).quant
    if quant is None or not weights.is_constant or quant.spec.bits != 8 or quant.zero_point.any():
        return False
    if x.quant or node.y.quant or x.is_constant or x.dtype != np.float32:
        return False
    return not any(limit(node) for limit in (*op.limits, *op.hybrid))


def simulated(model: ir.Model) -> ir.Model:
    """What the hybrid kernels compute, in float: activations rounded at run time, weights as they are."""
    if quantizes_activations(model.graph):
        return model
    copy = model.clone()
    for node in list(copy.graph):
        if _is_hybrid(node):
            _round_activations(node)
    return copy


def _is_hybrid(node: ir.Node) -> bool:
    """`runs_hybrid`, of a node of an ONNX graph."""
    from edgeship.targets.tflite.ops import REGISTRY
    from edgeship.targets.tflite.single import single

    if node.op_type not in LAYERS or len(node.inputs) < 2:
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    weights = _quantized(node.inputs[1])
    readers = {reader.op_type for reader, _ in node.outputs[0].uses()}
    if weights is None or "QuantizeLinear" in readers or (source is not None and source.op_type == "DequantizeLinear"):
        return False
    lowered = single(node)
    lowered.inputs[1] = weights
    return runs_hybrid(lowered, REGISTRY[node.op_type])


def _quantized(value: ir.Value | None) -> Tensor | None:
    """The int8 constant that DequantizeLinear makes `value` of, or None."""
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    integers, scale, zero = (
        None if given is None else ir.convenience.get_const_tensor(given) for given in (*dequantize.inputs, None)[:3]
    )
    if integers is None or scale is None or (zero is not None and zero.numpy().any()):
        return None
    if integers.dtype != ir.DataType.INT8 or dequantize.attributes.get_int("block_size", 0) != 0:
        return None
    steps = scale.numpy().reshape(-1 if scale.size > 1 else ())
    axis = dequantize.attributes.get_int("axis", 1) % len(integers.shape) if steps.ndim else None
    return constant("weights", integers.numpy(), QuantParams(steps, np.zeros(steps.shape), TensorSpec(8, axis=axis)))


def _round_activations(node: ir.Node) -> None:
    """Puts the rounding of its input in front of one layer."""
    x, graph = node.inputs[0], node.graph
    if x is None or graph is None:
        raise ValueError(f"{node.name} is no layer")
    writer = _Writer(graph, node, f"{x.name}/rounded for {node.name or node.outputs[0].name}")
    rank = None if x.shape is None else len(x.shape)
    if node.op_type in ("Conv", "ConvTranspose"):
        axes = list(range(1, rank or 4))
    else:
        axes = [0] if node.attributes.get_int("transA", 0) else [-1]
    low = writer.op("Min", writer.reduced("ReduceMin", x, axes), writer.number(0.0))
    high = writer.op("Max", writer.reduced("ReduceMax", x, axes), writer.number(0.0))
    span = writer.op("Max", writer.op("Sub", high, low), writer.number(TINY))
    step = writer.op("Div", span, writer.number(RANGE))
    zero = writer.op("Round", writer.op("Sub", writer.number(-128.0), writer.op("Div", low, step)))
    integers = writer.op("Add", writer.op("Round", writer.op("Div", x, step)), zero)
    kept = writer.op("Min", writer.op("Max", integers, writer.number(-128.0)), writer.number(127.0))
    node.replace_input_with(0, writer.op("Mul", writer.op("Sub", kept, zero), step))


class _Writer:
    """Adds operators in front of a node."""

    def __init__(self, graph: ir.Graph, before: ir.Node, stem: str) -> None:
        self._graph, self._before, self._stem, self._count = graph, before, stem, 0

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """The result of one operator."""
        self._count += 1
        node = ir.node(op_type, list(inputs), attributes, name=f"{self._stem}/{op_type}_{self._count}")
        node.outputs[0].name = node.name
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def reduced(self, op_type: str, x: ir.Value, axes: list[int]) -> ir.Value:
        """A reduction that keeps its axes, which are an attribute before opset 18 and an input from then on."""
        if self._graph.opset_imports.get("", 0) < 18:
            return self.op(op_type, x, axes=axes, keepdims=1)
        return self.op(op_type, x, self._constant("axes", np.array(axes, np.int64)), keepdims=1)

    def number(self, value: float) -> ir.Value:
        """A float constant."""
        return self._constant("number", np.array(value, np.float32))

    def _constant(self, name: str, data: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        self._count += 1
        tensor = ir.tensor(data, name=f"{self._stem}/{name}_{self._count}")
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, type=kind, shape=ir.Shape(data.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value
