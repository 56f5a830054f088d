"""Bits of integers: TFLite has XOR and a shift to the right; the rest follows from

    a + b = (a ^ b) + 2 (a & b)        a | b = (a ^ b) + (a & b)        not a = -1 - a        a << n = a 2^n

all modulo 2^n, as the integers wrap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops import words
from edgeship.targets.tflite.ops.broadcast import apply


def bits(write: Callable[[Emit, Operand, Operand, Operand | None], Operand]) -> Callable[[Emit], None]:
    """A `convert` for `write` on the bits of two operands; integers of 64 bits go through it as pairs of 32."""

    def convert(emit: Emit) -> None:
        a, b, y = emit.broadcast(0), emit.broadcast(1), emit.output()
        if y.dtype.itemsize < 8:
            write(emit, a, b, y)
        else:
            emit.compute("BITCAST", [write(emit, _halves(emit, a), _halves(emit, b), None)], into=y)

    return convert


def _halves(emit: Emit, x: Operand) -> Operand:
    return emit.compute("BITCAST", [x], (*x.shape, 2), dtype=np.int32, signature=(*x.signature, 2))


def _xor(emit: Emit, a: Operand, b: Operand, into: Operand | None) -> Operand:
    return apply(emit, "BITWISE_XOR", a, b, into=into)


def _or(emit: Emit, a: Operand, b: Operand, into: Operand | None) -> Operand:
    return apply(emit, "ADD", _xor(emit, a, b, None), _and(emit, a, b, None), into=into)


def _and(emit: Emit, a: Operand, b: Operand, into: Operand | None) -> Operand:
    """a & b = (a >> 1) + (b >> 1) + (a & b & 1) - ((a ^ b) >> 1), where nothing overflows."""
    halves = apply(emit, "ADD", apply(emit, "RIGHT_SHIFT", a, 1), apply(emit, "RIGHT_SHIFT", b, 1))
    lowest = apply(emit, "MUL", apply(emit, "FLOOR_MOD", a, 2), apply(emit, "FLOOR_MOD", b, 2))
    differing = apply(emit, "RIGHT_SHIFT", apply(emit, "BITWISE_XOR", a, b), 1)
    return apply(emit, "SUB", apply(emit, "ADD", halves, lowest), differing, into=into)


def convert_not(emit: Emit) -> None:
    """Writes a BitwiseNot."""
    x = emit.input()
    minus_one = emit.constant("minus_one", np.array(-1, x.dtype))
    apply(emit, "SUB", minus_one, x, into=emit.output())


def convert_shift(emit: Emit) -> None:
    """Writes a BitShift: to the left by the powers of two; a shift outside the width leaves no bit."""
    a, y = emit.broadcast(0), emit.output()
    if emit.node.attribute("direction") == "RIGHT":
        shift = emit.broadcast(1)
        if a.dtype == np.int64:
            words.shifted(emit, a, shift, unsigned=emit.node.unsigned, into=y)
            return
        apply(emit, "RIGHT_SHIFT", a, shift if a.dtype == np.uint32 else _within(emit, shift, 31), into=y)
        return
    shift = apply(emit, "CAST", emit.broadcast(1), dtype=np.int32)
    width = 8 * a.dtype.itemsize
    kind = np.dtype(np.int64) if a.dtype == np.uint32 else a.dtype  # GATHER takes no uint32
    powers = np.append(np.uint64(1) << np.arange(width, dtype=np.uint64), np.uint64(0)).astype(kind)
    operands = [emit.constant("powers", powers), _within(emit, shift, width)]
    factor = emit.compute("GATHER", operands, shift.shape, signature=shift.signature, axis=0, batch_dims=0)
    if kind == a.dtype:
        apply(emit, "MUL", a, factor, into=y)
    else:
        product = apply(emit, "MUL", apply(emit, "CAST", a, dtype=kind), factor)
        apply(emit, "CAST", product, into=y)


def _within(emit: Emit, shift: Operand, most: int) -> Operand:
    """The shift, `most` where it is negative or beyond that."""
    limited = apply(emit, "MINIMUM", shift, most)
    negative = apply(emit, "LESS", limited, 0, dtype=np.bool_)
    return apply(
        emit, "SELECT_V2", negative, emit.constant("most", np.array(most, shift.dtype)), limited, dtype=shift.dtype
    )


_WORDS = ("int32", "int64", "uint64")
_ANY = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

OPS = (
    Op("BitwiseAnd", bits(_and), POINTWISE, None, (of_types(*_WORDS),), since=18),
    Op("BitwiseOr", bits(_or), POINTWISE, None, (of_types(*_WORDS),), since=18),
    Op("BitwiseXor", bits(_xor), POINTWISE, None, (of_types(*_ANY),), since=18),
    Op("BitwiseNot", convert_not, POINTWISE, None, (of_types(*_WORDS),), since=18),
    Op(
        "BitShift",
        convert_shift,
        POINTWISE,
        None,
        (of_types("uint32", *_WORDS),),
        since=11,
    ),
)
