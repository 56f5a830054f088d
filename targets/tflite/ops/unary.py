"""Functions of one tensor: TFLite's own where it has them, else the shortest exact composition.

acos x = atan2(sqrt((1 - x)(1 + x)), x)          asinh x = sign x log(|x| + sqrt(x^2 + 1))
asin x = atan2(x, sqrt((1 - x)(1 + x)))          acosh x = log(x + sqrt(x - 1) sqrt(x + 1))
atan x = atan2(x, 1)                             atanh x = (log(1 + x) - log(1 - x)) / 2
cosh x = (e^x + e^-x) / 2                        sinh x = tanh x cosh x
erf x = sign x (2 gelu(s) / s - 1) with s = sqrt(2) |x|, because gelu(s) = s (1 + erf(s / sqrt(2))) / 2

int8: EXP and LOG go through tables, ABS rescales exactly. NEG takes plain integers only and SQRT truncates, so both
stay real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Int8, Int16, Limit, Op
from edgeship.targets.tflite.ops.broadcast import Term, apply
from edgeship.targets.tflite.ops.elementwise import sign, size

Write = Callable[..., Operand]
"""Writes one TFLite operator: its name, operands or numbers, `into`."""
Formula = Callable[[Write, Operand, Operand], object]
"""Writes a function of the second argument into the third."""
SMALLEST, LARGEST = 1e-30, 6.0
"""erf is divided by its argument above the first, and 1 in float32 beyond the second."""


def unary(name: str) -> Callable[[Emit], None]:
    """A `convert` that writes TFLite operator `name` on one tensor."""

    def convert(emit: Emit) -> None:
        emit.operator(name, [emit.input()], emit.output())

    return convert


def composed(formula: Formula) -> Callable[[Emit], None]:
    """A `convert` that writes a formula."""

    def convert(emit: Emit) -> None:
        def write(name: str, *terms: Term, into: Operand | None = None) -> Operand:
            return apply(emit, name, *terms, into=into)

        formula(write, emit.input(), emit.output())

    return convert


def acos(write: Write, x: Operand, y: Operand) -> None:
    """acos x."""
    write("ATAN2", _circle(write, x), x, into=y)


def asin(write: Write, x: Operand, y: Operand) -> None:
    """asin x."""
    write("ATAN2", x, _circle(write, x), into=y)


def _circle(write: Write, x: Operand) -> Operand:
    return write("SQRT", write("MUL", write("SUB", 1.0, x), write("ADD", x, 1.0)))


def atan(write: Write, x: Operand, y: Operand) -> None:
    """atan x; ATAN2 does not broadcast."""
    write("ATAN2", x, write("ADD", write("ZEROS_LIKE", x), 1.0), into=y)


def acosh(write: Write, x: Operand, y: Operand) -> None:
    """acosh x."""
    root = write("MUL", write("SQRT", write("SUB", x, 1.0)), write("SQRT", write("ADD", x, 1.0)))
    write("LOG", write("ADD", x, root), into=y)


def asinh(write: Write, x: Operand, y: Operand) -> None:
    """asinh x."""
    root = write("SQRT", write("ADD", write("MUL", x, x), 1.0))
    write("MUL", write("SIGN", x), write("LOG", write("ADD", write("ABS", x), root)), into=y)


def atanh(write: Write, x: Operand, y: Operand) -> None:
    """atanh x."""
    difference = write("SUB", write("LOG", write("ADD", x, 1.0)), write("LOG", write("SUB", 1.0, x)))
    write("MUL", difference, 0.5, into=y)


def cosh(write: Write, x: Operand, y: Operand | None) -> Operand:
    """cosh x."""
    return write("MUL", write("ADD", write("EXP", x), write("EXP", write("NEG", x))), 0.5, into=y)


def sinh(write: Write, x: Operand, y: Operand) -> None:
    """sinh x."""
    write("MUL", write("TANH", x), cosh(write, x, None), into=y)


def tan(write: Write, x: Operand, y: Operand) -> None:
    """tan x."""
    write("DIV", write("SIN", x), write("COS", x), into=y)


def erf(write: Write, x: Operand, y: Operand) -> None:
    """erf x."""
    size = write("MINIMUM", write("MAXIMUM", write("ABS", x), SMALLEST), LARGEST)
    scaled = write("MUL", size, sqrt(2))
    ratio = write("DIV", write("GELU", scaled), scaled)
    write("MUL", write("SUB", write("ADD", ratio, ratio), 1.0), write("SIGN", x), into=y)


def convert_abs(emit: Emit) -> None:
    """Writes an Abs."""
    size(emit, emit.input(), emit.output())


def convert_sign(emit: Emit) -> None:
    """Writes a Sign."""
    sign(emit, emit.input(), emit.output())


REAL: tuple[Limit, ...] = (of_types("float32"),)
SIGNED = (of_types("float32", "int32", "int64"),)
_KERNELS: Mapping[str, str] = {
    "Ceil": "CEIL",
    "Cos": "COS",
    "Floor": "FLOOR",
    "Round": "ROUND",
    "Sin": "SIN",
    "Sqrt": "SQRT",
}
_FORMULAS: Mapping[str, Formula] = {
    "Acos": acos,
    "Acosh": acosh,
    "Asin": asin,
    "Asinh": asinh,
    "Atan": atan,
    "Atanh": atanh,
    "Cosh": cosh,
    "Erf": erf,
    "Sinh": sinh,
    "Tan": tan,
}

OPS = (
    Op("Exp", unary("EXP"), POINTWISE, Int8(), REAL),
    Op("Abs", convert_abs, POINTWISE, Int8(wide=Int16(), real_is_faster=True), SIGNED),
    Op("Log", unary("LOG"), POINTWISE, Int8(), REAL),
    Op("Neg", unary("NEG"), POINTWISE, None, SIGNED),
    Op("Sign", convert_sign, POINTWISE, None, SIGNED, since=9),
    *(Op(onnx, unary(name), POINTWISE, None, REAL) for onnx, name in _KERNELS.items()),
    *(Op(onnx, composed(formula), POINTWISE, None, REAL) for onnx, formula in _FORMULAS.items()),
)
