"""Returns a rule that writes the division of vectors by their length as one operator.

    x / expand(max(|x|, epsilon)) becomes LpNormalization(x), for an epsilon too small to matter in float32

torch's `normalize` is exported so. Its epsilon only keeps the zero vector from 0 / 0, which LpNormalization does too.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.clip import interval
from edgeship.pipeline.simplification.graph import constant, dimensions, input_at, producer
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

LARGEST_EPSILON = 1e-10


def _axis(norm: ir.Value, rank: int) -> int | None:
    """The one axis a ReduceL2 that keeps its dimensions goes over, from the front; None for another one."""
    node = producer(norm)
    axes = constant(input_at(node, 1))
    if axes is None or axes.size != 1 or not node.attributes.get_int("keepdims", 1):
        return None
    axis = int(axes.reshape(-1)[0])
    return axis + rank if axis < 0 else axis


class UnitLength(Rule):
    """`x / expand(max(|x|, epsilon))` becomes `LpNormalization(x)`."""

    def __init__(self) -> None:
        super().__init__("a division by the length made an LpNormalization")

    def pattern(self, op: Builder, x: ir.Value, shape: ir.Value) -> Any:
        """What is looked for."""
        norm = op.ReduceL2(x, _allow_other_inputs=True, _outputs=["norm"])
        limited = op.Clip(norm, _allow_other_inputs=True, _outputs=["limited"])
        return op.Div(x, op.Expand(limited, shape), _outputs=["outer"])

    def check(self, context: object, x: ir.Value, norm: ir.Value, limited: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """Why this place is left alone."""
        sizes = dimensions(x)
        if sizes is None or sizes != dimensions(outer):
            return refuse(f"{outer.name}: the shapes are not known, or differ")
        if _axis(norm, len(sizes)) is None:
            return refuse(f"{norm.name}: not along one axis")
        limits = interval(producer(limited))
        if limits is None or not 0 < limits[0] <= LARGEST_EPSILON or limits[1] != float("inf"):
            return refuse(f"{limited.name}: the limits are {limits}")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, norm: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The one operator."""
        axis = _axis(norm, len(dimensions(x) or ()))
        return op.LpNormalization(x, axis=axis, p=2, _name=producer(outer).name)


def unit_length_rules() -> list[RewriteRule]:
    """The rule of this file."""
    return [UnitLength.make()]
