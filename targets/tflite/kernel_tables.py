"""What LiteRT's int8 kernels of one input make of each of the 256 integers, and what rounding the function would.

Most go through a table of the function's own values, so that they are right wherever these are clear of rounding
boundaries. Two are coarser:

    HARD_SWISH:  16-bit fixed point (tflite/kernels/internal/reference/hard_swish.h): the input times 2^7, a product
                 with the output's multiplier, another with min(max(x + 3, 0), 6) / 6 in 15 bits, a rounding shift
    LEAKY_RELU:  XNNPACK's (src/qs8-vlrelu): both slopes s_x / s_y and alpha s_x / s_y as multiples of 1 / 256

Both were compared with LiteRT 2.3 over all integers at random scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgeship.calibration.types import Array, QuantParams
from edgeship.targets.tflite.graph import Node

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
EVERY = np.arange(-128, 128, dtype=np.int64)
HALF_THE_STEPS = 128
CLEARANCE = 1e-3
"""In steps; nearer to a boundary than this, float32 functions of several runtimes may fall to either side."""
Misses = Callable[[Node, QuantParams, QuantParams], int]


def table_misses(function: Callable[[Node, Array], Array]) -> Misses:
    """How many inputs a table of the function, given the node and real numbers, may map to either of two integers."""

    def misses(node: Node, x: QuantParams, y: QuantParams) -> int:
        return int(_near(function(node, (EVERY - int(x.zero_point)) * float(x.scale)), y).sum())

    return misses


def sigmoid(_: Node, x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def tanh(_: Node, x: Array) -> Array:
    """The hyperbolic tangent."""
    return np.asarray(np.tanh(x))


def elu(node: Node, x: Array) -> Array:
    """e^x - 1 below zero, times alpha; x above."""
    return np.where(x < 0, float(node.attribute("alpha", 1.0)) * np.expm1(np.minimum(x, 0)), x)


def gelu(node: Node, x: Array) -> Array:
    """x times the normal distribution function, or that of its approximation by tanh."""
    if node.attribute("approximate", "none") == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return np.asarray(0.5 * x * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x])))


def hard_swish_misses(node: Node, x: QuantParams, y: QuantParams) -> int:
    """How many inputs HARD_SWISH maps elsewhere than to the rounded function; none where it has no kernel."""
    if float(x.scale) >= 128 * float(y.scale):
        return 0
    real = (EVERY - int(x.zero_point)) * float(x.scale)
    return _misses(hard_swish_table(x, y), real * np.clip(real + 3, 0, 6) / 6, y)


def leaky_relu_misses(node: Node, x: QuantParams, y: QuantParams) -> int:
    """How many inputs LEAKY_RELU maps elsewhere than to the rounded function."""
    alpha = float(node.attribute("alpha", 0.01))
    real = (EVERY - int(x.zero_point)) * float(x.scale)
    return _misses(leaky_relu_table(x, y, alpha), np.where(real < 0, alpha * real, real), y)


def _misses(table: Array, real: Array, y: QuantParams) -> int:
    wrong = table != np.clip(np.rint(real / float(y.scale)) + int(y.zero_point), -128, 127)
    return int((wrong | _near(real, y)).sum())


def _near(real: Array, y: QuantParams) -> Array:
    """Where real values lie near a boundary between two integers of the output."""
    places = real / float(y.scale)
    inside = np.abs(places + int(y.zero_point) + 0.5) < HALF_THE_STEPS
    return np.asarray(inside & (np.abs(places - np.floor(places) - 0.5) < CLEARANCE))


def leaky_relu_table(x: QuantParams, y: QuantParams, alpha: float) -> Array:
    """XNNPACK's output for each input from -128 to 127."""
    away = EVERY - int(x.zero_point)
    slope = np.float32(x.scale) / np.float32(y.scale)
    factors = np.rint(np.float32(256) * np.where(away > 0, slope, np.float32(alpha) * slope)).astype(np.int64)
    return np.asarray(np.clip(((away * factors + 128) >> 8) + int(y.zero_point), -128, 127))


def hard_swish_table(x: QuantParams, y: QuantParams) -> Array:
    """TFLite's output for each input from -128 to 127."""
    fine = (EVERY - int(x.zero_point)) << 7
    step = np.float64(np.float32(x.scale) / np.float32(128))
    out_factor, out_shift = _multiplier(step / np.float64(y.scale))
    gate_factor, gate_shift = _multiplier(step / np.float64(np.float32(3 / 32768)))
    gate = fine if gate_shift <= 0 else _saturated(fine << (gate_shift - 1))
    gate = _rounded_product(gate, gate_factor)
    gate = _saturated(gate << 1) if gate_shift > 0 else _rounded_shift(gate, -gate_shift)
    product = ((gate + (1 << 15)) >> 1) * _rounded_product(fine, out_factor)
    cut = np.where(product >= 0, product >> 15, -(-product >> 15))
    return np.asarray(np.clip(_rounded_shift(_saturated(cut), -out_shift) + int(y.zero_point), -128, 127))


def _multiplier(value: np.float64) -> tuple[int, int]:
    """`value` as factor / 2^15 * 2^shift, the factor of 16 bits rounded from one of 32."""
    fraction, shift = np.frexp(value)
    factor = round(float(fraction) * 2**31)
    if factor == 1 << 31:
        factor, shift = factor >> 1, shift + 1
    return min((factor + (1 << 15)) >> 16, HIGHEST), int(shift)


def _saturated(values: Array) -> Array:
    return np.clip(values, LOWEST, HIGHEST)


def _rounded_product(values: Array, factor: int) -> Array:
    """values * factor / 2^15, rounded half away from zero."""
    doubled = values * factor + np.where(values * factor >= 0, 1 << 14, 1 - (1 << 14))
    return _saturated(np.where(doubled >= 0, doubled >> 15, -(-doubled >> 15)))


def _rounded_shift(values: Array, count: int) -> Array:
    """values / 2^count, rounded half away from zero."""
    rest, half = values & ((1 << count) - 1), ((1 << count) - 1) >> 1
    return np.asarray((values >> count) + (rest > half + (values < 0)))
