"""Deformable convolution: bilinear samples at displaced places, then a product with the weights.

Output pixel p takes tap k of the window at `stride * p - pad + dilation * k + offset[p, k]`, zero beyond the image,
times `mask[p, k]`; the samples of all taps, side by side, times the weights are the convolution.
"""

from __future__ import annotations

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout import Layout
from edgeship.targets.tflite.layout_rules import ChannelsLast
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.steps import Steps, fixed
from edgeship.targets.tflite.ops.taps import Sampler, sample

WEIGHTS, OFFSET, BIAS, MASK = 1, 2, 3, 4
OUTPUT_FIRST = Layout((0, 2, 3, 1))


def _places(node: Node) -> Array:
    """Where the taps lie without their offsets, [output pixels * taps, (row, column)]."""
    kernel, out = node.tensor(WEIGHTS).shape[2:], node.y.shape[2:]
    strides, dilations = (node.attribute(name) or (1, 1) for name in ("strides", "dilations"))
    pads = node.attribute("pads") or (0, 0, 0, 0)
    axes = [
        np.arange(out[axis])[:, None] * strides[axis] - pads[axis] + np.arange(kernel[axis]) * dilations[axis]
        for axis in range(2)
    ]
    rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
    grid = np.broadcast_arrays(rows, columns)
    return np.stack(grid, axis=-1).reshape(-1, 2).astype(np.float32)


def _samples(emit: Emit, steps: Steps) -> Operand:
    """The samples [N, output pixels * taps, C]."""
    node, image = emit.node, emit.input()
    count, groups, places = image.shape[0], int(node.attribute("offset_group", 1)), _places(node)
    taps = int(np.prod(node.tensor(WEIGHTS).shape[2:]))
    points, each = len(places) // taps, image.shape[-1] // groups
    pixels = steps.reshape(image, (count, image.shape[1] * image.shape[2], image.shape[3]))
    offsets = steps.reshape(emit.input(OFFSET), (count, points, groups, 2 * taps))
    mask = steps.reshape(emit.input(MASK), (count, points, groups, taps)) if node.has(MASK) else None
    sampler, parts = Sampler(image.shape[1:3], "linear"), []
    for group in range(groups):
        shift = steps.reshape(steps.slice(offsets, 2, group, 1), (count, points * taps, 2))
        index, weights = sampler.taps(steps, steps.binary("ADD", shift, places))
        values = sample(steps, steps.slice(pixels, 2, group * each, each), index, weights)
        if mask is not None:
            factor = steps.reshape(steps.slice(mask, 2, group, 1), (count, points * taps, 1))
            values = steps.binary("MUL", values, factor)
        parts.append(values)
    return steps.concat(parts, 2) if groups > 1 else parts[0]


def convert_deform_conv(emit: Emit) -> None:
    """Writes a DeformConv."""
    node, steps, weights = emit.node, fixed(emit), emit.node.tensor(WEIGHTS)
    values, groups = _samples(emit, steps), int(node.attribute("group", 1))
    taps, each, made = int(np.prod(weights.shape[2:])), weights.shape[1], weights.shape[0] // groups
    rows = values.shape[0] * values.shape[1] // taps
    kernel = emit.writer.arranged(weights, OUTPUT_FIRST)
    matrix = emit.writer.reshape(kernel, (weights.shape[0], taps * each), (weights.shape[0], taps * each))
    parts = []
    for group in range(groups):
        columns = steps.reshape(steps.slice(values, 2, group * each, each), (rows, taps * each))
        operands = [columns, steps.slice(matrix, 0, group * made, made)]
        parts.append(emit.compute("FULLY_CONNECTED", operands, (rows, made), signature=(columns.signature[0], made)))
    result = steps.concat(parts, 1) if groups > 1 else parts[0]
    if node.has(BIAS):
        result = steps.binary("ADD", result, emit.input(BIAS))
    steps.deliver(result)


def in_the_plane(node: Node) -> str | None:
    """Images are 2-D."""
    return None if node.x.rank == 4 else f"its input has rank {node.x.rank}; accepted: 4"


LAYOUT = ChannelsLast((0, OFFSET, MASK))
OPS = (Op("DeformConv", convert_deform_conv, LAYOUT, None, (of_types("float32"), in_the_plane), since=19),)
