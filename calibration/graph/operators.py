"""What ONNX says of an operator's inputs: which is the weight, which the bias, which are data, and how values move.

Layouts are ONNX's own: Conv weights [M, C/group, kH, kW], ConvTranspose [C, M/group, kH, kW], Gemm B [K, N] or [N, K]
with transB, MatMul B [..., K, N].
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array

MAC_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply activations with weights and accumulate: what int8 is for."""

ACTIVATION_OPERATORS = frozenset({"Relu", "Clip"})
"""Operators that only cut their input's range, so that a quantizer with the right range can do their work."""

HULL_OPERATORS = frozenset(
    [
        "AveragePool",
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
"""Operators whose outputs are their inputs' values, averages of them or a constant: no new range to observe."""

_SETTINGS: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2),
    "Pad": (1, 2, 3),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}
"""Inputs that say how an operator works and are not data, though their type may be float."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A multiply-accumulate node with constant weights: float32 `weights`, their output-channel `axis`, float32 `bias`.

    `channels` is the number of output channels; `bias` has shape (channels,) or is None.
    """

    node: ir.Node
    weights: Array
    axis: int
    channels: int
    bias: Array | None

    @property
    def weight_value(self) -> ir.Value:
        """The node's weight input."""
        value = self.node.inputs[1]
        if value is None:
            raise InputError(f"node {node_key(self.node)} ({self.node.op_type}): the weight input is missing")
        return value


def node_key(node: ir.Node) -> str:
    """The node's name, or its first output's name where it has none."""
    return node.name or (node.outputs[0].name or "")


def value_name(value: ir.Value) -> str:
    """The value's name. Raises InputError for an unnamed value."""
    if not value.name:
        raise InputError(f"a value of the graph has no name: {value}")
    return value.name


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of attribute `name`, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant_array(value: ir.Value | None) -> Array | None:
    """The array of an initializer or a Constant node; None for a value computed at run time (or absent)."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def activation_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The interval a Relu or Clip cuts to; None when a Clip's bounds are computed at run time."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [-float("inf"), float("inf")]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            array = constant_array(value)
            if array is None or array.size != 1:
                return None
            bounds[i] = float(array.reshape(()))
    return bounds[0], bounds[1]


def is_float(value: ir.Value | None) -> bool:
    """Whether the value holds floating-point numbers; a value of unknown type is taken to."""
    return value is not None and (value.dtype is None or value.dtype.is_floating_point())


def data_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Index and value of every input that carries numbers to compute with: no weights, biases, shapes or settings."""
    skipped: tuple[int, ...] = _SETTINGS.get(node.op_type, ())
    if node.op_type in MAC_OPERATORS:
        skipped = (1, 2)
    return [
        (i, value) for i, value in enumerate(node.inputs) if i not in skipped and value is not None and is_float(value)
    ]


def activation_inputs(node: ir.Node) -> list[ir.Value]:
    """The data inputs that are computed at run time."""
    return [value for _, value in data_inputs(node) if constant_array(value) is None]


def constant_operands(node: ir.Node) -> list[tuple[int, ir.Value, Array]]:
    """Index, value and array of the data inputs that are constants (an Add's initializer)."""
    found = [(i, value, constant_array(value)) for i, value in data_inputs(node)]
    return [(i, value, array) for i, value, array in found if array is not None]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """The outputs that carry floating-point numbers."""
    return [value for value in node.outputs if is_float(value) and value.name]


def is_depthwise(node: ir.Node, weights: Array) -> bool:
    """Whether each output channel of a Conv sees one input channel only."""
    return node.op_type == "Conv" and weights.shape[1] == 1 and int(attribute(node, "group", 1)) > 1


def why_not_layer(node: ir.Node) -> str | None:
    """Why a multiply-accumulate node cannot have constant int8 weights and an int32 bias; None when it can."""
    weights = constant_array(node.inputs[1])
    if weights is None:
        if node.op_type == "MatMul":
            return "it multiplies two computed matrices, and has no weights"
        return "its weights are an input or computed, not a constant"
    if weights.dtype != np.float32:
        return f"its weights are {weights.dtype}, not float32"
    if weights.ndim < 2:
        return f"its weights have shape {list(weights.shape)}"
    if node.op_type == "Gemm" and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "Gemm with transA or alpha other than 1"
    return _why_not_bias(node, _channels(node, weights))


def _why_not_bias(node: ir.Node, channels: int) -> str | None:
    bias_value = node.inputs[2] if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    if bias_value is None:
        return None
    bias = constant_array(bias_value)
    if bias is None:
        return "its bias is an input or computed, not a constant"
    if node.op_type == "Gemm" and attribute(node, "beta", 1.0) != 1.0:
        return "Gemm with beta other than 1"
    if bias.size not in (1, channels) or (bias.ndim and bias.shape[-1] != bias.size):
        return f"its bias has shape {list(bias.shape)}, not ({channels},)"
    return None


def read_layer(node: ir.Node) -> Layer:
    """The node's weights and bias as float32 arrays.

    Raises InputError where `why_not_layer` has a reason, or for NaN or infinite weights.
    """
    reason = why_not_layer(node)
    weights = constant_array(node.inputs[1])
    if reason is not None or weights is None:
        raise InputError(f"node {node_key(node)} ({node.op_type}): {reason}")
    channels = _channels(node, weights)
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.op_type != "MatMul" else None
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias, np.float32).reshape(-1), (channels,)).copy()
    for what, values in (("weights", weights), ("bias", bias)):
        if values is not None and not np.isfinite(values).all():
            count = int(np.size(values) - np.isfinite(values).sum())
            raise InputError(
                f"node {node_key(node)} ({node.op_type}): {count} of {np.size(values)} {what} are NaN or infinite; "
                "only finite values can be quantized"
            )
    return Layer(node, weights, weight_axis(node, weights), channels, bias)


def weight_axis(node: ir.Node, weights: Array) -> int:
    """The axis of the weights that per-channel scales run along."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return weights.ndim - 1


def _channels(node: ir.Node, weights: Array) -> int:
    groups = int(attribute(node, "group", 1)) if node.op_type == "ConvTranspose" else 1
    return int(weights.shape[weight_axis(node, weights)]) * groups


def constant_key(node: ir.Node, index: int, value: ir.Value) -> str:
    """Where a plan keeps a constant that `node` needs in another way than the first reader of the initializer."""
    return f"{value_name(value)}:{node_key(node)}:{index}"


def held_key(held: Container[str], node: ir.Node, index: int, value: ir.Value) -> str:
    """Which of the constants `held` by a plan is the node's input `index`: its own one, or else the initializer's."""
    own = constant_key(node, index, value)
    return own if own in held else value_name(value)
