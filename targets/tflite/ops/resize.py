"""Resize: RESIZE_NEAREST_NEIGHBOR and RESIZE_BILINEAR where they sample as ONNX does; else a GATHER (nearest) or a
BATCH_MATMUL with a constant matrix (linear, cubic) per axis.

With s = in / out, TFLite samples output i of the bilinear kernel at i * s, at i * (in - 1) / (out - 1) (align_corners),
or at (i + 0.5) * s - 0.5 (half_pixel_centers); the nearest kernel takes floor(i * s), round(i * (in - 1) / (out - 1)),
or floor((i + 0.5) * s). ONNX's coordinates are computed for every output index and compared with these.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST
from edgeship.targets.tflite.op import Int8, Int16, Op
from edgeship.targets.tflite.ops.coordinates import CROP, coordinates, kind_of, nearest, scale, transformation
from edgeship.targets.tflite.ops.interpolation import Kernel, matrix
from edgeship.targets.tflite.ops.steps import Steps

MODES = {"plain": {}, "align_corners": {"align_corners": True}, "half_pixel": {"half_pixel_centers": True}}
SAME = 1e-4
"""Of a pixel: coordinates closer than this are taken as the same (TFLite computes them in float32)."""
CUBIC_A = -0.75


def convert_resize(emit: Emit) -> None:
    """Writes a Resize or Upsample: TFLite's kernel, or one operator per axis that changes."""
    node, x = emit.node, emit.input()
    mode = native_mode(node)
    if mode is not None:
        name = "RESIZE_NEAREST_NEIGHBOR" if kind_of(node) == "nearest" else "RESIZE_BILINEAR"
        emit.operator(name, [x, emit.ints("size", emit.output().shape[1:3])], emit.output(), **MODES[mode])
        return
    axes = sorted(resized_axes(node), key=emit.layout.axis)
    if not axes:
        emit.alias(x)
        return
    fill = _fill(emit, axes) if _leaves_image(node) else None
    for axis in axes:
        target = emit.output() if axis == axes[-1] and fill is None else None
        x = _along(emit, x, axis, target)
    if fill is not None:
        emit.operator("ADD", [x, fill], emit.output())


def _along(emit: Emit, x: Operand, axis: int, into: Operand | None) -> Operand:
    """`x` resized along one ONNX axis."""
    node, steps, place = emit.node, Steps(emit), emit.layout.axis(axis)
    if kind_of(node) == "nearest" and not _leaves_image(node):
        indices = nearest(node, axis)
        return steps.gather(x, indices, place, into=into)
    before, after = int(np.prod(x.shape[:place])), int(np.prod(x.shape[place + 1 :]))
    weights = emit.constant("weights", weights_along(node, axis)[None].astype(np.float32))
    columns = steps.reshape(x, (before, x.shape[place], after))
    shape, signature = ([*of[:place], weights.shape[1], *of[place + 1 :]] for of in (x.shape, x.signature))
    product = steps.matmul(weights, columns)
    return emit.writer.reshape(product, shape, signature, into)


def weights_along(node: Node, axis: int) -> Array:
    """The matrix that resizes along `axis`; its rows are zero where tf_crop_and_resize leaves the image."""
    size = node.x.shape[axis]
    if kind_of(node) == "nearest":
        rows = np.eye(size)[nearest(node, axis)]
    else:
        a = float(node.attribute("cubic_coeff_a", CUBIC_A)) if kind_of(node) == "cubic" else None
        kernel = Kernel(a, bool(node.attribute("antialias", 0)), bool(node.attribute("exclude_outside", 0)))
        rows = matrix(kernel, coordinates(node, axis), size, scale(node, axis))
    rows[_outside(node, axis)] = 0
    return rows


def _outside(node: Node, axis: int) -> Array:
    """Which outputs sample beyond the image and so take the extrapolation value."""
    at = coordinates(node, axis)
    if transformation(node) != CROP:
        return np.zeros(len(at), np.bool_)
    return (at < 0) | (at > node.x.shape[axis] - 1)


def _leaves_image(node: Node) -> bool:
    return any(_outside(node, axis).any() for axis in resized_axes(node))


def _fill(emit: Emit, axes: list[int]) -> Operand | None:
    """The extrapolation value where it goes and zero elsewhere; None where it is zero."""
    node, value = emit.node, float(emit.node.attribute("extrapolation_value", 0.0))
    if value == 0.0:
        return None
    mask = np.zeros((1,) * node.y.rank, np.bool_)
    for axis in axes:
        shape = [1] * node.y.rank
        shape[axis] = -1
        mask = mask | _outside(node, axis).reshape(shape)
    values = np.where(mask, np.float32(value), np.float32(0))
    return emit.constant("outside", np.ascontiguousarray(values.transpose(emit.layout.perm)))


def resized_axes(node: Node) -> list[int]:
    """The ONNX axes that are not just copied."""
    changed = []
    for axis, (before, after) in enumerate(zip(node.x.shape, node.y.shape, strict=True)):
        if node.x.signature[axis] == -1 or node.y.signature[axis] == -1:
            continue  # a dynamic batch: `known_axes` has seen to it that its scale is 1
        if before != after or not np.allclose(coordinates(node, axis), np.arange(after), rtol=0, atol=1e-6):
            changed.append(axis)
    return changed


def known_axes(node: Node) -> str | None:
    """Resized dimensions are known at conversion."""
    if node.x.rank != node.y.rank:
        return "its output's shape is not known"
    for axis, size in enumerate(node.x.signature):
        if size == -1 and not np.isclose(scale(node, axis), 1.0):
            return f"it resizes axis {axis}, which is dynamic"
    return None


def resizable_type(node: Node) -> str | None:
    """Values are float32; nearest takes any type."""
    if node.x.dtype == np.float32 or (kind_of(node) == "nearest" and not _leaves_image(node)):
        return None
    return f"its operands are {node.x.dtype}; accepted: float32, or any type in mode nearest"


def moves_or_native(node: Node) -> str | None:
    """An int8 Resize is one that TFLite's own kernel does, or nearest."""
    if (kind_of(node) == "nearest" and not _leaves_image(node)) or native_mode(node) is not None:
        return None
    return f"its samples ({kind_of(node)}, {transformation(node)}) lie where TFLite's int8 kernel takes none"


def native_mode(node: Node) -> str | None:
    """The mode in which TFLite's kernel samples where ONNX does, or None."""
    kind = kind_of(node)
    if (
        node.x.rank != 4
        or kind == "cubic"
        or node.x.dtype != np.float32
        or transformation(node) == CROP
        or (node.attribute("antialias", 0) and kind != "nearest" and _shrinks(node))
        or not set(resized_axes(node)) <= {2, 3}
    ):
        return None
    return next((mode for mode in MODES if all(_agrees(node, kind, mode, axis) for axis in (2, 3))), None)


def _shrinks(node: Node) -> bool:
    return any(after < before for before, after in zip(node.x.shape, node.y.shape, strict=True))


def _agrees(node: Node, kind: str, mode: str, axis: int) -> bool:
    before, after = node.x.shape[axis], node.y.shape[axis]
    theirs = coordinates(node, axis)
    ours = np.array(list(_sampled(mode, kind, before, after)), np.float64)
    if kind == "nearest":
        ours = np.array([int(v) for v in ours])
        return np.array_equal(nearest(node, axis), ours.clip(0, before - 1))
    return bool(np.abs(theirs.clip(0, before - 1) - ours.clip(0, before - 1)).max() < SAME)


def _sampled(mode: str, kind: str, before: int, after: int) -> Iterator[float]:
    """Where TFLite samples (tensorflow/lite/kernels/internal/reference/resize_*.h), in its own float32 arithmetic."""
    one, half = np.float32(1), np.float32(0.5)
    aligned = mode == "align_corners" and after > 1
    step = np.float32(before - 1) / np.float32(after - 1) if aligned else np.float32(before) / np.float32(after)
    for i in range(after):
        if kind == "nearest":
            value = (np.float32(i) + (half if mode == "half_pixel" else np.float32(0))) * step
            yield float(np.floor(value + half) if mode == "align_corners" else np.floor(value * one))
        else:
            value = (np.float32(i) + half) * step - half if mode == "half_pixel" else np.float32(i) * step
            yield float(value)


INT8 = Int8(shares_scale=True, real_inputs=frozenset({1, 2}), limits=(moves_or_native,), wide=Int16())
LIMITS = (known_axes, resizable_type)

OPS = (
    Op("Resize", convert_resize, CHANNELS_LAST, INT8, LIMITS, since=10),
    Op("Upsample", convert_resize, CHANNELS_LAST, INT8, LIMITS),
)
