"""Returns rules for arithmetic with constants: x / c = x * (1/c), and x * 1, x / 1, x + 0, x - 0 are x."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import constant, dimensions, new_constant, producer
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


class DivideToMultiply(Rule):
    """`x / c` with a floating-point constant becomes `x * (1/c)`."""

    def __init__(self) -> None:
        super().__init__("Div by a constant made a Mul")

    def pattern(self, op: Builder, x: ir.Value, divisor: ir.Value) -> Any:
        """What is looked for."""
        return op.Div(x, divisor, _outputs=["outer"])

    def check(self, context: object, divisor: ir.Value, **_: Any) -> MatchResult:
        """Why this place is left alone."""
        values = constant(divisor)
        if values is None or values.dtype not in (np.float32, np.float64):
            return refuse(f"{divisor.name}: not a floating-point constant")
        with np.errstate(divide="ignore", over="ignore"):
            finite = bool(np.isfinite(np.ones((), values.dtype) / values).all())
        return MatchResult() if finite else refuse(f"{divisor.name}: its inverse is not finite")

    def rewrite(self, op: Builder, x: ir.Value, divisor: ir.Value, outer: ir.Value) -> Any:
        """The product."""
        node, values = producer(outer), constant(divisor)
        if values is None:
            raise ValueError(f"{divisor.name} was not checked")
        inverse = (1.0 / values.astype(np.float64)).astype(values.dtype)
        return op.Mul(x, new_constant(op, node, f"{outer.name}_factor", inverse, divisor), _name=node.name)


class Neutral(Rule):
    """`x * 1`, `x / 1`, `x + 0` and `x - 0` become `x`."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} by {_NEUTRAL[operator]:g} removed")
        self._operator = operator

    def pattern(self, op: Builder, x: ir.Value, other: ir.Value) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(x, other, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, other: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        values, sizes = constant(other), dimensions(x)
        if values is None or not (values == _NEUTRAL[self._operator]).all():
            return refuse(f"{other.name}: not the constant {_NEUTRAL[self._operator]:g}")
        if sizes is None or not _keeps_shape(values.shape, sizes):
            return refuse(f"{outer.name}: the constant of shape {values.shape} may broadcast {x.name}")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, **_: Any) -> Any:
        """The value itself."""
        return op.Identity(x)


def _keeps_shape(other: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    """Whether broadcasting with `other` leaves `sizes` as they are."""
    if len(other) > len(sizes):
        return False
    return all(size in (1, own) for size, own in zip(reversed(other), reversed(sizes), strict=False))


def arithmetic_rules() -> list[RewriteRule]:
    """The rules of this file."""
    rules: list[RewriteRule] = []
    for operator in _NEUTRAL:
        rule = Neutral.make(operator)
        rules += rule.commute() if operator in ("Mul", "Add") else [rule]
    return [*rules, DivideToMultiply.make()]
