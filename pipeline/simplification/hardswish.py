"""Returns rules that write the hard swish as one operator: HardSwish(x) = x * clip(x + 3, 0, 6) / 6.

It is found as x * (clip(x + 3, 0, 6) * c), as (x * clip(x + 3, 0, 6)) * c with c = 1/6, and as x * HardSigmoid(x) with
alpha = 1/6 and beta = 1/2. Division by 6 is written as a product before (see arithmetic.py).
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.clip import interval
from edgeship.pipeline.simplification.graph import producer, scalar
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

_ROUNDING = 1e-6
"""Relative; a sixth rounded to float32 is within 1e-7."""


def _is(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=_ROUNDING)


class _FromClip(Rule):
    def check(self, context: object, limits: ir.Value, three: ir.Value, sixth: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        if not _is(scalar(three), 3.0) or not _is(scalar(sixth), 1.0 / 6.0):
            return refuse(f"{limits.name}: the constants are not 3 and 1/6")
        if interval(producer(limits)) != (0.0, 6.0):
            return refuse(f"{limits.name}: the limits are not 0 and 6")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, **_: Any) -> Any:
        """The one operator."""
        return op.HardSwish(x)


class GateThenProduct(_FromClip):
    """`x * (clip(x + 3, 0, 6) * c)` becomes `HardSwish(x)`."""

    def __init__(self) -> None:
        super().__init__("x * clip(x + 3, 0, 6) / 6 made a HardSwish")

    def pattern(self, op: Builder, x: ir.Value, three: ir.Value, sixth: ir.Value) -> Any:
        """What is looked for."""
        limits = op.Clip(op.Add(x, three), _allow_other_inputs=True, _outputs=["limits"])
        return op.Mul(x, op.Mul(limits, sixth))


class ProductThenScale(_FromClip):
    """`(x * clip(x + 3, 0, 6)) * c` becomes `HardSwish(x)`."""

    def __init__(self) -> None:
        super().__init__("x * clip(x + 3, 0, 6) / 6 made a HardSwish")

    def pattern(self, op: Builder, x: ir.Value, three: ir.Value, sixth: ir.Value) -> Any:
        """What is looked for."""
        limits = op.Clip(op.Add(x, three), _allow_other_inputs=True, _outputs=["limits"])
        return op.Mul(op.Mul(x, limits), sixth)


class FromHardSigmoid(Rule):
    """`x * HardSigmoid(x)` with alpha = 1/6 and beta = 1/2 becomes `HardSwish(x)`."""

    def __init__(self) -> None:
        super().__init__("x * HardSigmoid(x) made a HardSwish")

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        return op.Mul(x, op.HardSigmoid(x, _outputs=["gate"]))

    def check(self, context: object, gate: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        attributes = producer(gate).attributes
        alpha, beta = attributes.get_float("alpha", 0.2), attributes.get_float("beta", 0.5)
        if not _is(alpha, 1.0 / 6.0) or beta != 0.5:
            return refuse(f"{gate.name}: alpha is {alpha} and beta {beta}, not 1/6 and 1/2")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, **_: Any) -> Any:
        """The one operator."""
        return op.HardSwish(x)


def hardswish_rules() -> list[RewriteRule]:
    """The rules of this file, for every order of the factors and summands."""
    rules = (GateThenProduct.make(), ProductThenScale.make(), FromHardSigmoid.make())
    return [turned for rule in rules for turned in rule.commute()]
