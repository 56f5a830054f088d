"""Returns rules that fold a per-channel scale and shift into the linear layer before or after it.

After:  s*(W x + b) + t = (s W) x + (s b + t).
Before: W (s*x + t) + b = (W s) x + (b + W t); with zero padding only for t = 0, since the padding is not shifted.
BatchNormalization has s = gamma / sqrt(var + epsilon) and t = beta - mean * s; Mul, Div, Add and Sub by a constant have
one of the two. One that no layer takes becomes a depthwise 1x1 convolution, which runtimes have as an integer kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.calibration.types import Array
from edgeship.pipeline.simplification.graph import constant, dimensions, input_at, new_constant, producer, rank
from edgeship.pipeline.simplification.linear import OPERATORS, Linear, linear
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

NORMALIZATION = "BatchNormalization"
ARITHMETIC = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True, eq=False)
class Affine:
    """factor * x + shift, both float64, of shape () or (channels,)."""

    factor: Array
    shift: Array

    def spread(self, channels: int) -> tuple[Array, Array] | None:
        """Both with shape (channels,); None when they are for another number of channels."""
        if any(part.size not in (1, channels) for part in (self.factor, self.shift)):
            return None
        return np.broadcast_to(self.factor, (channels,)), np.broadcast_to(self.shift, (channels,))


def affine(node: ir.Node, data: ir.Value, data_rank: int) -> Affine | str:
    """The scale and shift per channel (axis 1) that `node` applies to `data`, or why it is none."""
    if node.op_type == NORMALIZATION:
        return _normalization(node)
    name = f"{node.name} ({node.op_type})"
    if node.inputs[0] is node.inputs[1]:
        return f"{name}: both operands are {data.name}"
    data_place = 0 if node.inputs[0] is data else 1
    if data_place == 1 and node.op_type in ("Div", "Sub"):
        return f"{name}: the constant is the first operand"
    values = constant(node.inputs[1 - data_place])
    if values is None or not np.issubdtype(values.dtype, np.floating):
        return f"{name}: the other operand is not a floating-point constant"
    channels = _per_channel(values.astype(np.float64), data_rank)
    if channels is None:
        return f"{name}: the constant of shape {values.shape} is not one value per channel"
    return _arithmetic(node.op_type, channels) or f"{name}: the divisor holds zeros"


def _arithmetic(operator: str, channels: Array) -> Affine | None:
    """`x operator channels` as scale and shift; None for a division by zero."""
    zero, one = np.zeros(()), np.ones(())
    if operator == "Mul":
        return Affine(channels, zero)
    if operator == "Div":
        return Affine(1.0 / channels, zero) if channels.all() else None
    return Affine(one, channels if operator == "Add" else -channels)


def _per_channel(values: Array, data_rank: int) -> Array | None:
    """`values` as () or (channels,) where they broadcast along axis 1 alone and add no dimension."""
    if values.ndim > data_rank:
        return None
    if values.size == 1:
        return values.reshape(())
    shape = (1,) * (data_rank - values.ndim) + values.shape
    return values.reshape(-1) if data_rank > 1 and values.size == shape[1] else None


def _normalization(node: ir.Node) -> Affine | str:
    parts = [constant(input_at(node, place)) for place in range(1, 5)]
    if any(part is None for part in parts):
        return f"{node.name} ({NORMALIZATION}): its parameters are not constant"
    if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
        return f"{node.name} ({NORMALIZATION}): it is in training mode"
    gamma, beta, mean, variance = (part.astype(np.float64) for part in parts if part is not None)
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return Affine(factor, beta - mean * factor)


class FoldAfter(Rule):
    """`affine(layer(x))` becomes `layer(x)`; the layer's output has no other consumer."""

    def __init__(self, layer: str, operator: str) -> None:
        super().__init__(f"{operator} after {layer} folded into its weights")
        self._layer, self._operator = layer, operator

    def pattern(self, op: Builder, x: ir.Value, other: ir.Value) -> Any:
        """What is looked for."""
        inner = getattr(op, self._layer)(x, _allow_other_inputs=True, _outputs=["inner"])
        if self._operator == NORMALIZATION:
            return op.BatchNormalization(inner, _allow_other_inputs=True, _outputs=["outer"])
        return getattr(op, self._operator)(inner, other, _outputs=["outer"])

    def check(self, context: object, inner: ir.Value, outer: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        layer = linear(producer(inner))
        if isinstance(layer, MatchResult):
            return layer
        change = affine(producer(outer), inner, layer.rank)
        if isinstance(change, str):
            return refuse(change)
        if change.spread(layer.outputs) is None:
            return refuse(f"{outer.name}: not one value for each of {layer.outputs} channels")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The layer with new weights."""
        layer = _checked(linear(producer(inner)))
        change = affine(producer(outer), inner, layer.rank)
        spread = change.spread(layer.outputs) if isinstance(change, Affine) else None
        if spread is None:
            raise ValueError(f"{outer.name} was not checked")
        return layer.rebuilt(op, x, *layer.scaled_outputs(*spread))


class FoldBefore(Rule):
    """`layer(affine(x))` becomes `layer(x)` where that is exact; the affine's output has no other consumer."""

    def __init__(self, layer: str, operator: str) -> None:
        super().__init__(f"{operator} before {layer} folded into its weights")
        self._layer, self._operator = layer, operator

    def pattern(self, op: Builder, x: ir.Value, other: ir.Value) -> Any:
        """What is looked for."""
        if self._operator == NORMALIZATION:
            inner = op.BatchNormalization(x, _allow_other_inputs=True, _outputs=["inner"])
        else:
            inner = getattr(op, self._operator)(x, other, _outputs=["inner"])
        return getattr(op, self._layer)(inner, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, inner: ir.Value, outer: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        layer = linear(producer(outer))
        if isinstance(layer, MatchResult):
            return layer
        if rank(x) != layer.rank:
            return refuse(f"{x.name}: rank {rank(x)}, the layer's is {layer.rank}")
        change = affine(producer(inner), x, layer.rank)
        if isinstance(change, str):
            return refuse(change)
        if change.spread(layer.inputs) is None:
            return refuse(f"{inner.name}: not one value for each of {layer.inputs} channels")
        if change.shift.any() and not _sees_every_input_alike(layer):
            return refuse(f"{outer.name}: zero padding is not shifted with the data")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The layer with new weights."""
        layer = _checked(linear(producer(outer)))
        change = affine(producer(inner), x, layer.rank)
        spread = change.spread(layer.inputs) if isinstance(change, Affine) else None
        if spread is None:
            raise ValueError(f"{inner.name} was not checked")
        factor, shift = spread
        bias = layer.bias
        if shift.any():
            bias = layer.response(shift) + (0.0 if bias is None else bias)
        return layer.rebuilt(op, x, layer.weight * layer.input_factors(factor), bias)


def _sees_every_input_alike(layer: Linear) -> bool:
    """Whether every output sums over all kernel positions: no padding, and no gaps of a transposed convolution."""
    attributes = layer.node.attributes
    if layer.node.op_type == "Gemm":
        return True
    return (
        layer.node.op_type == "Conv"
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not any(attributes.get_ints("pads", []))
    )


class _LoneNormalization(Rule):
    """`BatchNormalization(x)` that no layer could take."""

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return op.BatchNormalization(x, _allow_other_inputs=True, _outputs=["outer"])

    def checked(self, outer: ir.Value) -> tuple[ir.Node, Affine, Array]:
        """The node, what it does, and its scale. Raises ValueError where `check` was not asked."""
        node = producer(outer)
        change, scale = _normalization(node), constant(node.inputs[1])
        if isinstance(change, str) or scale is None:
            raise ValueError(f"{node.name} was not checked")
        return node, change, scale


class NormalizationToDepthwise(_LoneNormalization):
    """Of rank 4 it becomes a depthwise 1x1 `Conv`."""

    def __init__(self) -> None:
        super().__init__("BatchNormalization alone made a depthwise 1x1 Conv")

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        change = _normalization(producer(outer))
        if isinstance(change, str):
            return refuse(change)
        sizes = dimensions(x)
        if sizes is None or len(sizes) != 4 or sizes[1] != change.factor.size:
            return refuse(f"{x.name}: the shape is {sizes}, not (N, {change.factor.size}, H, W)")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The convolution."""
        node, change, scale = self.checked(outer)
        channels = change.factor.size
        weight = new_constant(op, node, f"{outer.name}_weight", change.factor.reshape(-1, 1, 1, 1).astype(scale.dtype))
        bias = new_constant(op, node, f"{outer.name}_bias", change.shift.astype(scale.dtype))
        return op.Conv(x, weight, bias, group=channels, kernel_shape=[1, 1], _name=node.name)


class NormalizationToArithmetic(_LoneNormalization):
    """Of another rank it becomes `x * s + t`."""

    def __init__(self) -> None:
        super().__init__("BatchNormalization alone made a Mul and an Add")

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        change = _normalization(producer(outer))
        if isinstance(change, str):
            return refuse(change)
        return MatchResult() if rank(x) not in (None, 4) else refuse(f"{x.name}: the rank is {rank(x)}")

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The product and the sum."""
        node, change, scale = self.checked(outer)
        shape = (-1, *([1] * ((rank(x) or 2) - 2)))
        factor = new_constant(op, node, f"{outer.name}_factor", change.factor.reshape(shape).astype(scale.dtype))
        shift = new_constant(op, node, f"{outer.name}_shift", change.shift.reshape(shape).astype(scale.dtype))
        return op.Add(op.Mul(x, factor, _name=node.name), shift)


def _checked(layer: Linear | MatchResult) -> Linear:
    if isinstance(layer, MatchResult):
        raise TypeError(layer.reason)
    return layer


def fold_rules() -> list[RewriteRule]:
    """Every fold of an affine operator into a layer, those after the layer first."""
    rules: list[RewriteRule] = []
    for kind in (FoldAfter, FoldBefore):
        for layer in OPERATORS:
            for operator in (NORMALIZATION, *ARITHMETIC):
                rule = kind.make(layer, operator)
                rules += rule.commute() if operator in ("Mul", "Add") else [rule]
    return rules


def alone_rules() -> list[RewriteRule]:
    """What becomes of a normalization that no layer takes."""
    return [NormalizationToDepthwise.make(), NormalizationToArithmetic.make()]
