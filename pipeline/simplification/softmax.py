"""Returns a rule that takes Softmax out of the reshapes around it.

Softmax over the last axis treats every row alike, so grouping the other axes before it and ungrouping them after
changes nothing: Reshape(Softmax(Reshape(x), axis = last)) = Softmax(x, axis = last). Upgrading from opset 12 or
earlier, where Softmax always worked on two axes, leaves this pattern.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import dimensions, producer
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse


class SoftmaxOutOfReshapes(Rule):
    """`Reshape(Softmax(Reshape(x)))` back to the shape of x becomes `Softmax(x)`."""

    def __init__(self) -> None:
        super().__init__("Reshape around Softmax removed")

    def pattern(self, op: Builder, x: ir.Value, before: ir.Value, after: ir.Value) -> Any:
        """What is looked for."""
        inner = op.Softmax(op.Reshape(x, before, _outputs=["flat"]), _outputs=["inner"])
        return op.Reshape(inner, after, _outputs=["outer"])

    def check(
        self, context: object, x: ir.Value, flat: ir.Value, inner: ir.Value, outer: ir.Value, **_: Any
    ) -> MatchResult:
        """Why this place is left alone."""
        sizes, grouped, restored = dimensions(x), dimensions(flat), dimensions(outer)
        if sizes is None or grouped is None or restored is None:
            return refuse(f"{inner.name}: the shapes around it are not known")
        if producer(inner).attributes.get_int("axis", -1) not in (-1, len(grouped) - 1):
            return refuse(f"{inner.name}: not over the last axis")
        if sizes[-1] is None or sizes[-1] != grouped[-1] or sizes != restored or sizes[1:].count(None):
            return refuse(f"{inner.name}: {sizes} becomes {grouped} and then {restored}")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, **_: Any) -> Any:
        """The Softmax alone."""
        return op.Softmax(x, axis=-1, _name=producer(inner).name)


def softmax_rules() -> list[RewriteRule]:
    """The rule of this file."""
    return [SoftmaxOutOfReshapes.make()]
