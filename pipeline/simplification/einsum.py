"""Returns a rule that writes an Einsum of two stacks of matrices as what it is, a MatMul.

"... i k, ... k j -> ... i j" with the same letters in front is MatMul; each of the three may have its last two letters
the other way round, which is a Transpose. Attention is often written so: MatMul has integer kernels, Einsum has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from edgeship.pipeline.simplification.graph import dimensions, producer
from edgeship.pipeline.simplification.rule import Builder, Rule, refuse

SMALLEST = 2
"""Letters that a matrix has."""


@dataclass(frozen=True)
class Product:
    """A product of two matrices: which operand is on the left, and which of the two are to be turned."""

    swapped: bool
    turned: tuple[bool, bool]


def product(equation: str) -> Product | None:
    """How MatMul computes the equation; None where it does not, or not without turning its result."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2 or "." in equation:
        return None
    a, b = operands
    if any(len(set(term)) < len(term) or len(term) != len(a) for term in (a, b, result)) or len(a) < SMALLEST:
        return None
    batch = a[:-2]
    if b[:-2] != batch or result[:-2] != batch:
        return None
    for swapped, (left, right) in enumerate(((a, b), (b, a))):
        row, column = tuple(result[-2:])
        shared = (set(left[-2:]) & set(right[-2:])) - {row, column}
        if len(shared) == 1 and row in left[-2:] and column in right[-2:]:
            (inner,) = shared
            return Product(bool(swapped), (left[-2:] != row + inner, right[-2:] != inner + column))
    return None


class EinsumToMatMul(Rule):
    """`Einsum` of two stacks of matrices becomes `MatMul`."""

    def __init__(self) -> None:
        super().__init__("Einsum made a MatMul")

    def pattern(self, op: Builder, a: ir.Value, b: ir.Value) -> Any:
        """What is looked for."""
        return op.Einsum(a, b, _outputs=["outer"])

    def check(self, context: object, a: ir.Value, b: ir.Value, outer: ir.Value) -> MatchResult:
        """Why this place is left alone."""
        equation = producer(outer).attributes.get_string("equation", "")
        if product(equation) is None:
            return refuse(f"{outer.name}: {equation!r} is no product of two stacks of matrices")
        sizes: dict[str, int | None] = {}
        for term, value in zip(equation.replace(" ", "").partition("->")[0].split(","), (a, b), strict=True):
            known = dimensions(value)
            if known is None or len(known) != len(term):
                return refuse(f"{outer.name}: the shape of {value.name} is not known")
            for letter, size in zip(term, known, strict=True):
                if sizes.setdefault(letter, size) != size:
                    return refuse(f"{outer.name}: {letter!r} has the sizes {sizes[letter]} and {size}")
        return MatchResult()

    def rewrite(self, op: Builder, a: ir.Value, b: ir.Value, outer: ir.Value) -> Any:
        """The MatMul."""
        node = producer(outer)
        found = product(node.attributes.get_string("equation", ""))
        if found is None:
            raise ValueError(f"{outer.name} was not checked")
        rank = len(dimensions(a) or ())
        order = [*range(rank - 2), rank - 1, rank - 2]
        operands = (b, a) if found.swapped else (a, b)
        left, right = (
            op.Transpose(value, perm=order, _name=f"{node.name}_{side}") if turned else value
            for side, value, turned in zip(("left", "right"), operands, found.turned, strict=True)
        )
        return op.MatMul(left, right, _name=node.name)


def einsum_rules() -> list[RewriteRule]:
    """The rule of this file."""
    return [EinsumToMatMul.make()]
