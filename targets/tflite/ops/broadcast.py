"""Elementwise operators on operands that broadcast, beyond the number of axes that TFLite's kernels broadcast over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeship.targets.tflite.emit import Emit, Operand, broadcast_extent
from edgeship.targets.tflite.layout import unmarked

Term = Operand | float
"""A tensor, or a number that becomes a constant of the first operand's type."""
WIDE = frozenset({"ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SELECT_V2"})
"""Operators whose kernels broadcast over 5 axes; the others do over 4."""


def apply(
    emit: Emit, name: str, *terms: Term, into: Operand | None = None, dtype: Any = None, **options: Any
) -> Operand:
    """The result of TFLite operator `name`, in `into` or a new tensor; of the first operand's type unless `dtype` is
    given.
    """
    like = next(term for term in terms if isinstance(term, Operand))
    operands = [term if isinstance(term, Operand) else number(emit, term, like) for term in terms]
    shape, signature = broadcast_extent(operands)
    widest = 5 if name in WIDE else 4
    if len(shape) <= widest or all(operand.shape == shape for operand in operands):
        return emit.compute(name, operands, into=into, dtype=dtype, **options)
    extents = collapsed([operand.extents for operand in operands])
    if len(extents[0]) > widest:
        operands = [_widened(emit, operand, shape, signature) for operand in operands]
        return emit.compute(name, operands, into=into, dtype=dtype, **options)
    flat = [emit.writer.reshape(o, *unmarked(extent)) for o, extent in zip(operands, extents, strict=True)]
    result = _flat_result(emit, name, flat, into, dtype)
    emit.operator(name, flat, result, **options)
    return emit.writer.reshape(result, shape, signature, into)


def _flat_result(emit: Emit, name: str, flat: Sequence[Operand], into: Operand | None, dtype: Any) -> Operand:
    """Where the kernel writes what is then seen under the shape of `into`: stored as that is."""
    shape, signature = broadcast_extent(flat)
    kind = into.dtype if into else flat[0].dtype if dtype is None else np.dtype(dtype)
    quant = into.quant if into else flat[0].quant if kind == flat[0].dtype else None
    return emit.writer.new(f"{emit.node.name}/{name.lower()}", shape, kind, quant, signature=signature)


def number(emit: Emit, value: float, like: Operand) -> Operand:
    """A scalar constant in the storage of `like`."""
    if like.dtype.kind == "f" or like.quant:
        return emit.real("constant", value, like)
    return emit.constant("constant", np.asarray(value, like.dtype))


def collapsed(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The shapes, or extents, with neighbouring axes merged wherever all of them do the same there: repeat or not."""
    rank = max(len(shape) for shape in shapes)
    full = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    merged: list[list[int]] = [[] for _ in shapes]
    last: tuple[bool, ...] | None = None
    for sizes in zip(*full, strict=True):
        largest = max(sizes) if 0 not in sizes else 0
        repeats = tuple(size != largest for size in sizes)
        if largest == 1:
            continue
        for shape, size in zip(merged, sizes, strict=True):
            if repeats == last:
                shape[-1] *= size
            else:
                shape.append(size)
        last = repeats
    return [tuple(shape) or (1,) for shape in merged]


def _widened(emit: Emit, operand: Operand, shape: tuple[int, ...], signature: tuple[int, ...]) -> Operand:
    if (operand.shape, operand.signature) == (shape, signature):
        return operand
    target = emit.temporary(shape, operand, "widened", signature=signature)
    emit.operator("BROADCAST_TO", [operand, emit.writer.sizes.extent(shape, signature)], target)
    return target
