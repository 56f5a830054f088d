"""Blocks, triangles and crops: DEPTH_TO_SPACE, SPACE_TO_DEPTH, SELECT_V2 by a constant mask.

TFLite stores a block's elements with the channel last, (row, column, channel): ONNX's mode DCR. Mode CRD, (channel,
row, column), is the same after its channels are reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from edgeship.calibration.types import Array
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported, constant
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST, NATURAL
from edgeship.targets.tflite.op import MOVES, Op

WIDEST_SELECT = 5
"""Axes over which SELECT_V2 broadcasts."""


def _channel_first(node: Node) -> bool:
    """Whether a block's channels come before its rows and columns."""
    return str(node.attribute("mode", "DCR")) == "CRD"


def convert_depth_to_space(emit: Emit) -> None:
    """Writes a DepthToSpace; in mode CRD its channels are put in DCR's order first."""
    node, x, size = emit.node, emit.input(), int(emit.node.attribute("blocksize"))
    if _channel_first(node):
        order = np.arange(x.shape[-1]).reshape(-1, size * size).T.reshape(-1)
        x = emit.compute("GATHER", [x, emit.ints("order", order)], x.shape, signature=x.signature, axis=3)
    emit.operator("DEPTH_TO_SPACE", [x], emit.output(), block_size=size)


def convert_space_to_depth(emit: Emit) -> None:
    """Writes a SpaceToDepth; in mode CRD its channels are put in that order after."""
    node, x, y, size = emit.node, emit.input(), emit.output(), int(emit.node.attribute("blocksize"))
    if not _channel_first(node):
        emit.operator("SPACE_TO_DEPTH", [x], y, block_size=size)
        return
    blocks = emit.compute("SPACE_TO_DEPTH", [x], y.shape, signature=y.signature, block_size=size)
    order = np.arange(y.shape[-1]).reshape(size * size, -1).T.reshape(-1)
    emit.operator("GATHER", [blocks, emit.ints("order", order)], y, axis=3)


def convert_trilu(emit: Emit) -> None:
    """Writes a Trilu: zero outside a triangle."""
    node, x, y = emit.node, emit.input(), emit.output()
    offset = (node.ints("k", 1) or [0])[0]
    rows, columns = x.shape[-2:]
    if -1 in x.signature[-2:]:
        raise Unsupported("cuts a triangle out of a dynamic shape", f"{list(x.signature)}", "a static batch")
    below = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    inside = below >= offset if node.attribute("upper", 1) else below <= offset
    zero = emit.real("zero", 0, x) if x.quant else emit.constant("zero", np.zeros((), x.dtype))
    mask = emit.constant("triangle", inside)
    if x.rank <= WIDEST_SELECT:
        emit.operator("SELECT_V2", [mask, x, zero], y)
        return
    count = node.x.size // (rows * columns)
    shape, signature = (count, rows, columns), (-1 if x.is_dynamic else count, rows, columns)
    flat = emit.writer.reshape(x, shape, signature)
    cut = emit.compute("SELECT_V2", [mask, flat, zero], into=emit.temporary(shape, y, "cut", signature=signature))
    emit.writer.reshape(cut, y.shape, y.signature, y)


def expand_eye_like(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """A constant."""
    rows, columns = node.x.shape
    kind = node.attribute("dtype")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else node.x.dtype
    return [constant(node.outputs[0].name, np.eye(rows, columns, int(node.attribute("k", 0)), dtype))]


def expand_center_crop_pad(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """Slice where the axis is too long, Pad where it is too short."""
    sizes = node.ints("shape", 1)
    if sizes is None:
        raise Unsupported("needs a shape", "it is left out", "a constant")
    axes = [axis + node.x.rank if axis < 0 else axis for axis in node.attribute("axes") or range(node.x.rank)]
    y = node.x
    cut = [(a, (y.shape[a] - s) // 2, s) for a, s in zip(axes, sizes, strict=True) if y.shape[a] > s]
    if cut:
        places, starts, lengths = (np.array(column, np.int64) for column in zip(*cut, strict=True))
        y = scope.op("Slice", y, starts, starts + lengths, places)
    pads = _centered(y, axes, sizes)
    return [scope.op("Pad", y, pads) if pads.any() else y]


def _centered(x: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Array:
    """The pads that bring `x` to `sizes`, the smaller half in front."""
    pads = np.zeros((2, x.rank), np.int64)
    for axis, size in zip(axes, sizes, strict=True):
        missing = max(size - x.shape[axis], 0)
        pads[:, axis] = missing // 2, missing - missing // 2
    return pads.reshape(-1)


_BLOCKS = (of_types("float32", "uint8", "int8", "int32", "int64"),)

_BYTES = replace(MOVES, wide=None)

OPS = (
    Op("DepthToSpace", convert_depth_to_space, CHANNELS_LAST, _BYTES, _BLOCKS),
    Op("SpaceToDepth", convert_space_to_depth, CHANNELS_LAST, _BYTES, _BLOCKS),
    Op("Trilu", convert_trilu, NATURAL, MOVES),
)
EXPANSIONS = (
    Expansion("CenterCropPad", expand_center_crop_pad, 18),
    Expansion("EyeLike", expand_eye_like, 9),
)
