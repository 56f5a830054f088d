"""Float models of which only the weights are small: int8 per channel (mode dynamic), or float16. No data is needed.

    int8:     w_q = round(w / s_w[c]), s_w[c] = max|w[c]| / 127  ->  DequantizeLinear  ->  the layer, in float
    float16:  w_h = float16(w)                                   ->  Cast to float32  ->  the layer, in float

These are the quantized models; what a target makes of them is its own: integer kernels that quantize the activations
at run time, or float ones that dequantize the weights. A weight that cannot be kept small has its reason in the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import (
    Layer,
    constant_array,
    constant_key,
    node_key,
    read_layer,
    value_name,
    why_not_layer,
)
from edgeship.calibration.planning.pair_limit import limit_constant, uses_pair_kernel
from edgeship.calibration.types import (
    Array,
    QuantizedConstant,
    QuantParams,
    QuantPlan,
    QuantRules,
    TensorSpec,
    WeightScheme,
)

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HALF_LARGEST = float(np.finfo(np.float16).max)


def weight_only_plan(
    model: ir.Model, rules: QuantRules, weights: WeightScheme = "full", kept: Mapping[str, str] | None = None
) -> QuantPlan:
    """A plan of int8 weights alone: activations and biases stay float.

    Of `rules` the weights' format is used. `kept`: node name -> why its weights stay float. Raises InputError for a
    model without a layer whose weights are constant, or with weights that are NaN or infinite.
    """
    constants: dict[str, QuantizedConstant] = {}
    axes: dict[str, int] = {}
    chosen: list[str] = []
    reasons: dict[str, str] = {}
    float_nodes: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in LAYERS:
            continue
        reason = (kept or {}).get(node_key(node)) or why_not_layer(node)
        if reason:
            reasons[value_name(node.outputs[0])] = f"{node_key(node)} ({node.op_type}): {reason}"
            float_nodes[node_key(node)] = reason
            continue
        layer = read_layer(node)
        name = value_name(layer.weight_value)
        key = name if axes.setdefault(name, layer.axis) == layer.axis else constant_key(node, 1, layer.weight_value)
        constant = _rounded(layer, rules.weight)
        if weights == "pair_limited" and uses_pair_kernel(node, layer.weights):
            constant = limit_constant(node, layer.weights, constant)
        constants[key] = constant
        chosen.append(node_key(node))
    if not chosen:
        listed = "; ".join(reasons.values())
        raise InputError(
            f"the model has no {', '.join(LAYERS)} whose weights can be int8{': ' + listed if listed else ''}"
        )
    return QuantPlan({}, constants, {}, stays_float=reasons, int8_nodes=tuple(chosen), float_nodes=float_nodes)


def _rounded(layer: Layer, spec: TensorSpec) -> QuantizedConstant:
    others = tuple(i for i in range(layer.weights.ndim) if i != layer.axis)
    largest = np.abs(layer.weights).max(axis=None if spec.axis is None else others, initial=0)
    scale = np.asarray(largest, np.float64) / spec.qmax
    scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale)  # a dead channel: any scale says zero
    format_ = TensorSpec(spec.bits, spec.signed, spec.symmetric, None if spec.axis is None else layer.axis)
    params = QuantParams(scale, np.zeros(scale.shape, np.int64), format_)
    return QuantizedConstant(params, params.quantize(layer.weights))


@dataclass(frozen=True)
class Halved:
    """A model with float16 weights: which became so, and why others did not; `digest` is SHA-256 over the weights."""

    model: ir.Model
    weights: tuple[str, ...]
    stays_float: Mapping[str, str]
    digest: str


def halve_weights(model: ir.Model, kept: Mapping[str, str] | None = None) -> Halved:
    """The model with every layer's float32 weights as float16 and a Cast back; biases and settings stay float32.

    `kept`: node name -> why its weights stay float32, as do those beyond float16's 65504. Raises InputError for a model
    without a layer that has constant float32 weights. `model` is not modified.
    """
    copy = model.clone()
    made: dict[str, ir.Value] = {}
    reasons: dict[str, str] = {}
    sha = hashlib.sha256()
    for node in [node for node in copy.graph if node.op_type in LAYERS]:
        value, array = node.inputs[1], constant_array(node.inputs[1])
        if value is None or array is None or array.dtype != np.float32:
            reasons[value_name(node.outputs[0])] = f"{node_key(node)} ({node.op_type}): no constant float32 weights"
            continue
        name = value_name(value)
        reason = (kept or {}).get(node_key(node)) or _why_not_half(array)
        if reason:
            reasons[name] = f"{node_key(node)} ({node.op_type}): {reason}"
            continue
        if name not in made:
            made[name] = _half(copy.graph, name, array)
            sha.update(name.encode() + np.asarray(array, np.float16).tobytes())
        node.replace_input_with(1, made[name])
    if not made:
        raise InputError(f"no weights can be float16: {'; '.join(reasons.values()) or 'the model has no layers'}")
    for name in made:
        if name in copy.graph.initializers and not copy.graph.initializers[name].uses():
            del copy.graph.initializers[name]
    return Halved(copy, tuple(made), reasons, sha.hexdigest())


def _why_not_half(array: Array) -> str | None:
    largest = float(np.abs(array).max(initial=0))
    if largest <= HALF_LARGEST:
        return None
    return f"its largest weight is {largest:g}; accepted: at most {HALF_LARGEST:g}, float16's largest number"


def _half(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(np.asarray(array, np.float16), name=f"{name}__half")
    small = ir.Value(
        name=tensor.name, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(small)
    node = ir.node("Cast", [small], {"to": int(ir.DataType.FLOAT)}, name=f"{name}__cast")
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{name}__float", ir.TensorType(ir.DataType.FLOAT), small.shape
    graph.insert_before(graph[0], node)
    return result
