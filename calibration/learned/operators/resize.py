"""Resize as a matrix per axis: every separable interpolation that ONNX has, in all its coordinate systems.

    y = A x,  A[i, j] = k((j - c(i)) s) / sum_j k((j - c(i)) s)

with c(i) the place of output i in the input, k the kernel (triangle or cubic), and s = min(1, scale) when antialiased,
else 1. Taps outside the input are moved to its border, or left out (`exclude_outside`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from edgeship.calibration.learned.call import Call, Operator
from edgeship.calibration.types import Array

Kernel = Callable[[Array], Array]

_NEAREST: Mapping[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _coordinates(call: Call, size: int, out: int, scale: float) -> Array:
    mode = call.get("coordinate_transformation_mode", "half_pixel")
    i = np.arange(out, dtype=np.float64)
    if mode == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if out > 1 else np.zeros(1)
    if mode == "align_corners":
        return i * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    if mode == "asymmetric":
        return i / scale
    if mode == "half_pixel_symmetric":
        offset = size / 2 * (1 - out / (scale * size))
        return offset + (i + 0.5) / scale - 0.5
    raise call.refuse(
        f"coordinate_transformation_mode {mode!r}",
        "half_pixel, pytorch_half_pixel, align_corners, asymmetric, half_pixel_symmetric",
    )


def _cubic(a: float) -> Kernel:
    def kernel(x: Array) -> Array:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.asarray(np.where(x <= 1, near, np.where(x < 2, far, 0.0)))

    return kernel


def _triangle(x: Array) -> Array:
    return np.asarray(np.maximum(1 - np.abs(x), 0.0))


def interpolation(call: Call, size: int, out: int, scale: float) -> Array:
    """The matrix (out, size) of one axis, float64."""
    centres = _coordinates(call, size, out, scale)
    matrix = np.zeros((out, size))
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        chosen = _NEAREST[call.get("nearest_mode", "round_prefer_floor")](centres)
        matrix[np.arange(out), np.clip(chosen, 0, size - 1).astype(int)] = 1
        return matrix
    kernel, reach = (_triangle, 1) if mode == "linear" else (_cubic(call.get("cubic_coeff_a", -0.75)), 2)
    stretch = min(1.0, scale) if call.get("antialias", 0) else 1.0
    span = math.ceil(reach / stretch)
    taps = np.floor(centres)[:, None] + np.arange(1 - span, span + 1)
    weights = kernel((taps - centres[:, None]) * stretch)
    if call.get("exclude_outside", 0):
        weights = np.where((taps < 0) | (taps >= size), 0.0, weights)
    weights = weights / weights.sum(axis=1, keepdims=True)
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(taps, 0, size - 1).astype(int)), weights)
    return matrix


def _resize(call: Call) -> Tensor:
    x = call.tensor()
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse(f"keep_aspect_ratio_policy {call.get('keep_aspect_ratio_policy')!r}", "stretch")
    if call.get("mode", "nearest") not in {"nearest", "linear", "cubic"}:
        raise call.refuse(f"mode {call.get('mode')!r}", "nearest, linear, cubic")
    axes = [axis % x.ndim for axis in call.get("axes", range(x.ndim))]
    sizes = call.ints(3)
    if sizes:
        scales = [out / x.shape[axis] for out, axis in zip(sizes, axes, strict=True)]
    else:
        scales = [float(value) for value in call.tensor(2).reshape(-1).tolist()]
        sizes = [math.floor(x.shape[axis] * scale) for axis, scale in zip(axes, scales, strict=True)]
    for axis, out, scale in zip(axes, sizes, scales, strict=True):
        if out != x.shape[axis] or scale != 1:
            matrix = torch.from_numpy(interpolation(call, x.shape[axis], out, scale)).to(x)
            x = torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)
    return x


OPERATORS: Mapping[str, Operator] = {"Resize": _resize}
