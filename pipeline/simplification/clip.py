"""Returns rules that write every limit of values as one Relu or Clip.

Relu = [0, inf], Clip = [min, max], Max(x, c) = [c, inf], Min(x, c) = [-inf, c].
For a <= b and c <= d, limiting to [a, b] and then to [c, d] is limiting to [limit(a), limit(b)] with limit to [c, d].
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import constant, input_at, is_float, new_constant, producer, rank, scalar
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse


def interval(node: ir.Node) -> tuple[float, float] | None:
    """What `node` limits its values to; None where it does something else, or the limits are computed."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type == "Clip":
        bounds = []
        for place, default in ((1, -math.inf), (2, math.inf)):
            given = scalar(input_at(node, place))
            if given is None and input_at(node, place) is not None:
                return None
            bounds.append(default if given is None else given)
        return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None
    limit = _limit(node) if node.op_type in ("Min", "Max") else None
    if limit is None:
        return None
    return (-math.inf, limit) if node.op_type == "Min" else (limit, math.inf)


def _limit(node: ir.Node) -> float | None:
    """The scalar constant of Min(x, c) or Max(x, c)."""
    if len(node.inputs) != 2:
        return None
    data, other = limited(node), node.inputs[1]
    bound = node.inputs[0] if data is other else other
    array = constant(bound)
    if data is None or array is None or array.ndim > (rank(data) or 0):
        return None
    return scalar(bound)


def limited(node: ir.Node) -> ir.Value | None:
    """The value that a Relu, Clip, Min or Max limits."""
    if node.op_type in ("Min", "Max") and constant(node.inputs[0]) is not None:
        return node.inputs[1]
    return node.inputs[0]


def _is_plain(node: ir.Node) -> bool:
    """Whether the node is written the way these rules write it."""
    if node.op_type == "Clip":
        return interval(node) not in ((0.0, math.inf), (-math.inf, math.inf))
    return node.op_type == "Relu"


def _limit_to(op: Builder, node: ir.Node, data: ir.Value, bounds: tuple[float, float]) -> Any:
    low, high = bounds
    if bounds == (-math.inf, math.inf):
        return op.Identity(data)
    if bounds == (0.0, math.inf):
        return op.Relu(data, _name=node.name)
    if data.dtype is None:
        raise ValueError(f"{data.name} was not checked")
    dtype, stem = data.dtype.numpy(), node.outputs[0].name
    inputs: list[ir.Value | None] = [data, None, None]
    for place, bound, part in ((1, low, "min"), (2, high, "max")):
        if math.isfinite(bound):
            inputs[place] = new_constant(op, node, f"{stem}_{part}", np.array(bound, dtype), input_at(node, place))
    return op.Clip(*(inputs if inputs[2] is not None else inputs[:2]), _name=node.name)


class JoinLimits(Rule):
    """Two limits in a row become one."""

    def __init__(self, inner: str, outer: str) -> None:
        super().__init__(f"{outer} after {inner} joined")
        self._inner, self._outer = inner, outer

    def pattern(self, op: Builder, x: ir.Value) -> Any:
        """What is looked for."""
        inner = getattr(op, self._inner)(x, _allow_other_inputs=True, _outputs=["inner"])
        return getattr(op, self._outer)(inner, _allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, x: ir.Value, inner: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        if not is_float(x):
            return refuse(f"{x.name}: not floating point")
        if interval(producer(inner)) is None or interval(producer(outer)) is None:
            return refuse(f"{outer.name}: the limits are not constant and in order")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
        """One limit."""
        first, second = interval(producer(inner)), interval(producer(outer))
        if first is None or second is None:
            raise ValueError(f"{outer.name} was not checked")
        low, high = (min(max(bound, second[0]), second[1]) for bound in first)
        return _limit_to(op, producer(outer), x, (low, high))


class PlainLimit(Rule):
    """Min and Max with a constant become Clip; Clip(0, inf) becomes Relu; Clip without limits goes."""

    def __init__(self, operator: str) -> None:
        super().__init__(f"{operator} written as Relu or Clip")
        self._operator = operator

    def pattern(self, op: Builder) -> Any:
        """What is looked for."""
        return getattr(op, self._operator)(_allow_other_inputs=True, _outputs=["outer"])

    def check(self, context: object, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        node = producer(outer)
        if interval(node) is None or not is_float(limited(node)):
            return refuse(f"{outer.name}: not a limit by constants")
        return refuse(f"{outer.name}: is plain already") if _is_plain(node) else MatchResult()

    def rewrite(self, op: Builder, outer: ir.Value) -> Any:
        """The plain limit."""
        node = producer(outer)
        data, bounds = limited(node), interval(node)
        if data is None or bounds is None:
            raise ValueError(f"{outer.name} was not checked")
        return _limit_to(op, node, data, bounds)


def clip_rules() -> list[RewriteRule]:
    """The rules of this file; Min and Max are made plain first, so that the joins see Relu and Clip alone."""
    plain = [PlainLimit.make(operator) for operator in ("Min", "Max", "Clip")]
    return plain + [JoinLimits.make(inner, outer) for inner, outer in itertools.product(("Relu", "Clip"), repeat=2)]
