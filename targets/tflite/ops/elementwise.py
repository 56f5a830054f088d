"""Arithmetic between tensors, with broadcasting: ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM and their kin.

int8: ADD and SUB bring both operands to a common scale with 20 bits of headroom, MUL rescales the product once; the QDQ
reference rounds the real result. They differ by at most one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgeship.targets.tflite.dtypes import SHIFTED, of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Int8, Int16, Op
from edgeship.targets.tflite.ops import words
from edgeship.targets.tflite.ops.broadcast import apply

ARITHMETIC = ("float32", "int32", "int64")
MODULAR = (*ARITHMETIC, "uint64")
"""Types of operators that do the same to int64 and to uint64 of the same bits."""
COMPARED = ("float32", "uint8", "int8", "int32", "int64", SHIFTED)
REAL = of_types("float32")


def moderate_scales(node: Node) -> str | None:
    """One step of an operand (for Mul: of the product) is less than 256 steps of the output."""
    y, scales = node.y.quant, [float(t.quant.scale) for t in node.tensors() if t.quant]
    if y is None or len(scales) < 2:
        return None
    factor = (float(np.prod(scales)) if node.op_type == "Mul" else max(scales)) / float(y.scale)
    return (
        None if factor < 256 else f"one step of its operands is {factor:.3g} steps of its output; accepted: under 256"
    )


def binary(name: str, *, fuses: bool = True) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` on two operands."""

    def convert(emit: Emit) -> None:
        options: dict[str, Any] = {"fused_activation_function": emit.node.activation} if fuses else {}
        if emit.node.is_wide and name in ("ADD", "SUB"):
            options["pot_scale_int16"] = False
        apply(emit, name, emit.broadcast(0), emit.broadcast(1), into=emit.output(), **options)

    return convert


def chain(name: str) -> Callable[[Emit], None]:
    """A `convert` for any number of operands: TFLite operator `name` between one after the other."""

    def convert(emit: Emit) -> None:
        so_far = _chained(emit, name, emit.output() if len(emit.node.inputs) > 1 else None)
        if len(emit.node.inputs) == 1:
            emit.alias(so_far)

    return convert


def _chained(emit: Emit, name: str, into: Operand | None) -> Operand:
    count = len(emit.node.inputs)
    so_far = emit.broadcast(0)
    for index in range(1, count):
        so_far = apply(emit, name, so_far, emit.broadcast(index), into=into if index == count - 1 else None)
    return so_far


def convert_reciprocal(emit: Emit) -> None:
    """Writes 1 / x."""
    emit.operator("DIV", [emit.constant("one", np.ones((), np.float32)), emit.input()], emit.output())


def convert_mean(emit: Emit) -> None:
    """Writes a Mean of several tensors: their sum times a constant."""
    apply(emit, "MUL", _chained(emit, "ADD", None), 1 / len(emit.node.inputs), into=emit.output())


def convert_div(emit: Emit) -> None:
    """Writes a Div: of integers toward zero."""
    a, b, y = emit.broadcast(0), emit.broadcast(1), emit.output()
    if a.dtype != np.int64:
        apply(emit, "DIV", a, b, into=y, fused_activation_function=emit.node.activation)
    else:
        (words.unsigned_quotient if emit.node.unsigned else words.quotient)(emit, a, b, y)


def convert_mod(emit: Emit) -> None:
    """Writes a Mod: FLOOR_MOD takes the divisor's sign; for `fmod` the remainder of the sizes gets the dividend's."""
    a, b, y = emit.broadcast(0), emit.broadcast(1), emit.output()
    if emit.node.unsigned:
        words.unsigned_remainder(emit, a, b, y)
        return
    if not emit.node.attribute("fmod", 0):
        apply(emit, "FLOOR_MOD", a, b, into=y)
        return
    remainder = apply(emit, "FLOOR_MOD", size(emit, a), size(emit, b))
    apply(emit, "MUL", remainder, sign(emit, a), into=y)


def size(emit: Emit, x: Operand, into: Operand | None = None) -> Operand:
    """|x|; of int64 as max(x, -x)."""
    if x.dtype == np.int64:
        return apply(emit, "MAXIMUM", x, apply(emit, "NEG", x), into=into)
    return apply(emit, "ABS", x, into=into)


def sign(emit: Emit, x: Operand, into: Operand | None = None) -> Operand:
    """The sign of x; of int64 as x within -1 and 1."""
    if x.dtype == np.int64:
        return apply(emit, "MINIMUM", apply(emit, "MAXIMUM", x, -1), 1, into=into)
    return apply(emit, "SIGN", x, into=into)


def convert_pow(emit: Emit) -> None:
    """Writes a Pow: by simpler operators for the usual constant exponents, in floats where either operand is one."""
    y, exponent = emit.output(), emit.node.tensor(1)
    a = emit.broadcast(0)
    only = float(exponent.values().reshape(-1)[0]) if exponent.is_constant and exponent.size == 1 else None
    if a.shape == y.shape and only in (2.0, 0.5) and (only == 2.0 or a.dtype == np.float32):
        apply(emit, *(("MUL", a, a) if only == 2.0 else ("SQRT", a)), into=y)
        return
    b = emit.broadcast(1)
    if a.dtype.kind == b.dtype.kind == "i" and np.int64 in (a.dtype, b.dtype):
        largest = int(exponent.values().max(initial=0)) if exponent.is_constant else np.iinfo(b.dtype).max
        a, b = (o if o.dtype == np.int64 else apply(emit, "CAST", o, dtype=np.int64) for o in (a, b))
        if y.dtype == np.int64:
            words.power(emit, a, b, largest, y)
        else:
            apply(emit, "CAST", words.power(emit, a, b, largest), into=y)
        return
    if emit.node.unsigned:
        b = words.real(emit, b)
    common = a.dtype if a.dtype == b.dtype else np.dtype(np.float32)
    a, b = (o if o.dtype == common else apply(emit, "CAST", o, dtype=common) for o in (a, b))
    if common == y.dtype:
        apply(emit, "POW", a, b, into=y)
    else:
        apply(emit, "CAST", apply(emit, "POW", a, b), into=y)


def exponent_types(node: Node) -> str | None:
    """Exponents are not negative where base and exponent are integers."""
    base, exponent = node.x, node.tensor(1)
    if base.is_float or exponent.is_float:
        return None
    if exponent.dtype == np.uint64:
        return f"it raises {base.dtype} to uint64; accepted: up to 63 bits"
    if exponent.is_constant and exponent.values().min(initial=0) < 0:
        return f"it raises {base.dtype} to {exponent.values().min()}; accepted: no negative exponent of an integer"
    return None


EXTREMUM = Int8(shares_scale=True, wide=Int16())
_PLAIN: Mapping[str, str] = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL"}
_COMMON = (of_types(*ARITHMETIC),)
_POWERS = (of_types(*ARITHMETIC, variable="T"), of_types(*MODULAR, variable="T1"), exponent_types)

OPS = (
    *(
        Op(
            onnx,
            binary(name),
            POINTWISE,
            Int8(limits=(moderate_scales,), wide=Int16()),
            (of_types(*MODULAR),),
            fuses=True,
        )
        for onnx, name in _PLAIN.items()
    ),
    Op("Div", convert_div, POINTWISE, None, (of_types(*MODULAR),), fuses=lambda node: node.x.is_float),
    Op("Pow", convert_pow, POINTWISE, None, _POWERS),
    Op("Mod", convert_mod, POINTWISE, None, (of_types(*MODULAR),), since=10),
    Op("Max", chain("MAXIMUM"), POINTWISE, EXTREMUM, (of_types(*COMPARED),)),
    Op("Min", chain("MINIMUM"), POINTWISE, EXTREMUM, (of_types(*COMPARED),)),
    Op("Sum", chain("ADD"), POINTWISE, None, _COMMON),
    Op("Mean", convert_mean, POINTWISE, None, (REAL,)),
    Op("Reciprocal", convert_reciprocal, POINTWISE, None, (REAL,)),
)
