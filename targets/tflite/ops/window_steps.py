"""Pooling that TFLite's two-dimensional kernels do not do at once: 3-D and dilated windows, and indices of maxima.

Maxima and sums over a box are taken axis by axis. Without dilation each step is a MAX_POOL_2D or AVERAGE_POOL_2D over a
view with other axes folded together; with dilation it is one strided slice per element of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.ops.steps import Steps, fixed
from edgeship.targets.tflite.ops.window import Window, flat, spatial

LOWEST = float(np.finfo(np.float32).min)


def lowest(x: Operand) -> float | None:
    """The smallest value of the storage; None where that is zero, which PAD writes by itself."""
    if x.quant is None:
        return (LOWEST if x.dtype.kind == "f" else float(np.iinfo(x.dtype).min)) or None
    return float(x.quant.dequantize(np.array(x.quant.spec.qmin))) or None


def maximum(emit: Emit, w: Window) -> None:
    """Writes the maximum over windows of any rank and dilation."""
    steps = fixed(emit)
    x = emit.input() if len(w.kernel) > 1 else spatial(emit, emit.input())
    w = flat(w)
    x = steps.pad(x, [(0, 0), *w.pads, (0, 0)], lowest(x))
    steps.deliver(steps.activated(_over_axes(steps, x, w, "MAX_POOL_2D", "MAXIMUM"), emit.node.activation))


def average(steps: Steps, x: Operand, w: Window) -> Operand:
    """The mean over windows of any rank and dilation, with zeros beyond the border that are counted."""
    x = steps.pad(x, [(0, 0), *w.pads, (0, 0)])
    result = _over_axes(steps, x, w, "AVERAGE_POOL_2D", "ADD")
    summed = [k for k, dilation in zip(w.kernel, w.dilations, strict=True) if dilation > 1]
    return steps.binary("MUL", result, 1 / float(np.prod(summed))) if summed else result


def _over_axes(steps: Steps, x: Operand, w: Window, pool: str, combine: str) -> Operand:
    """The windows of `w` reduced: by `pool` without dilation, by `combine` between slices with it."""
    count = len(w.kernel)
    axis = 0
    while axis < count:
        together = 2 if axis == count - 2 and w.dilations[axis:] == (1, 1) else 1
        if w.dilations[axis] > 1:
            x = _slices_combined(steps, x, w, axis, combine)
        else:
            x = _pooled(steps, x, w, slice(axis, axis + together), pool)
        axis += together
    return x


def _pooled(steps: Steps, x: Operand, w: Window, axes: slice, pool: str) -> Operand:
    """One or two neighbouring spatial axes pooled, in a view [others, axis, axis or others, C]."""
    kernel, strides, outputs = ((*of[axes], 1)[:2] for of in (w.kernel, w.strides, w.outputs))
    if (*kernel, *strides) == (1, 1, 1, 1):
        return x
    first, last = 1 + axes.start, 1 + axes.stop
    others = int(np.prod(x.shape[last:-1]))
    before, sizes = int(np.prod(x.shape[:first])), (*x.shape[first:last], others)[:2]
    view = steps.reshape(x, (before, *sizes, x.shape[-1]))
    out = (*outputs[:1], others) if last - first == 1 else outputs
    options: dict[str, Any] = {"stride_h": strides[0], "stride_w": strides[1], "padding": "VALID"}
    options |= {"filter_height": kernel[0], "filter_width": kernel[1]}
    shape, signature = ((of[0], *out, of[-1]) for of in (view.shape, view.signature))
    result = steps.emit.compute(pool, [view], shape, signature=signature, **options)
    return steps.reshape(result, (*x.shape[:first], *outputs[: last - first], *x.shape[last:]))


def _slices_combined(steps: Steps, x: Operand, w: Window, axis: int, combine: str) -> Operand:
    parts = [
        steps.slice(x, 1 + axis, tap * w.dilations[axis], w.outputs[axis], w.strides[axis])
        for tap in range(w.kernel[axis])
    ]
    result = parts[0]
    for part in parts[1:]:
        result = steps.binary(combine, result, part)
    return result


def maximum_with_indices(emit: Emit, w: Window) -> None:
    """Writes the maxima and where they lie in the flat input, the first of equals."""
    node, steps = emit.node, fixed(emit)
    x = emit.input()
    x = steps.pad(x, [(0, 0), *w.pads, (0, 0)], lowest(x))
    positions = np.arange(int(np.prod(w.sizes)), dtype=np.int32)
    plane = positions.reshape(w.sizes, order="F" if node.attribute("storage_order", 0) else "C")
    places = emit.constant("places", np.pad(plane, w.pads)[None, ..., None])
    for axis in reversed(range(len(w.kernel))):
        x, places = _first_maximum(steps, x, places, w, axis)
    steps.deliver(x)
    planes = np.arange(x.shape[0] * x.shape[-1], dtype=np.int32).reshape(x.shape[0], *(1,) * len(w.kernel), -1)
    steps.cast(steps.binary("ADD", places, planes * len(positions)), np.int64, emit.output(1))


def _first_maximum(steps: Steps, x: Operand, places: Operand, w: Window, axis: int) -> tuple[Operand, Operand]:
    """The maxima along one axis and their places."""
    best: Operand | None = None
    for tap in range(w.kernel[axis]):
        cut = (1 + axis, tap * w.dilations[axis], w.outputs[axis], w.strides[axis])
        value, place = steps.slice(x, *cut), steps.slice(places, *cut)
        if best is None:
            best, best_place = value, place
        else:
            better = steps.compare("GREATER", value, best)
            best, best_place = steps.binary("MAXIMUM", best, value), steps.select(better, place, best_place)
    return (x, places) if best is None else (best, best_place)


@dataclass(frozen=True)
class Part:
    """Neighbouring outputs of one axis whose windows hold the same number of elements: input start, length, and kernel,
    stride, outputs.
    """

    start: int
    length: int
    kernel: int
    stride: int
    outputs: int


def axis_parts(w: Window, axis: int, behind: int | None) -> list[Part]:
    """The parts of an axis; with `behind` the pads that ONNX names count as elements, and the input has them."""
    front, kernel, stride = w.pads[axis][0], w.kernel[axis], w.strides[axis]
    size, shift = (w.sizes[axis], -front) if behind is None else (front + w.sizes[axis] + behind, 0)
    parts: list[Part] = []
    for output in range(w.outputs[axis]):
        start = output * stride + shift
        low, high = max(start, 0), min(start + kernel, size)
        if parts and parts[-1].kernel == high - low == kernel:
            last = parts.pop()
            parts.append(Part(last.start, high - last.start, kernel, stride, last.outputs + 1))
        else:
            parts.append(Part(low, high - low, high - low, 1 if high - low < kernel else stride, 1))
    return parts


def average_by_parts(steps: Steps, x: Operand, rows: Sequence[Part], columns: Sequence[Part]) -> Operand:
    """The mean over two-dimensional windows, each kind of window at the border by a pooling operator of its own."""
    bands = []
    for row in rows:
        band = steps.slice(x, 1, row.start, row.length)
        pieces = []
        for column in columns:
            piece = steps.slice(band, 2, column.start, column.length)
            options: dict[str, Any] = {"filter_height": row.kernel, "filter_width": column.kernel, "padding": "VALID"}
            options |= {"stride_h": row.stride, "stride_w": column.stride}
            shape, signature = ((of[0], row.outputs, column.outputs, of[-1]) for of in (x.shape, x.signature))
            pieces.append(steps.emit.compute("AVERAGE_POOL_2D", [piece], shape, signature=signature, **options))
        bands.append(steps.concat(pieces, 2) if len(pieces) > 1 else pieces[0])
    return steps.concat(bands, 1) if len(bands) > 1 else bands[0]
