"""Einsum and Det, written as other operators.

Two operands are contracted as a matrix product: with the axes of both that stay (batch), of one that stay (rows,
columns) and of both that vanish (sum), `[batch, rows, sum] @ [batch, sum, columns]`. A determinant is expanded along
its rows, each minor computed once: det_r(C) = sum_i (-1)^i x[r, c_i] det_{r+1}(C without c_i).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported

ELLIPSIS = "..."
WIDEST_PRODUCT = 5
"""Axes of BATCH_MATMUL's operands."""
LARGEST_DETERMINANT = 6


@dataclass(frozen=True)
class Term:
    """An operand with a label for every axis."""

    tensor: Tensor
    labels: tuple[str, ...]

    def size(self, label: str) -> int:
        """The size of the axis `label`."""
        return self.tensor.shape[self.labels.index(label)]


def _split(text: str) -> list[str]:
    """The labels of one operand, its ellipsis as one of them."""
    head, dots, tail = text.partition(ELLIPSIS)
    labels = [*head, *([ELLIPSIS] if dots else []), *tail]
    if not all(label.isalpha() or label == ELLIPSIS for label in labels):
        raise Unsupported("its equation cannot be read", text, "letters, commas, ... and ->")
    return labels


def _spelled(labels: list[str], wide: int) -> tuple[str, ...]:
    """The labels with the ellipsis spelled out as numbers, the last axis always 0."""
    if ELLIPSIS not in labels:
        return tuple(labels)
    at = labels.index(ELLIPSIS)
    return (*labels[:at], *(str(n) for n in reversed(range(wide))), *labels[at + 1 :])


def expand_einsum(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """Transposes, sums and products of matrices."""
    equation = str(node.attribute("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    texts = [_split(text) for text in left.split(",")]
    operands = list(node.tensors())
    if len(texts) != len(operands):
        raise Unsupported("its equation has other operands", equation, f"{len(operands)} operands")
    terms = [
        Term(tensor, _spelled(labels, tensor.rank - len(labels) + 1))
        for labels, tensor in zip(texts, operands, strict=True)
    ]
    if any(len(term.labels) != term.tensor.rank for term in terms):
        raise Unsupported("its equation has other ranks", equation, str([list(t.shape) for t in operands]))
    wide = max(
        [t.rank - len(labels) + 1 for labels, t in zip(texts, operands, strict=True) if ELLIPSIS in labels] + [0]
    )
    wanted = _spelled(_split(right), wide) if arrow else _implied(terms)
    terms = [_diagonal(scope, term) for term in terms]
    terms = [_spread(scope, term, terms) for term in terms]
    result = terms[0]
    for place, term in enumerate(terms[1:], 1):
        later = {label for other in terms[place + 1 :] for label in other.labels} | set(wanted)
        result = _contracted(scope, result, term, later)
    result = _summed(scope, result, set(wanted))
    return [_ordered(scope, result, wanted).tensor]


def _implied(terms: Sequence[Term]) -> tuple[str, ...]:
    """The output of an equation without an arrow: the ellipsis, then the labels that occur once, in their order."""
    every = [label for term in terms for label in term.labels]
    wide = sorted({label for label in every if label.isdigit()}, key=int, reverse=True)
    return (*wide, *sorted(label for label in set(every) if not label.isdigit() and every.count(label) == 1))


def _diagonal(scope: Scope, term: Term) -> Term:
    """The term with each label once: of axes that share one, the diagonal."""
    for label in term.labels:
        if term.labels.count(label) < 2:
            continue
        first, second = [axis for axis, name in enumerate(term.labels) if name == label][:2]
        rest = [axis for axis in range(len(term.labels)) if axis not in (first, second)]
        size, sizes = term.tensor.shape[first], [term.tensor.shape[axis] for axis in rest]
        square = scope.op("Transpose", term.tensor, perm=[*rest, first, second])
        flat = scope.op("Reshape", square, np.array([*sizes, size * size], np.int64))
        bounds = [np.array([n], np.int64) for n in (0, size * size, len(rest), size + 1)]
        along = Term(scope.op("Slice", flat, *bounds), (*(term.labels[axis] for axis in rest), label))
        return _diagonal(scope, along)
    return term


def _spread(scope: Scope, term: Term, terms: Sequence[Term]) -> Term:
    """The term without its axes of size 1 that are larger in another term."""
    largest = {label: max(t.size(label) for t in terms if label in t.labels) for label in term.labels}
    single = [axis for axis, label in enumerate(term.labels) if term.tensor.shape[axis] == 1 != largest[label]]
    if not single:
        return term
    kept = tuple(label for axis, label in enumerate(term.labels) if axis not in single)
    return Term(scope.op("Squeeze", term.tensor, np.array(single, np.int64)), kept)


def _summed(scope: Scope, term: Term, kept: Collection[str]) -> Term:
    """The term summed over the labels that are not `kept`."""
    gone = [axis for axis, label in enumerate(term.labels) if label not in kept]
    if not gone:
        return term
    labels = tuple(label for label in term.labels if label in kept)
    return Term(scope.op("ReduceSum", term.tensor, np.array(gone, np.int64), keepdims=0), labels)


def _ordered(scope: Scope, term: Term, labels: Sequence[str]) -> Term:
    """The term with its axes in the order of `labels`."""
    order = [term.labels.index(label) for label in labels]
    if order == list(range(len(order))):
        return term
    return Term(scope.op("Transpose", term.tensor, perm=order), tuple(labels))


def _shaped(scope: Scope, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor if tensor.shape == tuple(shape) else scope.op("Reshape", tensor, np.array(shape, np.int64))


def _contracted(scope: Scope, a: Term, b: Term, later: Collection[str]) -> Term:
    """The product of two terms, summed over what neither the output nor a later term has."""
    a, b = _summed(scope, a, {*later, *b.labels}), _summed(scope, b, {*later, *a.labels})
    shared = [label for label in a.labels if label in b.labels]
    batch, gone = [x for x in shared if x in later], [x for x in shared if x not in later]
    rows = [label for label in a.labels if label not in shared]
    columns = [label for label in b.labels if label not in shared]
    is_last = len(a.labels) > 1 and gone == [a.labels[-1]] and a.labels[-2] in rows
    if is_last and len(columns) == 1 and len(a.labels) <= WIDEST_PRODUCT:
        return _broadcast_product(scope, a, b, columns[0])
    left, right = _ordered(scope, a, [*batch, *rows, *gone]), _ordered(scope, b, [*batch, *gone, *columns])
    sizes = [a.size(label) for label in batch]
    heights, widths = [a.size(label) for label in rows], [b.size(label) for label in columns]
    labels = (*batch, *rows, *columns)
    if not gone:
        tall = _shaped(scope, left.tensor, [*sizes, *heights, *[1] * len(columns)])
        wide = _shaped(scope, right.tensor, [*sizes, *[1] * len(rows), *widths])
        return Term(scope.op("Mul", tall, wide), labels)
    depth = int(np.prod([a.size(label) for label in gone]))
    outer = sizes if len(sizes) <= WIDEST_PRODUCT - 2 else [int(np.prod(sizes))]
    tall = _shaped(scope, left.tensor, [*outer, int(np.prod(heights)), depth])
    wide = _shaped(scope, right.tensor, [*outer, depth, int(np.prod(widths))])
    return Term(_shaped(scope, scope.op("MatMul", tall, wide), [*sizes, *heights, *widths]), labels)


def _broadcast_product(scope: Scope, a: Term, b: Term, column: str) -> Term:
    """The product of `a` as it lies, whose last axis vanishes, with matrices of `b`, repeated along axes it has not."""
    stack, gone = a.labels[:-2], a.labels[-1]
    batch = [label for label in stack if label in b.labels]
    right = _ordered(scope, b, [*batch, gone, column])
    sizes = [b.size(label) if label in b.labels else 1 for label in stack]
    first = next((place for place, label in enumerate(stack) if label in batch), len(stack))
    wide = _shaped(scope, right.tensor, [*sizes[first:], b.size(gone), b.size(column)])
    return Term(scope.op("MatMul", a.tensor, wide), (*a.labels[:-1], column))


def expand_det(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """Products and sums of the elements, for matrices of at most 6 rows."""
    x, size = node.x, node.x.shape[-1]
    if size > LARGEST_DETERMINANT:
        raise Unsupported("its matrices are too large", f"{size} rows", f"{LARGEST_DETERMINANT}")

    @cache
    def element(row: int, column: int) -> Tensor:
        values = scope.op("Gather", x, np.array(row, np.int64), axis=-2)
        return scope.op("Gather", values, np.array(column, np.int64), axis=-1)

    @cache
    def minor(columns: tuple[int, ...]) -> Tensor:
        row = size - len(columns)
        if len(columns) == 1:
            return element(row, columns[0])
        products = [
            scope.op("Mul", element(row, column), minor((*columns[:place], *columns[place + 1 :])))
            for place, column in enumerate(columns)
        ]
        total = products[0]
        for place, product in enumerate(products[1:], 1):
            total = scope.op("Sub" if place % 2 else "Add", total, product)
        return total

    return [minor(tuple(range(size)))]


EXPANSIONS = (Expansion("Einsum", expand_einsum, 12), Expansion("Det", expand_det, 11))
