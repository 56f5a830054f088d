"""The scale of an image input, chosen so that every runtime rounds every pixel to the same integer.

An image input takes few values: (pixel - mean) / std for the pixels 0..255. Where one of them lies half-way between two
integers, runtimes differ by a step (ONNX rounds half to even, TFLite away from zero), and with the common
(pixel - 127.5) / 127.5 that is *every* pixel. So:

1. Where the pixels fit an integer grid (one std, whole-numbered means: value = (pixel - mean) / std), scale = 1 / std
   represents all of them exactly. Nothing finer than a pixel carries information, so the observed range plays no part.
2. Otherwise the observed range is widened by the smallest of 0, 0.1, 0.2 ... 2 % that keeps every pixel at least
   `CLEARANCE` steps from a rounding boundary.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.calibration.types import Array, QuantParams, TensorSpec
from edgeship.calibration.values.ranges import Range, choose, range_of, representable

CLEARANCE = 1e-3
"""In steps; float32 arithmetic places a value within about 1e-5 of a step."""
_WIDENINGS = tuple(1 + k / 1000 for k in range(21))
_PIXELS = np.arange(256, dtype=np.float64)


def pixel_levels(preprocessing: Preprocessing) -> Array:
    """Every value that an input of 8-bit pixels can take, float64 (channels, 256)."""
    mean, std = (np.asarray(values, np.float64).reshape(-1, 1) for values in (preprocessing.mean, preprocessing.std))
    return np.asarray((_PIXELS - mean) / std, np.float64)


def image_input_params(observed: Range, preprocessing: Preprocessing, spec: TensorSpec) -> QuantParams:
    """The parameters of an image input (and of the tensors that share its scale) observed in `observed`."""
    levels = pixel_levels(preprocessing)
    exact = _pixel_grid(levels, preprocessing, spec)
    if exact is not None and observed.within(representable(exact), float(exact.scale)):
        return exact
    candidates = [choose(Range(observed.low * factor, observed.high * factor), spec) for factor in _WIDENINGS]
    clearances = [_clearance(params, levels) for params in candidates]
    for params, clearance in zip(candidates, clearances, strict=True):
        if clearance >= CLEARANCE:
            return params
    return candidates[int(np.argmax(clearances))]


def _pixel_grid(levels: Array, preprocessing: Preprocessing, spec: TensorSpec) -> QuantParams | None:
    whole = all(float(mean).is_integer() for mean in preprocessing.mean)
    if not whole or len(set(preprocessing.std)) > 1:
        return None
    scale = 1 / preprocessing.std[0]
    everything = range_of(levels)
    if round(everything.span / scale) > spec.qmax - spec.qmin:
        return None  # with means outside 0..255, zero lies beyond the pixels
    params = choose(Range(everything.low, everything.low + (spec.qmax - spec.qmin) * scale), spec)
    return params if everything.within(representable(params), 0.5 * scale) else None


def _clearance(params: QuantParams, levels: Array) -> float:
    """The distance in steps from the nearest rounding boundary, over all levels inside the range; 0.5 is the best."""
    places = levels / float(params.scale)
    fraction = places - np.floor(places)
    return float(np.abs(fraction - 0.5).min())
