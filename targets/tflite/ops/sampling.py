"""Samples of an image at places that are computed: GridSample, RoiAlign, DeformConv, and AffineGrid, which computes
them.
"""

from __future__ import annotations

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST, NATURAL
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.steps import Steps, fixed
from edgeship.targets.tflite.ops.taps import Sampler, sample

METHODS = {"bilinear": "linear", "bicubic": "cubic"}
"""GridSample's names before opset 20."""


def pixels_of(steps: Steps, image: Operand) -> Operand:
    """A channels-last image as [N, pixels, C]."""
    return steps.reshape(image, (image.shape[0], int(np.prod(image.shape[1:-1])), image.shape[-1]))


def convert_grid_sample(emit: Emit) -> None:
    """Writes a GridSample: the grid as pixel coordinates, one GATHER of all taps, their weighted sum."""
    node, steps = emit.node, fixed(emit)
    image, grid = emit.input(), emit.input(1)
    sizes, aligned = image.shape[1:-1], bool(node.attribute("align_corners", 0))
    method = str(node.attribute("mode", "linear"))
    sampler = Sampler(sizes, METHODS.get(method, method), str(node.attribute("padding_mode", "zeros")), aligned)
    places = steps.reshape(grid, (grid.shape[0], int(np.prod(grid.shape[1:-1])), grid.shape[-1]))
    if len(sizes) > 1:  # the grid names x first
        places = steps.gather(places, np.arange(len(sizes))[::-1], 2)
    half = np.array([size - 1 if aligned else size for size in sizes], np.float32) / 2
    places = steps.binary("MUL", steps.binary("ADD", places, 1.0), half)
    if not aligned:
        places = steps.binary("SUB", places, 0.5)
    index, weights = sampler.taps(steps, places)
    steps.deliver(sample(steps, pixels_of(steps, image), index, weights))


def known_modes(node: Node) -> str | None:
    """Modes are nearest, linear and cubic; paddings zeros, border and reflection."""
    mode, padding = node.attribute("mode", "linear"), node.attribute("padding_mode", "zeros")
    if mode in ("nearest", "linear", "cubic", *METHODS) and padding in ("zeros", "border", "reflection"):
        return None
    return f"its mode is {mode} with padding {padding}"


def convert_affine_grid(emit: Emit) -> None:
    """Writes an AffineGrid: one product of theta with a constant grid."""
    node, steps, theta = emit.node, fixed(emit), emit.input()
    sizes = node.y.shape[1:-1]
    axes = [_grid_axis(size, bool(node.attribute("align_corners", 0))) for size in sizes]
    mesh = np.meshgrid(*axes, indexing="ij")
    points = np.stack([*mesh[::-1], np.ones_like(mesh[0])], axis=-1).reshape(1, -1, len(sizes) + 1)
    grid = emit.constant("grid", points.astype(np.float32))
    steps.deliver(steps.matmul(grid, theta, adj_y=True))


def _grid_axis(size: int, aligned: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.linspace(-1, 1, size) if aligned else (2 * np.arange(size) + 1) / size - 1


def convert_roi_align(emit: Emit) -> None:
    """Writes a RoiAlign: bilinear taps along each axis, one GATHER, and the mean or maximum over each bin."""
    node, steps = emit.node, fixed(emit)
    image, rois, batch = emit.input(), emit.input(1), emit.input(2)
    samples = int(node.attribute("sampling_ratio", 0))
    size, out = image.shape[1:3], steps.made[1:3]
    count, channels, taps = rois.shape[0], image.shape[-1], 2 * samples
    rows, row_weights = _roi_axis(steps, node, rois, (1, size[0], out[0]), (count, out[0] * taps, 1))
    columns, column_weights = _roi_axis(steps, node, rois, (0, size[1], out[1]), (count, 1, out[1] * taps))
    first = steps.binary("MUL", steps.reshape(steps.cast(batch, np.int32), (count, 1, 1)), size[0] * size[1])
    places = steps.binary("ADD", steps.binary("ADD", steps.binary("MUL", rows, size[1]), columns), first)
    pixels = steps.reshape(image, (int(np.prod(image.shape[:3])), channels))
    values = steps.gather(pixels, places, 0)
    weights = steps.binary("MUL", row_weights, column_weights)
    values = steps.binary("MUL", values, steps.reshape(weights, (*weights.shape, 1)))
    maximum = node.attribute("mode", "avg") == "max"
    name = "REDUCE_MAX" if maximum else "SUM"
    values = steps.reshape(values, (count * rows.shape[1] * out[1], taps, channels))
    values = steps.reshape(steps.reduce(name, values, 1), (count * out[0], taps, out[1] * channels))
    values = steps.reduce(name, values, 1)
    if not maximum:
        values = steps.binary("MUL", values, 1 / samples**2)
    steps.deliver(values)


def _roi_axis(
    steps: Steps, node: Node, rois: Operand, which: tuple[int, int, int], shape: tuple[int, int, int]
) -> tuple[Operand, Operand]:
    """Pixel indices and weights along one axis in the wanted shape; `which`: its column of the rois, size, bins."""
    column, size, bins = which
    half_pixel = node.attribute("coordinate_transformation_mode", "half_pixel") == "half_pixel" and node.opset >= 16
    ends = steps.binary("MUL", rois, float(node.attribute("spatial_scale", 1.0)))
    if half_pixel:
        ends = steps.binary("SUB", ends, 0.5)
    start, stop = (steps.slice(ends, 1, place, 1) for place in (column, column + 2))
    length = steps.binary("SUB", stop, start)
    if not half_pixel:
        length = steps.binary("MAXIMUM", length, 1.0)
    samples = int(node.attribute("sampling_ratio", 0))
    shares = (np.arange(bins * samples) + 0.5) / (bins * samples)
    at = steps.binary("ADD", steps.binary("MUL", length, shares.astype(np.float32)[None]), start)
    near = steps.compare("EQUAL", steps.clamp(at, -1.0, float(size)), at)
    at = steps.reshape(at, (*at.shape, 1))
    index, weights = Sampler((size,), "linear", "border").taps(steps, at)
    near = steps.reshape(steps.cast(near, np.float32), (*near.shape, 1))
    weights = near if weights is None else steps.binary("MUL", weights, near)
    return steps.reshape(index, shape), steps.reshape(weights, shape)


def fixed_samples(node: Node) -> str | None:
    """RoiAlign takes a fixed number of samples per bin (sampling_ratio), of images in a static batch."""
    if int(node.attribute("sampling_ratio", 0)) <= 0:
        return "its sampling_ratio is 0: the number of samples depends on the regions; accepted: 1 or more"
    return "its batch is dynamic" if node.x.is_dynamic or node.tensor(1).is_dynamic else None


REAL = of_types("float32")
OPS = (
    Op("GridSample", convert_grid_sample, CHANNELS_LAST, None, (REAL, known_modes), since=16),
    Op("AffineGrid", convert_affine_grid, NATURAL, None, (REAL,), since=20),
    Op("RoiAlign", convert_roi_align, CHANNELS_LAST, None, (REAL, fixed_samples), since=10),
)
