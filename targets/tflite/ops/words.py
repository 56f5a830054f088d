"""Integers of 64 bits where TFLite has no kernel for them: quotients, remainders, shifts to the right and powers.

FLOOR_MOD is exact, so that a quotient is one of numbers that divide without a rest. Three real quotients find it, each
of what the ones before left over: q = q + round(n / b), n = n - b round(n / b), where float32 is off by less than a
millionth of what it divides. Numbers without a sign come as int64 of the same bits (`Node.unsigned`):

    h = a >> 1, q = 2 (h / b), r = a - q b, and once more where r >= b        a mod b = a - b (a / b)
"""

from __future__ import annotations

import numpy as np

from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.ops.broadcast import apply

LOWEST = np.iinfo(np.int64).min
BELOW_TOP = float(np.nextafter(np.float32(2**63), np.float32(0)))
"""The largest float32 that int64 holds."""
ROUNDS = 3
BITS = 64


def quotient(emit: Emit, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
    """a / b toward zero."""
    remainder = apply(emit, "FLOOR_MOD", a, b)
    unlike = apply(emit, "NOT_EQUAL", _holds(emit, "LESS", a, 0), _holds(emit, "LESS", b, 0))
    over = apply(emit, "LOGICAL_AND", unlike, _holds(emit, "NOT_EQUAL", remainder, 0))
    toward_zero = _select(emit, over, apply(emit, "SUB", remainder, b), remainder)
    return _exact_quotient(emit, apply(emit, "SUB", a, toward_zero), b, into)


def _exact_quotient(emit: Emit, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
    """a / b, where nothing is left."""
    divisor = apply(emit, "CAST", b, dtype=np.float32)
    total = _rounded_quotient(emit, a, divisor)
    step = total
    for count in range(1, ROUNDS):
        a = apply(emit, "SUB", a, apply(emit, "MUL", step, b))
        step = _rounded_quotient(emit, a, divisor)
        total = apply(emit, "ADD", total, step, into=into if count == ROUNDS - 1 else None)
    return total


def _rounded_quotient(emit: Emit, a: Operand, divisor: Operand) -> Operand:
    found = apply(emit, "DIV", apply(emit, "CAST", a, dtype=np.float32), divisor)
    whole = apply(emit, "FLOOR", apply(emit, "ADD", found, 0.5))
    return apply(emit, "CAST", apply(emit, "MINIMUM", whole, BELOW_TOP), dtype=np.int64)


def unsigned_quotient(emit: Emit, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
    """a / b of numbers without a sign; a divisor of 2^63 or more goes into `a` once at most."""
    half = shifted(emit, a, _like(emit, 1, a), unsigned=True)
    is_large = _holds(emit, "LESS", b, 0)
    small = _select(emit, is_large, _like(emit, 1, b), b)
    doubled = apply(emit, "MUL", _exact_quotient(emit, _without_rest(emit, half, small), small), 2)
    found = _select(emit, is_large, _like(emit, 0, doubled), doubled)
    rest = apply(emit, "SUB", a, apply(emit, "MUL", found, b))
    once_more = apply(emit, "GREATER_EQUAL", _ordered(emit, rest), _ordered(emit, b), dtype=np.bool_)
    return apply(emit, "ADD", found, apply(emit, "CAST", once_more, dtype=np.int64), into=into)


def unsigned_remainder(emit: Emit, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
    """a mod b of numbers without a sign."""
    return apply(emit, "SUB", a, apply(emit, "MUL", unsigned_quotient(emit, a, b), b), into=into)


def shifted(emit: Emit, a: Operand, shift: Operand, *, unsigned: bool, into: Operand | None = None) -> Operand:
    """a >> shift, with the sign, or zeros where there is none, coming in at the top; all of it beyond the width."""
    beyond = apply(emit, "LOGICAL_OR", _holds(emit, "LESS", shift, 0), _holds(emit, "GREATER_EQUAL", shift, BITS - 1))
    is_negative = _holds(emit, "LESS", a, 0)
    power = _power_of_two(emit, _select(emit, beyond, _like(emit, 0, shift), shift))
    if not unsigned:
        kept = _exact_quotient(emit, _without_rest(emit, a, power), power)
        return _select(emit, beyond, apply(emit, "NEG", apply(emit, "CAST", is_negative, dtype=np.int64)), kept, into)
    low = _select(emit, is_negative, apply(emit, "SUB", a, LOWEST), a)
    kept = _exact_quotient(emit, _without_rest(emit, low, power), power)
    kept = _select(emit, beyond, _like(emit, 0, kept), kept)
    top = _power_of_two(emit, apply(emit, "SUB", BITS - 1, shift))
    return apply(emit, "ADD", kept, _select(emit, is_negative, top, _like(emit, 0, top)), into=into)


def power(emit: Emit, base: Operand, exponent: Operand, largest: int, into: Operand | None = None) -> Operand:
    """base ^ exponent modulo 2^64: of the squares of squares of `base` those that the exponent's bits choose.

    `largest`: what no exponent exceeds. A negative exponent has no meaning.
    """
    count, one = max(largest.bit_length(), 1), _like(emit, 1, base)
    result = base
    for bit in range(count):
        target = into if bit == count - 1 else None
        rest = exponent if bit == BITS - 2 else apply(emit, "FLOOR_MOD", exponent, 2 << bit)
        chosen = _holds(emit, "GREATER_EQUAL", rest, 1 << bit)
        if bit == 0:
            result = _select(emit, chosen, base, one, target)
        else:
            base = apply(emit, "MUL", base, base)
            result = apply(emit, "MUL", result, _select(emit, chosen, base, one), into=target)
    return result


def real(emit: Emit, x: Operand) -> Operand:
    """Numbers without a sign as float32."""
    signed = apply(emit, "CAST", x, dtype=np.float32)
    return _select(emit, _holds(emit, "LESS", signed, 0), apply(emit, "ADD", signed, float(2**BITS)), signed)


def _without_rest(emit: Emit, a: Operand, b: Operand) -> Operand:
    return apply(emit, "SUB", a, apply(emit, "FLOOR_MOD", a, b))


def _power_of_two(emit: Emit, exponent: Operand) -> Operand:
    """2^exponent, 0 outside of 0 to 63."""
    powers = np.append(np.uint64(1) << np.arange(BITS, dtype=np.uint64), np.uint64(0)).astype(np.int64)
    outside = apply(emit, "MINIMUM", exponent, BITS)
    outside = _select(emit, _holds(emit, "LESS", outside, 0), _like(emit, BITS, outside), outside)
    operands = [emit.constant("powers", powers), outside]
    return emit.compute("GATHER", operands, outside.shape, signature=outside.signature, axis=0, batch_dims=0)


def _ordered(emit: Emit, x: Operand) -> Operand:
    """Numbers without a sign in an order that int64 has."""
    return apply(emit, "ADD", x, LOWEST)


def _holds(emit: Emit, relation: str, a: Operand, b: float) -> Operand:
    return apply(emit, relation, a, b, dtype=np.bool_)


def _like(emit: Emit, value: int, x: Operand) -> Operand:
    return emit.constant("number", np.array(value, x.dtype))


def _select(emit: Emit, condition: Operand, yes: Operand, no: Operand, into: Operand | None = None) -> Operand:
    return apply(emit, "SELECT_V2", condition, yes, no, dtype=yes.dtype, into=into)
