"""Returns rules that write every mean over the whole map as GlobalAveragePool.

ReduceMean over axes (2, 3) of (N, C, H, W) = GlobalAveragePool, and = Reshape(GlobalAveragePool) where it drops the
axes. AveragePool without padding whose window is the whole map = GlobalAveragePool.
mean over 3 then 2 = mean over (2, 3), since all rows have the same length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import (
    constant,
    dimensions,
    input_at,
    is_float,
    new_constant,
    producer,
    rank,
    spatial,
)
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse


def reduced_axes(node: ir.Node, data_rank: int) -> tuple[int, ...] | None:
    """The axes (not negative, sorted) that a Reduce operator goes over; None where they are computed."""
    axes_value = input_at(node, 1)
    if axes_value is not None:
        values = constant(axes_value)
        if values is None:
            return None
        axes = [int(axis) for axis in values.reshape(-1)]
    else:
        axes = [int(axis) for axis in node.attributes.get_ints("axes", [])]
    if not axes:
        return () if node.attributes.get_int("noop_with_empty_axes", 0) else tuple(range(data_rank))
    return tuple(sorted(axis % data_rank for axis in axes))


class MeanToPool(Rule):
    """`ReduceMean` over height and width becomes `GlobalAveragePool`, with a `Reshape` where the axes are dropped."""

    def __init__(self) -> None:
        super().__init__("ReduceMean over the map made a GlobalAveragePool", remove_nodes=False)

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return op.ReduceMean(x, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        sizes = dimensions(x)
        if sizes is None or len(sizes) != 4 or not is_float(x):
            return refuse(f"{x.name}: not a float value of rank 4")
        if reduced_axes(producer(outer), 4) != (2, 3):
            return refuse(f"{outer.name}: the axes are not (2, 3)")
        if sizes[1] is None:
            return refuse(f"{x.name}: the number of channels is not known")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The pool."""
        node = producer(outer)
        pooled = op.GlobalAveragePool(x, _name=node.name)
        if node.attributes.get_int("keepdims", 1):
            return pooled
        batch, channels, *_ = dimensions(x) or (None, None)
        pooled.name = f"{outer.name}_map"
        pooled.shape, pooled.type = ir.Shape([*(x.shape or [])[:2], 1, 1]), x.type
        shape = np.array([batch or -1, channels], np.int64)
        return op.Reshape(pooled, new_constant(op, node, f"{outer.name}_shape", shape))


class JoinMeans(Rule):
    """`ReduceMean(ReduceMean(x, 3), 2)` becomes `ReduceMean(x, (2, 3))`."""

    def __init__(self) -> None:
        super().__init__("two ReduceMean joined")

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        inner = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["inner"])
        return op.ReduceMean(inner, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, inner: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        first, second = producer(inner), producer(outer)
        keeps = [node.attributes.get_int("keepdims", 1) for node in (first, second)]
        if rank(x) != 4 or keeps[0] != keeps[1]:
            return refuse(f"{outer.name}: not two means alike over rank 4")
        axes = (reduced_axes(first, 4), reduced_axes(second, 4 if keeps[0] else 3))
        if axes not in (((3,), (2,)), ((2,), (3,) if keeps[0] else (2,))):
            return refuse(f"{outer.name}: the axes are {axes}, not height and width")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
        """One mean."""
        node = producer(outer)
        keep = node.attributes.get_int("keepdims", 1)
        if node.version is not None and node.version < 18:
            return op.ReduceMean(x, axes=[2, 3], keepdims=keep, _name=node.name)
        axes = new_constant(op, node, f"{outer.name}_axes", np.array([2, 3], np.int64))
        return op.ReduceMean(x, axes, keepdims=keep, _name=node.name)


class AverageToGlobal(Rule):
    """`AveragePool` with one window that is the whole map becomes `GlobalAveragePool`."""

    def __init__(self) -> None:
        super().__init__("AveragePool over the whole map made a GlobalAveragePool")

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return op.AveragePool(x, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        attributes = producer(outer).attributes
        kernel, size = tuple(attributes.get_ints("kernel_shape", [])), spatial(x)
        if kernel != size or spatial(outer) != (1, 1):
            return refuse(f"{outer.name}: the window {kernel} is not the map {size}")
        if any(attributes.get_ints("pads", [])) or set(attributes.get_ints("dilations", [1])) != {1}:
            return refuse(f"{outer.name}: it pads or dilates")
        if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return refuse(f"{outer.name}: auto_pad may pad")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value) -> Any:
        """The pool."""
        return op.GlobalAveragePool(x, _name=producer(outer).name)


def pooling_rules() -> list[RewriteRule]:
    """The rules of this file."""
    return [JoinMeans.make(), MeanToPool.make(), AverageToGlobal.make()]
