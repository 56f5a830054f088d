"""Returns rules that write a layer normalization as one operator, and its scale and shift into it.

d / sqrt(mean(d^2) + epsilon) with d = x - mean(x), means over the last axes, becomes LayerNormalization(x, 1)
LayerNormalization(x, scale, shift) * c becomes LayerNormalization(x, scale c, shift c), and with + c likewise
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.calibration.types import Array
from edgeship.pipeline.simplification.graph import constant, dimensions, input_at, is_float, new_constant, producer
from edgeship.pipeline.simplification.graph import scalar as number
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse


def _mean_axes(mean: ir.Value, rank: int) -> list[int] | None:
    """The axes a ReduceMean that keeps its dimensions goes over, counted from the front; None for another one."""
    node = producer(mean)
    given = constant(input_at(node, 1))
    axes = node.attributes.get_ints("axes", None) if given is None else [int(axis) for axis in given.reshape(-1)]
    if not axes or not node.attributes.get_int("keepdims", 1):
        return None
    return sorted(axis + rank if axis < 0 else axis for axis in axes)


class Normalize(Rule):
    """`d / sqrt(mean(d^2) + epsilon)` with `d = x - mean(x)` becomes `LayerNormalization(x)`."""

    def __init__(self, square: str) -> None:
        super().__init__("a normalization over the last axes made a LayerNormalization")
        self._square = square

    def pattern(self, op: Builder, x: ir.Value, epsilon: ir.Value) -> Any:
        """What is looked for."""
        centred = op.Sub(x, op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"]))
        squares = op.Mul(centred, centred) if self._square == "Mul" else op.Pow(centred, 2.0)
        variance = op.ReduceMean(squares, _allow_other_inputs=True, _outputs=["variance"])
        return op.Div(centred, op.Sqrt(op.Add(variance, epsilon)), _outputs=["outer"])

    def check(
        self, context: object, x: ir.Value, epsilon: ir.Value, mean: ir.Value, variance: ir.Value, **_: Any
    ) -> MatchResult:
        """Why this place is left alone."""
        sizes = dimensions(x)
        if sizes is None or not is_float(x) or number(epsilon) is None:
            return refuse(f"{variance.name}: the shape or epsilon is not known")
        axes = _mean_axes(mean, len(sizes))
        if axes is None or axes != _mean_axes(variance, len(sizes)):
            return refuse(f"{variance.name}: mean and variance are not over the same axes")
        if axes != list(range(axes[0], len(sizes))) or None in sizes[axes[0] :]:
            return refuse(f"{variance.name}: the axes {axes} are not the last ones, or of unknown size")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, epsilon: ir.Value, mean: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The one operator, with a scale of 1."""
        sizes, node = dimensions(x), producer(outer)
        if sizes is None or x.dtype is None:
            raise ValueError(f"{x.name} was not checked")
        axes = _mean_axes(mean, len(sizes)) or [len(sizes) - 1]
        ones = np.ones([size or 1 for size in sizes[axes[0] :]], x.dtype.numpy())
        scale = new_constant(op, node, f"{outer.name}_scale", ones)
        return op.LayerNormalization(x, scale, axis=axes[0] - len(sizes), epsilon=number(epsilon), _name=node.name)


class IntoNormalization(Rule):
    """`LayerNormalization(x, ...) * c` or `+ c` with a constant of the normalized shape becomes one operator."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} folded into the LayerNormalization before it")
        self._operator = operator

    def pattern(self, op: Builder, other: ir.Value) -> Any:
        """What is looked for."""
        normal = op.LayerNormalization(_allow_other_inputs=True, _outputs=["normal"])
        return getattr(op, self._operator)(normal, other, _outputs=["outer"])

    def check(self, context: object, normal: ir.Value, other: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        node = producer(normal)
        scale, values = constant(input_at(node, 1)), constant(other)
        if len(node.outputs) > 1 or scale is None or values is None or not _known_shift(node):
            return refuse(f"{normal.name}: its parameters are computed, or its statistics are read")
        if values.size != 1 and values.shape != (1,) * (values.ndim - scale.ndim) + scale.shape:
            return refuse(f"{other.name}: {values.shape} is not the normalized shape {scale.shape}")
        return MatchResult()

    def rewrite(self, op: Builder, normal: ir.Value, other: ir.Value, outer: ir.Value) -> Any:
        """The one operator."""
        node = producer(normal)
        scale, shift, values = (constant(value) for value in (input_at(node, 1), input_at(node, 2), other))
        if scale is None or values is None:
            raise ValueError(f"{normal.name} was not checked")
        operands = _folded(self._operator, scale, shift, values)
        names = (f"{outer.name}_scale", f"{outer.name}_shift")
        made = [new_constant(op, node, name, array) for name, array in zip(names, operands, strict=False)]
        return op.LayerNormalization(node.inputs[0], *made, **node.attributes, _name=node.name)


def _known_shift(node: ir.Node) -> bool:
    shift = input_at(node, 2)
    return shift is None or constant(shift) is not None


def _folded(operator: str, scale: Array, shift: Array | None, values: Array) -> list[Array]:
    """Scale, and shift where there is one, after the product with `values` or their sum."""
    spread = np.broadcast_to(values.reshape(values.shape[-scale.ndim :] if values.size > 1 else ()), scale.shape)
    if operator == "Add":
        return [scale, spread if shift is None else shift + spread]
    return [scale * spread, *([] if shift is None else [shift * spread])]


def layer_norm_rules() -> list[RewriteRule]:
    """The rules of this file."""
    fold = [turned for name in ("Mul", "Add") for turned in IntoNormalization.make(name).commute()]
    return [*(Normalize.make(square) for square in ("Pow", "Mul")), *fold]
