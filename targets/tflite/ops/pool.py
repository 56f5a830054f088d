"""Pooling: MAX_POOL_2D, AVERAGE_POOL_2D, and MEAN and REDUCE_MAX over the whole plane.

int8 averages: TFLite adds integers and divides, rounding half away from zero; the QDQ reference averages in float and
rounds half to even. They differ by at most one step, on ties. MEAN rescales in fixed point: at most one step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import MOVES, Int8, Op
from edgeship.targets.tflite.ops.conv import windows_in_the_plane
from edgeship.targets.tflite.ops.window import Window, finish, flat, padded, spatial, spatial_output, window

LOWEST = float(np.finfo(np.float32).min)


def undilated(node: Node) -> str | None:
    """A pooling window is not dilated."""
    dilations = node.attribute("dilations") or (1,)
    return None if set(dilations) == {1} else f"its dilations are {list(dilations)}; accepted: 1"


def values_only(node: Node) -> str | None:
    """MaxPool gives values, not their indices."""
    return None if len(node.outputs) < 2 or not node.outputs[1].name else "its second output (indices) is not supported"


def counts_evenly(node: Node) -> str | None:
    """All windows of an int8 average hold the same number of elements, or TFLite's SAME says how they differ."""
    w = flat(window(node, node.attribute("kernel_shape")))
    return None if _count_map(node, w) is None else "its windows hold different numbers of elements at the borders"


def _options(w: Window, padding: str) -> dict[str, Any]:
    return {
        "padding": padding,
        "stride_h": w.strides[0],
        "stride_w": w.strides[1],
        "filter_height": w.kernel[0],
        "filter_width": w.kernel[1],
    }


def convert_max_pool(emit: Emit) -> None:
    """Writes a MaxPool; pads that SAME does not say hold the smallest value there is, so they never win."""
    node = emit.node
    w, x = flat(window(node, node.attribute("kernel_shape"))), spatial(emit, emit.input())
    padding = w.padding
    if padding is None:
        x, padding = padded(emit, x, w.pads, _lowest(x)), "VALID"
    y = spatial_output(emit, x)
    emit.operator("MAX_POOL_2D", [x], y, fused_activation_function=node.activation, **_options(w, padding))
    finish(emit, y)


def _lowest(x: Operand) -> float | None:
    """The smallest value of the storage; None where that is zero, which PAD writes by itself."""
    if x.quant is None:
        return (LOWEST if x.dtype.kind == "f" else float(np.iinfo(x.dtype).min)) or None
    return float(x.quant.dequantize(np.array(x.quant.spec.qmin))) or None


def convert_average_pool(emit: Emit) -> None:
    """Writes an AveragePool; where windows hold different numbers of elements than TFLite divides by, a factor corrects
    it.
    """
    node = emit.node
    w, x = flat(window(node, node.attribute("kernel_shape"))), spatial(emit, emit.input())
    factors, y = _count_map(node, w), spatial_output(emit, emit.input())
    padding = w.padding
    if padding is None or (padding == "SAME" and (factors is not None or node.attribute("count_include_pad", 0))):
        x, padding = padded(emit, x, w.pads), "VALID"
    if factors is None:
        emit.operator("AVERAGE_POOL_2D", [x], y, fused_activation_function=node.activation, **_options(w, padding))
    else:
        average = emit.temporary(y.shape, y, "average")
        emit.operator("AVERAGE_POOL_2D", [x], average, **_options(w, padding))
        counts = emit.constant("counts", factors[None, :, :, None].astype(np.float32))
        emit.operator("MUL", [average, counts], y, fused_activation_function=node.activation)
    finish(emit, y)


def _count_map(node: Node, w: Window) -> Array | None:
    """Window size over the number of elements ONNX divides by, [H, W]; None where TFLite's own division is right."""
    include = bool(node.attribute("count_include_pad", 0))
    if not include and w.padding is not None:
        return None
    attribute = node.attribute("pads") or (0,) * 2 * (node.x.rank - 2)
    behinds = (0,) * (len(w.kernel) - node.x.rank + 2) + tuple(attribute[node.x.rank - 2 :])
    if node.attribute("auto_pad", "NOTSET") not in ("NOTSET", ""):
        behinds = tuple(behind for _, behind in w.pads)
    counts = []
    for size, out, k, stride, (front, _), behind in zip(
        w.sizes, w.outputs, w.kernel, w.strides, w.pads, behinds, strict=True
    ):
        starts = np.arange(out) * stride - front
        low, high = (-front, size + behind) if include else (0, size)
        counts.append(np.minimum(starts + k, high) - np.maximum(starts, low))
    share = np.outer(counts[0], counts[1]) / (w.kernel[0] * w.kernel[1])
    return None if (share == 1).all() else 1 / share


def _plane(emit: Emit) -> Operand:
    return emit.ints("plane", range(1, emit.node.x.rank - 1))


def convert_global_average(emit: Emit) -> None:
    """Writes a GlobalAveragePool."""
    emit.operator("MEAN", [emit.input(), _plane(emit)], emit.output(), keep_dims=True)


def convert_global_max(emit: Emit) -> None:
    """Writes a GlobalMaxPool."""
    emit.operator("REDUCE_MAX", [emit.input(), _plane(emit)], emit.output(), keep_dims=True)


PLANE = (windows_in_the_plane, undilated)
OPS = (
    Op("MaxPool", convert_max_pool, CHANNELS_LAST, MOVES, (*PLANE, values_only), fuses=True),
    Op(
        "AveragePool",
        convert_average_pool,
        CHANNELS_LAST,
        Int8(shares_scale=True, limits=(counts_evenly,)),
        PLANE,
        fuses=True,
    ),
    Op("GlobalAveragePool", convert_global_average, CHANNELS_LAST, Int8()),
    Op("GlobalMaxPool", convert_global_max, CHANNELS_LAST, MOVES),
)
