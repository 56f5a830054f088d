"""Resize: RESIZE_NEAREST_NEIGHBOR and RESIZE_BILINEAR, chosen by comparing where each samples.

With s = in / out, TFLite samples output i of the bilinear kernel at i * s, at i * (in - 1) / (out - 1) (align_corners),
or at (i + 0.5) * s - 0.5 (half_pixel_centers); the nearest kernel takes floor(i * s), round(i * (in - 1) / (out - 1)),
or floor((i + 0.5) * s). ONNX's coordinates are computed for every output index; a node is converted only where they are
the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.graph import Node, Unsupported
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.elementwise import of_types

MODES = {"plain": {}, "align_corners": {"align_corners": True}, "half_pixel": {"half_pixel_centers": True}}
SAME = 1e-4
"""Of a pixel: coordinates closer than this are taken as the same (TFLite computes them in float32)."""


def convert_resize(emit: Emit) -> None:
    """Writes a Resize or Upsample whose samples TFLite takes at the same places; nearest falls back to a GATHER per
    axis.
    """
    node, x, y = emit.node, emit.input(), emit.output()
    kind = node.attribute("mode", "nearest")
    mode = _mode(node, kind)
    if mode is not None:
        name = "RESIZE_NEAREST_NEIGHBOR" if kind == "nearest" else "RESIZE_BILINEAR"
        emit.operator(name, [x, emit.ints("size", y.shape[1:3])], y, **MODES[mode])
        return
    for place in (1, 2):
        indices = _nearest(node, _coordinates(node, place + 1)).clip(0, x.shape[place] - 1)
        shape = [len(indices) if i == place else size for i, size in enumerate(x.shape)]
        target = y if place == 2 else emit.temporary(shape, x, "rows")
        emit.operator("GATHER", [x, emit.ints("indices", indices)], target, axis=place)
        x = target


def expressible(node: Node) -> str | None:
    """Samples lie where TFLite's kernels take them: nearest always, linear for four of ONNX's coordinate modes."""
    if node.x.rank != 4 or node.x.shape[:2] != node.y.shape[:2]:
        return f"it resizes {list(node.x.shape)} to {list(node.y.shape)}; accepted: height and width of a 4-D tensor"
    if node.attribute("antialias", 0) or node.attribute("exclude_outside", 0):
        return "antialias and exclude_outside have no TFLite form"
    kind = node.attribute("mode", "nearest")
    if kind not in ("nearest", "linear"):
        return f"its mode is {kind}; accepted: nearest, linear"
    transformation = _transformation(node)
    if transformation == "tf_crop_and_resize":
        return (
            f"its coordinates are {transformation}; accepted: asymmetric, align_corners, half_pixel, pytorch_half_pixel"
        )
    if kind == "linear" and _mode(node, kind) is None:
        return f"its linear samples ({transformation}) lie where TFLite's kernel takes none"
    return None


def _transformation(node: Node) -> str:
    if node.op_type == "Upsample" or node.opset < 11:
        return "asymmetric"
    return str(node.attribute("coordinate_transformation_mode", "half_pixel"))


def _scale(node: Node, axis: int) -> float:
    """Output size over input size, as the node gives it: it may differ from the ratio of the rounded sizes."""
    index = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
    scales = node.parameter("scales", index) if node.has(index) or "scales" in node.attributes else None
    if scales is None or not scales.size:
        return node.y.shape[axis] / node.x.shape[axis]
    axes = node.attribute("axes") or list(range(node.x.rank))
    places = [a + node.x.rank if a < 0 else a for a in axes]
    return float(scales[places.index(axis)]) if axis in places else 1.0


def _coordinates(node: Node, axis: int) -> Array:
    """Where ONNX samples along `axis`, for every output index."""
    before, after, scale = node.x.shape[axis], node.y.shape[axis], _scale(node, axis)
    i = np.arange(after, dtype=np.float64)
    transformation = _transformation(node)
    if transformation == "asymmetric":
        return i / scale
    if transformation == "align_corners":
        length = scale * before  # ONNX's reference takes the unrounded length, ONNX Runtime the rounded one
        return i * (before - 1) / (length - 1) if length > 1 else np.zeros(after)
    if transformation == "half_pixel_symmetric":
        adjustment = after / (scale * before)
        return before / 2 * (1 - adjustment) + (i + 0.5) / scale - 0.5
    if transformation == "pytorch_half_pixel" and after == 1:
        return np.zeros(1)
    return (i + 0.5) / scale - 0.5


def _nearest(node: Node, coordinates: Array) -> Array:
    """The input indices ONNX takes at `coordinates`, before clamping."""
    default = "round_prefer_floor" if node.opset >= 11 and node.op_type == "Resize" else "floor"
    mode = node.attribute("nearest_mode", default)
    rounded = {
        "round_prefer_floor": lambda: np.ceil(coordinates - 0.5),
        "round_prefer_ceil": lambda: np.floor(coordinates + 0.5),
        "floor": lambda: np.floor(coordinates + 1e-9),
        "ceil": lambda: np.ceil(coordinates - 1e-9),
    }
    if mode not in rounded:
        raise Unsupported("rounds coordinates in an unknown way", mode, ", ".join(rounded))
    return rounded[mode]().astype(np.int64)


def _mode(node: Node, kind: str) -> str | None:
    """The TFLite mode that samples where ONNX does on both axes, or None."""
    for mode in MODES:
        if all(_agrees(node, kind, mode, axis) for axis in (2, 3)):
            return mode
    return None


def _agrees(node: Node, kind: str, mode: str, axis: int) -> bool:
    before, after = node.x.shape[axis], node.y.shape[axis]
    theirs = _coordinates(node, axis)
    ours = np.array(list(_sampled(mode, kind, before, after)), np.float64)
    if kind == "nearest":
        ours = np.array([int(v) for v in ours])
        return np.array_equal(_nearest(node, theirs).clip(0, before - 1), ours.clip(0, before - 1))
    return bool(np.abs(theirs.clip(0, before - 1) - ours.clip(0, before - 1)).max() < SAME)


def _sampled(mode: str, kind: str, before: int, after: int) -> Iterator[float]:
    """Where TFLite samples (tensorflow/lite/kernels/internal/reference/resize_*.h), in its own float32 arithmetic."""
    one, half = np.float32(1), np.float32(0.5)
    aligned = mode == "align_corners" and after > 1
    scale = np.float32(before - 1) / np.float32(after - 1) if aligned else np.float32(before) / np.float32(after)
    for i in range(after):
        if kind == "nearest":
            value = (np.float32(i) + (half if mode == "half_pixel" else np.float32(0))) * scale
            yield float(np.floor(value + half) if mode == "align_corners" else np.floor(value * one))
        else:
            value = (np.float32(i) + half) * scale - half if mode == "half_pixel" else np.float32(i) * scale
            yield float(value)


INT8 = Int8(shares_scale=True, real_inputs=frozenset({1, 2}))

OPS = (
    Op("Resize", convert_resize, CHANNELS_LAST, INT8, (of_types("float32"), expressible), since=10),
    Op("Upsample", convert_resize, CHANNELS_LAST, INT8, (of_types("float32"), expressible)),
)
