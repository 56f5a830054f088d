"""Returns the weights of a linear layer after a per-channel scale of its outputs or inputs.

A linear layer is y = W x + b. For per-channel vectors s and t: s*y + t = (s W) x + (s b + t), and W (s*x + t) + b =
(W s) x + (b + W t). Sums are made in float64 and rounded once, to the weights' own type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult

from edgeship.calibration.types import Array
from edgeship.pipeline.simplification.graph import constant, input_at, keep_attributes, new_constant
from edgeship.pipeline.simplification.rule import Builder, refuse

OPERATORS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True, eq=False)
class Linear:
    """The node of a linear layer with constant weights and bias (None where it has none), both float64."""

    node: ir.Node
    weight: Array
    bias: Array | None
    dtype: np.dtype[np.generic]

    @property
    def group(self) -> int:
        """The number of groups; 1 for Gemm."""
        return self.node.attributes.get_int("group", 1)

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        if self.node.op_type == "ConvTranspose":
            return int(self.weight.shape[1] * self.group)
        return int(self.weight.shape[self._output_axis])

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        if self.node.op_type == "ConvTranspose":
            return int(self.weight.shape[0])
        if self.node.op_type == "Conv":
            return int(self.weight.shape[1] * self.group)
        return int(self.weight.shape[1 - self._output_axis])

    @property
    def _output_axis(self) -> int:
        if self.node.op_type == "Gemm":
            return 0 if self.node.attributes.get_int("transB", 0) else 1
        return 0

    @property
    def rank(self) -> int:
        """The rank of the layer's input and output."""
        return 2 if self.node.op_type == "Gemm" else self.weight.ndim

    def _grouped(self, by_group: Array, axis: int) -> Array:
        """`by_group` (groups, channels per group) spread over the weight: its groups lie along axis 0."""
        repeat = self.weight.shape[0] // self.group
        spread = np.repeat(by_group, repeat, axis=0)  # (axis 0, channels per group)
        shape = [self.weight.shape[0]] + [1] * (self.weight.ndim - 1)
        shape[axis] = by_group.shape[1]
        return spread.reshape(shape)

    def output_factors(self, factor: Array) -> Array:
        """`factor` (output channels,) in a shape that multiplies the weight."""
        if self.node.op_type == "ConvTranspose":
            return self._grouped(factor.reshape(self.group, -1), 1)
        shape = [1] * self.weight.ndim
        shape[self._output_axis] = -1
        return factor.reshape(shape)

    def input_factors(self, factor: Array) -> Array:
        """`factor` (input channels,) in a shape that multiplies the weight."""
        if self.node.op_type == "Conv":
            return self._grouped(factor.reshape(self.group, -1), 1)
        shape = [1] * self.weight.ndim
        shape[0 if self.node.op_type == "ConvTranspose" else 1 - self._output_axis] = -1
        return factor.reshape(shape)

    def response(self, values: Array) -> Array:
        """(output channels,): what an input of constant `values` (input channels,) gives without padding."""
        weighted = self.weight * self.input_factors(values)
        axes = tuple(axis for axis in range(weighted.ndim) if axis != self._output_axis)
        return np.asarray(weighted.sum(axis=axes))

    def scaled_outputs(self, factor: Array, shift: Array) -> tuple[Array, Array]:
        """Weight and bias of factor*y + shift."""
        bias = np.zeros(self.outputs) if self.bias is None else self.bias
        return self.weight * self.output_factors(factor), bias * factor + shift

    def rebuilt(self, op: Builder, data: ir.Value, weight: Array, bias: Array | None) -> Any:
        """The layer's node on `data` with another weight and bias, under its own name."""
        old_weight, old_bias = input_at(self.node, 1), input_at(self.node, 2)
        stem = self.node.outputs[0].name or self.node.name or "layer"
        inputs = [data, new_constant(op, self.node, f"{stem}_weight", weight.astype(self.dtype), old_weight)]
        if bias is not None:
            inputs.append(new_constant(op, self.node, f"{stem}_bias", bias.astype(self.dtype), old_bias))
        attributes = keep_attributes(self.node)
        return op.op(self.node.op_type, *inputs, _name=self.node.name, **attributes)


def linear(node: ir.Node) -> Linear | MatchResult:
    """The linear layer that `node` is, or why it cannot be rewritten."""
    name = f"{node.name} ({node.op_type})"
    weight, bias_value = constant(input_at(node, 1)), input_at(node, 2)
    bias = constant(bias_value)
    if weight is None or not np.issubdtype(weight.dtype, np.floating):
        return refuse(f"{name}: the weight is not a floating-point constant")
    if bias_value is not None and bias is None:
        return refuse(f"{name}: the bias is not constant")
    if node.op_type == "Gemm" and not _is_plain(node):
        return refuse(f"{name}: alpha and beta are not 1, or transA is set")
    layer = Linear(node, weight.astype(np.float64), None, weight.dtype)
    if bias is None:
        return layer
    if bias.size not in (1, layer.outputs) or any(size != 1 for size in bias.shape[:-1]):
        return refuse(f"{name}: the bias has the shape {bias.shape}")
    spread = np.broadcast_to(bias.astype(np.float64).reshape(-1), (layer.outputs,))
    return Linear(node, layer.weight, spread, weight.dtype)


def _is_plain(gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    factors = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0))
    return factors == (1.0, 1.0) and not attributes.get_int("transA", 0)
