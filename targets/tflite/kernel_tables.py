"""What LiteRT's coarse int8 kernels make of each of the 256 input integers, and what rounding the function would.

    HARD_SWISH:  16-bit fixed point (tflite/kernels/internal/reference/hard_swish.h): the input times 2^7, a product
                 with the output's multiplier, another with min(max(x + 3, 0), 6) / 6 in 15 bits, a rounding shift
    LEAKY_RELU:  XNNPACK's (src/qs8-vlrelu): both slopes s_x / s_y and alpha s_x / s_y as multiples of 1 / 256

Both were compared with LiteRT 2.3 over all integers at random scales.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array, QuantParams
from edgeship.targets.tflite.graph import Node

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
EVERY = np.arange(-128, 128, dtype=np.int64)


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
    return int((table != np.clip(np.rint(real / float(y.scale)) + int(y.zero_point), -128, 127)).sum())


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
