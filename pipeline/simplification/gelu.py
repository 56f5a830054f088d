"""Returns rules that write the Gaussian error linear unit as one operator, Gelu (opset 20).

    exact:  x (1 + erf(x / sqrt(2))) / 2
    tanh:   x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

The gate's argument is read as a polynomial in x, so that every way of writing it is found: x * x * x and x^3, factors
inside and outside the brackets, in any order.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import input_at, is_float, producer, scalar
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

OPSET = 20
"""The first that has Gelu."""
CHANGED = frozenset(("DFT", "GridSample"))
"""Operators that opset 20 writes differently than opsets 18 and 19; AveragePool does so with ceil_mode."""
OLDEST = 18
"""Reductions and Split were written differently before."""
_ROUNDING = 1e-4
"""Relative: exporters write sqrt(2 / pi) with as few as five digits (0.79788)."""
_DEEPEST = 8
Polynomial = dict[int, float]
"""Power of x -> coefficient."""
_ARGUMENTS: dict[str, tuple[str, Polynomial]] = {
    "Erf": ("none", {1: math.sqrt(0.5)}),
    "Tanh": ("tanh", {1: math.sqrt(2 / math.pi), 3: 0.044715 * math.sqrt(2 / math.pi)}),
}


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = _DEEPEST) -> Polynomial | None:
    """`value` as a polynomial in `x`; None where it is something else."""
    if value is x:
        return {1: 1.0}
    known = scalar(value)
    if known is not None:
        return {0: known}
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or node.op_type not in ("Add", "Div", "Mul", "Pow"):
        return None
    left, right = (polynomial(input_at(node, place), x, depth - 1) for place in (0, 1))
    return None if left is None or right is None else _combined(node.op_type, left, right)


def _combined(operator: str, left: Polynomial, right: Polynomial) -> Polynomial | None:
    """A sum or product of polynomials; one divided by a constant, or raised to a small power."""
    if operator == "Add":
        return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left.keys() | right.keys()}
    if operator == "Mul":
        return _product(left, right)
    constant = right.get(0, 0.0)
    if set(right) != {0} or not constant:
        return None
    if operator == "Div":
        return {power: factor / constant for power, factor in left.items()}
    if constant == 2.0:
        return _product(left, left)
    return _product(_product(left, left), left) if constant == 3.0 else None


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for a, p in left.items():
        for b, q in right.items():
            result[a + b] = result.get(a + b, 0.0) + p * q
    return result


def _same(found: Polynomial | None, wanted: Polynomial) -> bool:
    if found is None:
        return False
    return all(math.isclose(found.get(p, 0.0), wanted.get(p, 0.0), rel_tol=_ROUNDING) for p in found.keys() | wanted)


class _Gelu(Rule):
    """One order of the factors x, 1/2 and 1 + gate."""

    def __init__(self, gate: str) -> None:
        super().__init__(f"x (1 + {gate.lower()}(...)) / 2 made a Gelu")
        self._gate = gate

    def _gated(self, op: Builder, argument: ir.Value, one: ir.Value) -> Any:
        return op.Add(getattr(op, self._gate)(argument), one)

    def check(
        self, context: object, x: ir.Value, argument: ir.Value, one: ir.Value, half: ir.Value, **_: Any
    ) -> MatchResult:
        """Why this place is left alone."""
        if scalar(one) != 1.0 or scalar(half) != 0.5:
            return refuse(f"{argument.name}: the constants are not 1 and 1/2")
        if not is_float(x):
            return refuse(f"{x.name}: not floating point")
        if not _same(polynomial(argument, x), _ARGUMENTS[self._gate][1]):
            return refuse(f"{argument.name}: not what Gelu's {self._gate} is taken of")
        return MatchResult()

    def rewrite(self, op: Builder, x: ir.Value, outer: ir.Value, **_: Any) -> Any:
        """The one operator."""
        form = _ARGUMENTS[self._gate][0]
        attributes = {} if form == "none" else {"approximate": form}
        return op.Gelu(x, _name=producer(outer).name, **attributes)


class HalfLast(_Gelu):
    """`(x * (1 + gate)) * 0.5` becomes `Gelu(x)`."""

    def pattern(self, op: Builder, x: ir.Value, argument: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        """What is looked for."""
        return op.Mul(op.Mul(x, self._gated(op, argument, one)), half, _outputs=["outer"])


class HalfOfGate(_Gelu):
    """`x * ((1 + gate) * 0.5)` becomes `Gelu(x)`."""

    def pattern(self, op: Builder, x: ir.Value, argument: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        """What is looked for."""
        return op.Mul(x, op.Mul(self._gated(op, argument, one), half), _outputs=["outer"])


class HalfOfInput(_Gelu):
    """`(x * 0.5) * (1 + gate)` becomes `Gelu(x)`."""

    def pattern(self, op: Builder, x: ir.Value, argument: ir.Value, one: ir.Value, half: ir.Value) -> Any:
        """What is looked for."""
        return op.Mul(op.Mul(x, half), self._gated(op, argument, one), _outputs=["outer"])


def gelu_rules() -> list[RewriteRule]:
    """The rules of this file, for every order of the factors and summands."""
    rules = [form.make(gate) for form in (HalfLast, HalfOfGate, HalfOfInput) for gate in _ARGUMENTS]
    return [turned for rule in rules for turned in rule.commute()]


def may_have_gelu(model: ir.Model) -> bool:
    """Whether the model means the same in the opset that has Gelu, so that it can be one of that."""
    opset = model.opset_imports.get("", 0)
    if opset >= OPSET:
        return True
    return opset >= OLDEST and not any(
        node.op_type in CHANGED or (node.op_type == "AveragePool" and node.attributes.get_int("ceil_mode", 0))
        for node in model.graph.all_nodes()
    )


def raise_opset(model: ir.Model) -> None:
    """Lets `model` be of the opset that its Gelu operators need."""
    if model.opset_imports.get("", 0) < OPSET and any(node.op_type == "Gelu" for node in model.graph.all_nodes()):
        model.opset_imports[""] = OPSET
