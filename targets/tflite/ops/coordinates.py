"""Where a Resize samples its input, in ONNX's words: scales, sizes, regions, coordinate transformations."""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.graph import Node, Unsupported

CROP = "tf_crop_and_resize"


def kind_of(node: Node) -> str:
    """nearest, linear or cubic."""
    kind = str(node.attribute("mode", "nearest"))
    if kind not in ("nearest", "linear", "bilinear", "cubic"):
        raise Unsupported("interpolates in an unknown way", kind, "nearest, linear, cubic")
    return "linear" if kind == "bilinear" else kind


def transformation(node: Node) -> str:
    """The name of the coordinate transformation."""
    if node.op_type == "Upsample" or node.opset < 11:
        return "asymmetric"
    return str(node.attribute("coordinate_transformation_mode", "half_pixel"))


def _axes(node: Node) -> list[int]:
    axes = node.attribute("axes") or range(node.x.rank)
    return [axis + node.x.rank if axis < 0 else axis for axis in axes]


def scale(node: Node, axis: int) -> float:
    """Output size over input size, as the node gives it: it may differ from the ratio of the rounded sizes."""
    axes = _axes(node)
    if axis not in axes:
        return 1.0
    index = 1 if node.op_type == "Upsample" or node.opset < 11 else 2
    scales = node.parameter("scales", index) if node.has(index) or "scales" in node.attributes else None
    if scales is not None and scales.size:
        return float(scales[axes.index(axis)])
    policy = node.attribute("keep_aspect_ratio_policy", "stretch")
    sizes = node.ints("sizes", 3)
    if policy == "stretch" or sizes is None:
        return node.y.shape[axis] / node.x.shape[axis]
    ratios = [size / node.x.shape[place] for size, place in zip(sizes, axes, strict=True)]
    return min(ratios) if policy == "not_larger" else max(ratios)


def _region(node: Node, axis: int) -> tuple[float, float]:
    """Start and end of the region of interest, as shares of the axis."""
    roi, axes = node.parameter("roi", 1), _axes(node)
    if roi is None or not roi.size or axis not in axes:
        return 0.0, 1.0
    return float(roi[axes.index(axis)]), float(roi[len(axes) + axes.index(axis)])


def coordinates(node: Node, axis: int) -> Array:
    """Where ONNX samples along `axis`, for every output index."""
    before, after, factor = node.x.shape[axis], node.y.shape[axis], scale(node, axis)
    i = np.arange(after, dtype=np.float64)
    half = (i + 0.5) / factor - 0.5
    length = factor * before
    start, end = _region(node, axis) if transformation(node) == CROP else (0.0, 1.0)
    span = (end - start) * (before - 1)
    by_mode = {
        "asymmetric": i / factor,
        "half_pixel": half,
        "pytorch_half_pixel": half if after > 1 else np.zeros(1),
        "half_pixel_symmetric": before / 2 * (1 - after / length) + half,
        # the length as it is: ONNX's reference takes the unrounded one, ONNX Runtime and PyTorch do not
        "align_corners": i * (before - 1) / (after - 1) if after > 1 else np.zeros(after),
        CROP: start * (before - 1) + (i * span / (length - 1) if length > 1 else np.full(after, span / 2)),
    }
    if transformation(node) not in by_mode:
        raise Unsupported("samples in an unknown way", transformation(node), ", ".join(by_mode))
    return by_mode[transformation(node)]


def nearest(node: Node, axis: int) -> Array:
    """The input index ONNX takes along `axis`, for every output index."""
    at = coordinates(node, axis)
    default = "round_prefer_floor" if node.opset >= 11 and node.op_type == "Resize" else "floor"
    mode = node.attribute("nearest_mode", default)
    rounded = {
        "round_prefer_floor": lambda: np.ceil(at - 0.5),
        "round_prefer_ceil": lambda: np.floor(at + 0.5),
        "floor": lambda: np.floor(at + 1e-9),
        "ceil": lambda: np.ceil(at - 1e-9),
    }
    if mode not in rounded:
        raise Unsupported("rounds coordinates in an unknown way", mode, ", ".join(rounded))
    return rounded[mode]().astype(np.int64).clip(0, node.x.shape[axis] - 1)
