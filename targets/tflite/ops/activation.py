"""Activations: TFLite's own where it has them, else the shortest exact composition.

    elu_a x = leaky_relu_a(elu x)         selu x = g elu_a x             celu_a x = a elu(x / a)
    softplus x = relu x - log sigmoid |x|
    mish x = x n / (n + 2) with n = e^x (e^x + 2), because tanh log(1 + e) = ((1 + e)^2 - 1) / ((1 + e)^2 + 1)

int8: LOGISTIC, TANH, EXP, ELU and GELU go through tables or fixed point of 16 bits and more and land within
one step of the QDQ reference; HARD_SWISH computes in 16 bits and is within two, but takes more than ten times as long
as the same in real numbers between DEQUANTIZE and QUANTIZE, which are exact (`benchmarks/integer_kernels.py`).
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import FixedOutput
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.fusion import activation_of
from edgeship.targets.tflite.graph import BITS, Node
from edgeship.targets.tflite.kernel_tables import (
    elu,
    gelu,
    hard_swish_misses,
    leaky_relu_misses,
    sigmoid,
    table_misses,
    tanh,
)
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Int8, Int16, Op
from edgeship.targets.tflite.ops.broadcast import apply
from edgeship.targets.tflite.ops.elementwise import COMPARED, binary
from edgeship.targets.tflite.ops.unary import REAL, SIGNED, unary

UNIT = FixedOutput(1 / 256, -128)
SIGNED_UNIT = FixedOutput(1 / 128, 0)
WIDE_UNIT = FixedOutput(1 / 32768, 0)
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875
SATURATED = 20.0
"""tanh(log(1 + e^x)) is 1 in float32 from here on, and e^2x still finite."""


def convert_clip(emit: Emit) -> None:
    """Writes a Relu or Clip: TFLite's own where the interval has one, else MAXIMUM and MINIMUM.

    Of 8-bit integers that keep their scale these two take a fiftieth of the time of RELU.
    """
    activation = activation_of(emit.node)
    if activation and emit.input().dtype.kind in "fi" and not (emit.node.int8 and keeps_integers(emit.node)):
        emit.operator(activation, [emit.input()], emit.output())
        return
    x, y = emit.input(), emit.output()
    bounds = [(name, limit) for name, limit in _bounds(emit, x) if limit is not None]
    if not bounds:
        emit.writer.reshape(x, y.shape, y.signature, y)
    for count, (name, limit) in enumerate(bounds, 1):
        x = apply(emit, name, x, limit, into=y if count == len(bounds) else None)


def _bounds(emit: Emit, x: Operand) -> list[tuple[str, Operand | None]]:
    if emit.node.op_type == "Relu":
        return [("MAXIMUM", _constant_bound(emit, "maximum", np.zeros((), np.int64), x))]
    return [("MAXIMUM", _bound(emit, "min", 1, x)), ("MINIMUM", _bound(emit, "max", 2, x))]


def _bound(emit: Emit, name: str, index: int, x: Operand) -> Operand | None:
    """The bound in the storage of `x`; None where it cuts nothing off."""
    node = emit.node
    if node.has(index) and not node.tensor(index).is_constant:
        return emit.input(index)
    values = node.parameter(name, index)
    if values is None or not values.size:
        return None
    bound = values.reshape(-1)[0]
    if x.dtype.kind == "f" or x.quant:
        is_wide = bound <= np.finfo(np.float32).min if name == "min" else bound >= np.finfo(np.float32).max
        return None if is_wide else _constant_bound(emit, name, bound, x)
    return _constant_bound(emit, name, bound, x)


def _constant_bound(emit: Emit, name: str, bound: np.generic | np.ndarray, x: Operand) -> Operand:
    if x.dtype.kind == "f" or x.quant:
        return emit.real(name, bound, x)
    return emit.constant(name, np.asarray(bound, x.dtype))


def known_bounds(node: Node) -> str | None:
    """The bounds are constants."""
    computed = [t.name for t in node.inputs[1:] if t is not None and not t.is_constant]
    return f"its bounds {', '.join(computed)} are computed" if computed else None


def keeps_integers(node: Node) -> bool:
    """Whether input and output are integers of 8 bits with the same parameters."""
    x, y = node.x.quant, node.y.quant
    return x is not None and y is not None and x.spec.bits == BITS and x.same_as(y)


def convert_leaky_relu(emit: Emit) -> None:
    """Writes a LeakyRelu."""
    emit.operator("LEAKY_RELU", [emit.input()], emit.output(), alpha=float(emit.node.attribute("alpha", 0.01)))


def convert_hard_sigmoid(emit: Emit) -> None:
    """Writes max(0, min(1, alpha x + beta)): one sixth of RELU6(x + 3) for the usual constants."""
    alpha, beta = float(emit.node.attribute("alpha", 0.2)), float(emit.node.attribute("beta", 0.5))
    x, y = emit.input(), emit.output()
    if np.isclose(alpha, 1 / 6) and np.isclose(beta, 0.5):
        shifted = apply(emit, "ADD", x, 3.0, fused_activation_function="RELU6")
        apply(emit, "MUL", shifted, 1 / 6, into=y)
        return
    shifted = apply(emit, "ADD", apply(emit, "MUL", x, alpha), beta, fused_activation_function="RELU")
    apply(emit, "MINIMUM", shifted, 1.0, into=y)


def convert_gelu(emit: Emit) -> None:
    """Writes a Gelu."""
    emit.operator(
        "GELU", [emit.input()], emit.output(), approximate=emit.node.attribute("approximate", "none") == "tanh"
    )


def convert_elu(emit: Emit) -> None:
    """Writes an Elu."""
    _elu(emit, emit.input(), float(emit.node.attribute("alpha", 1.0)), emit.output())


def _elu(emit: Emit, x: Operand, alpha: float, into: Operand | None = None) -> Operand:
    """alpha (e^x - 1) below zero, x above."""
    if alpha == 1:
        return apply(emit, "ELU", x, into=into)
    return emit.compute("LEAKY_RELU", [apply(emit, "ELU", x)], into=into, alpha=alpha)


def convert_selu(emit: Emit) -> None:
    """Writes a Selu."""
    node = emit.node
    alpha, gamma = float(node.attribute("alpha", SELU_ALPHA)), float(node.attribute("gamma", SELU_GAMMA))
    apply(emit, "MUL", _elu(emit, emit.input(), alpha), gamma, into=emit.output())


def convert_celu(emit: Emit) -> None:
    """Writes a Celu."""
    alpha, x, y = float(emit.node.attribute("alpha", 1.0)), emit.input(), emit.output()
    if alpha == 1:
        apply(emit, "ELU", x, into=y)
    else:
        apply(emit, "MUL", apply(emit, "ELU", apply(emit, "MUL", x, 1 / alpha)), alpha, into=y)


def positive_alpha(node: Node) -> str | None:
    """alpha is above 0."""
    alpha = node.attribute("alpha", 1.0)
    return None if alpha > 0 else f"its alpha is {alpha}; accepted: above 0"


def convert_softplus(emit: Emit) -> None:
    """Writes a Softplus."""
    x = emit.input()
    rest = apply(emit, "LOG", apply(emit, "LOGISTIC", apply(emit, "ABS", x)))
    apply(emit, "SUB", apply(emit, "RELU", x), rest, into=emit.output())


def convert_softsign(emit: Emit) -> None:
    """Writes x / (1 + |x|)."""
    x = emit.input()
    apply(emit, "DIV", x, apply(emit, "ADD", apply(emit, "ABS", x), 1.0), into=emit.output())


def convert_mish(emit: Emit) -> None:
    """Writes a Mish."""
    x = emit.input()
    power = apply(emit, "EXP", apply(emit, "MINIMUM", x, SATURATED))
    n = apply(emit, "MUL", power, apply(emit, "ADD", power, 2.0))
    apply(emit, "MUL", x, apply(emit, "DIV", n, apply(emit, "ADD", n, 2.0)), into=emit.output())


def convert_swish(emit: Emit) -> None:
    """Writes x sigmoid(alpha x)."""
    x, alpha = emit.input(), float(emit.node.attribute("alpha", 1.0))
    scaled = x if alpha == 1 else apply(emit, "MUL", x, alpha)
    apply(emit, "MUL", x, apply(emit, "LOGISTIC", scaled), into=emit.output())


def convert_thresholded_relu(emit: Emit) -> None:
    """Writes x where it is above alpha, else 0."""
    x = emit.input()
    above = apply(emit, "GREATER", x, float(emit.node.attribute("alpha", 1.0)), dtype=np.bool_)
    _select(emit, above, x, _zero(emit, x), emit.output())


def convert_shrink(emit: Emit) -> None:
    """Writes x + bias below -lambd, x - bias above lambd, else 0."""
    x, node = emit.input(), emit.node
    bias, limit = float(node.attribute("bias", 0.0)), float(node.attribute("lambd", 0.5))
    below = apply(emit, "LESS", x, -limit, dtype=np.bool_)
    above = apply(emit, "GREATER", x, limit, dtype=np.bool_)
    low, high = (x, x) if bias == 0 else (apply(emit, "ADD", x, bias), apply(emit, "SUB", x, bias))
    inner = _select(emit, above, high, _zero(emit, x))
    _select(emit, below, low, inner, emit.output())


def _zero(emit: Emit, x: Operand) -> Operand:
    return emit.constant("zero", np.zeros((), x.dtype))


def _select(emit: Emit, condition: Operand, a: Operand, b: Operand, into: Operand | None = None) -> Operand:
    return apply(emit, "SELECT_V2", condition, a, b, into=into, dtype=a.dtype)


def hard_swish_scales(node: Node) -> str | None:
    """A HardSwish's input scale is less than 128 output scales: its kernel shifts right only."""
    x, y = node.x.quant, node.y.quant
    if x is None or y is None or float(x.scale) < 128 * float(y.scale):
        return None
    return f"its scales are {float(x.scale):.3g} and {float(y.scale):.3g}; accepted: a ratio under 128"


def unit_alpha(node: Node) -> str | None:
    """alpha is 1."""
    alpha = node.attribute("alpha", 1.0)
    return None if alpha == 1.0 else f"its alpha is {alpha}; accepted: 1"


_CLIP = Int8(shares_scale=True, real_inputs=frozenset({1, 2}), limits=(known_bounds,), wide=Int16())
_SIGMOID = Int8(fixed_output=UNIT, wide=Int16(WIDE_UNIT), misses=table_misses(sigmoid))
_TANH = Int8(fixed_output=SIGNED_UNIT, wide=Int16(WIDE_UNIT), misses=table_misses(tanh))
_RELU = Int8(wide=Int16(), real_is_faster=lambda node: not keeps_integers(node))
_HARD_SWISH = Int8(limits=(hard_swish_scales,), misses=hard_swish_misses, real_is_faster=True)
_NUMBERS = (of_types(*COMPARED),)

OPS = (
    Op("Relu", convert_clip, POINTWISE, _RELU, _NUMBERS),
    Op("Clip", convert_clip, POINTWISE, _CLIP, _NUMBERS),
    Op("Sigmoid", unary("LOGISTIC"), POINTWISE, _SIGMOID, REAL),
    Op("Tanh", unary("TANH"), POINTWISE, _TANH, REAL),
    Op("HardSwish", unary("HARD_SWISH"), POINTWISE, _HARD_SWISH, REAL),
    Op("HardSigmoid", convert_hard_sigmoid, POINTWISE, None, REAL),
    Op("LeakyRelu", convert_leaky_relu, POINTWISE, Int8(wide=Int16(), misses=leaky_relu_misses), REAL),
    Op("PRelu", binary("PRELU", fuses=False), POINTWISE, Int8(), REAL),
    Op("Elu", convert_elu, POINTWISE, Int8(limits=(unit_alpha,), misses=table_misses(elu)), REAL),
    Op("Selu", convert_selu, POINTWISE, None, REAL),
    Op("Celu", convert_celu, POINTWISE, None, (*REAL, positive_alpha), since=12),
    Op("Gelu", convert_gelu, POINTWISE, Int8(misses=table_misses(gelu)), REAL, since=20),
    Op("Softplus", convert_softplus, POINTWISE, None, REAL),
    Op("Softsign", convert_softsign, POINTWISE, None, REAL),
    Op("Mish", convert_mish, POINTWISE, None, REAL, since=18),
    Op("Swish", convert_swish, POINTWISE, None, REAL, since=24),
    Op("ThresholdedRelu", convert_thresholded_relu, POINTWISE, None, REAL, since=10),
    Op("Shrink", convert_shrink, POINTWISE, None, SIGNED, since=9),
)
