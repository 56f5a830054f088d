"""Operators that pick elements by their positions, computed or constant.

Positions count from the front in TFLite; ONNX also takes negative ones: constants are counted anew at conversion,
computed ones go through FLOOR_MOD. An element of a tensor of strides s has the linear position `sum_i index_i * s_i`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported
from edgeship.targets.tflite.layout_plan import LayoutRule
from edgeship.targets.tflite.layout_rules import ALONG_AXES, NATURAL, ByNode, Drops
from edgeship.targets.tflite.op import MOVES, Op
from edgeship.targets.tflite.ops.steps import Steps

CARRIED = ("float32", "uint8", "int8", "int16", "int32", "int64", "bool")
"""Types that GATHER and its kin move."""
WIDEST_MODULO = 4
"""Axes over which FLOOR_MOD broadcasts; TensorFlow's ends the process beyond them."""
NUMBERS = ("float32", "int32", "int64")


def from_front(emit: Emit, index: int, sizes: Sequence[int]) -> Operand | Array:
    """Positions (input `index`) counted from the front: an array where they are constant. `sizes` broadcast with
    them.
    """
    tensor = emit.node.tensor(index)
    size = np.asarray(sizes)
    if tensor.data is not None:
        return np.where(tensor.data < 0, tensor.data + size, tensor.data).astype(np.int32)
    places = emit.input(index)
    if tensor.is_position:
        return places
    wrapped = emit.constant("sizes", size.astype(places.dtype))
    if places.rank <= WIDEST_MODULO or places.is_dynamic:
        return emit.compute("FLOOR_MOD", [places, wrapped], places.shape, signature=places.signature)
    rows = (tensor.size // places.shape[-1], places.shape[-1])
    found = emit.compute("FLOOR_MOD", [emit.writer.reshape(places, rows, rows), wrapped], rows)
    return emit.writer.reshape(found, places.shape, places.shape)


def positions(emit: Emit, index: int, sizes: Sequence[int]) -> Operand:
    """`from_front` as an operand."""
    found = from_front(emit, index, sizes)
    return found if isinstance(found, Operand) else emit.constant("indices", found)


def strides(shape: Sequence[int]) -> list[int]:
    """How many elements lie between neighbours along each axis."""
    return [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]


def static(emit: Emit, *operands: Operand) -> None:
    """Raises Unsupported when one of the operands has a dynamic dimension."""
    for operand in operands:
        if operand.is_dynamic:
            seen = f"{operand.name}: {list(operand.signature)}"
            raise Unsupported("counts positions in a tensor of dynamic shape", seen, "a static batch")


def along_axis(emit: Emit, index: int, shape: Sequence[int], axis: int) -> Operand:
    """The linear positions in a tensor of `shape` that input `index` means, of its own shape: its elements count
    along `axis`, their own places along the others.
    """
    tensor, steps = emit.node.tensor(index), strides(shape)
    grid = np.indices(tensor.shape, dtype=np.int64, sparse=True)
    others = [grid[a] * steps[a] for a in range(len(shape)) if a != axis]
    rest = np.broadcast_to(sum(others, np.zeros((1,) * len(shape), np.int64)), tensor.shape)
    found = from_front(emit, index, (shape[axis],))
    if not isinstance(found, Operand):
        return emit.constant("positions", (found.astype(np.int64) * steps[axis] + rest).astype(np.int32))
    if steps[axis] != 1:
        found = emit.compute("MUL", [found, emit.constant("stride", np.array(steps[axis], found.dtype))])
    return emit.compute("ADD", [found, emit.constant("rest", rest.astype(found.dtype))])


def convert_gather(emit: Emit) -> None:
    """Writes a Gather; with `batch_dims`, which ONNX has not, of each batch's own positions."""
    node, x = emit.node, emit.input()
    axis, batches = node.axis(0), int(node.attribute("batch_dims", 0))
    if node.x.signature[axis] == -1:
        raise Unsupported("picks along a dynamic dimension", f"axis {axis}", "a static batch")
    places = positions(emit, 1, np.asarray(node.x.shape[axis]))  # type: ignore[arg-type]  # a scalar broadcasts too
    emit.operator("GATHER", [x, places], emit.output(), axis=emit.layout.axis(axis), batch_dims=batches)


def _gather_layout(node: Node) -> LayoutRule:
    rank = node.tensor(1).rank
    if node.attribute("batch_dims", 0):
        return NATURAL
    return GATHERS_ONE if rank == 0 else ALONG_AXES if rank == 1 else NATURAL


def convert_gather_elements(emit: Emit) -> None:
    """Writes a GatherElements: GATHER by batches along a last axis, to which a tensor of dynamic shape is turned; else
    one by linear positions.
    """
    node, x, y = emit.node, emit.input(), emit.output()
    axis, rank = node.axis(0), node.x.rank
    others = [[size for place, size in enumerate(t.shape) if place != axis] for t in (node.x, node.tensor(1))]
    if others[0] == others[1] and (axis == rank - 1 or x.is_dynamic):
        places = positions(emit, 1, (x.shape[axis],))
        if axis == rank - 1:
            emit.operator("GATHER", [x, places], y, axis=axis, batch_dims=axis)
            return
        steps, order = Steps(emit), [*(place for place in range(rank) if place != axis), axis]
        turned = steps.gather(steps.transpose(x, order), steps.transpose(places, order), rank - 1, batch_dims=rank - 1)
        steps.transpose(turned, [order.index(place) for place in range(rank)], into=y)
        return
    static(emit, x, y)
    flat = emit.writer.reshape(x, (node.x.size,), (node.x.size,))
    emit.operator("GATHER", [flat, along_axis(emit, 1, node.x.shape, axis)], y, axis=0)


def convert_gather_nd(emit: Emit) -> None:
    """Writes a GatherND; batch axes become positions of their own."""
    node, x, y = emit.node, emit.input(), emit.output()
    batch, width = int(node.attribute("batch_dims", 0)), node.tensor(1).shape[-1]
    found = from_front(emit, 1, x.shape[batch : batch + width])
    if batch:
        static(emit, x, y)
        shape = node.tensor(1).shape
        grid = np.indices(shape[:-1], dtype=np.int64)[:batch]
        rows = np.moveaxis(grid, 0, -1)
        if isinstance(found, Operand):
            operands = [emit.constant("batches", rows.astype(found.dtype)), found]
            found = emit.compute("CONCATENATION", operands, (*shape[:-1], batch + width), axis=len(shape) - 1)
        else:
            found = np.concatenate([rows.astype(np.int32), found], axis=-1)
    places = found if isinstance(found, Operand) else emit.constant("indices", found)
    emit.operator("GATHER_ND", [x, places], y)


def convert_one_hot(emit: Emit) -> None:
    """Writes a OneHot; negative positions count from the end, others out of range are off everywhere."""
    node, y = emit.node, emit.output()
    depth, values = node.ints("depth", 1), node.tensor(2)
    if not depth:
        raise Unsupported("needs a depth", "it is left out", "a constant")
    places = emit.input(0)
    if places.dtype not in (np.dtype(np.int32), np.dtype(np.int64)):
        places = emit.compute("CAST", [places], dtype=np.int32)
    zero, size = (emit.constant(name, np.array(n, places.dtype)) for name, n in (("zero", 0), ("depth", depth[0])))
    negative = emit.compute("LESS", [places, zero], dtype=np.bool_)
    counted = emit.compute("ADD", [places, size])
    places = emit.compute("SELECT_V2", [negative, counted, places], dtype=places.dtype)
    off, on = _on_and_off(emit, values)
    axis = int(node.attribute("axis", -1))
    axis = axis + y.rank if axis < 0 else axis
    emit.operator(
        "ONE_HOT", [places, emit.ints("depth", depth[0]), on, off], y, axis=-1 if axis == y.rank - 1 else axis
    )


def _on_and_off(emit: Emit, values: Tensor) -> tuple[Operand, Operand]:
    """The two values as scalars: off, on."""
    if values.data is not None:
        off, on = values.data.reshape(-1)
        return emit.constant("off", np.asarray(off)), emit.constant("on", np.asarray(on))
    pair = emit.input(2)
    off, on = (emit.compute("GATHER", [pair, emit.ints("one", place)], (), axis=0) for place in (0, 1))
    return off, on


def convert_reverse_sequence(emit: Emit) -> None:
    """Writes a ReverseSequence."""
    node = emit.node
    batch, time = (int(node.attribute(name, default)) for name, default in (("batch_axis", 1), ("time_axis", 0)))
    options = {"seq_dim": emit.layout.axis(time), "batch_dim": emit.layout.axis(batch)}
    emit.operator("REVERSE_SEQUENCE", [emit.input(0), emit.input(1)], emit.output(), **options)


def convert_nonzero(emit: Emit) -> None:
    """Writes a NonZero."""
    x, y = emit.input(), emit.output()
    if x.dtype != np.bool_:
        x = emit.compute("NOT_EQUAL", [x, emit.constant("zero", np.zeros((), x.dtype))], dtype=np.bool_)
    rows = emit.compute("WHERE", [x], (y.shape[1], y.shape[0]), dtype=np.int64)
    emit.operator("TRANSPOSE", [rows, emit.ints("permutation", [1, 0])], y)


def convert_compress(emit: Emit) -> None:
    """Writes a Compress: the positions of what is true, gathered."""
    node, x, y = emit.node, emit.input(), emit.output()
    given = node.attribute("axis")
    axis = node.axis(0) if given is not None else 0
    if given is None:
        static(emit, x)
        x = emit.writer.reshape(x, (node.x.size,), (node.x.size,))
    count = y.shape[axis]
    rows = emit.compute("WHERE", [emit.input(1)], (count, 1), dtype=np.int64)
    places = emit.compute("SQUEEZE", [rows], (count,), squeeze_dims=[1])
    emit.operator("GATHER", [x, places], y, axis=axis)


def convert_range(emit: Emit) -> None:
    """Writes a Range."""
    emit.operator("RANGE", [emit.input(index) for index in range(3)], emit.output())


def convert_constant_of_shape(emit: Emit) -> None:
    """Writes a ConstantOfShape whose shape is computed."""
    value, y = np.asarray(emit.node.attribute("value", np.zeros(1, np.float32))).reshape(()), emit.output()
    shape = emit.writer.sizes.extent(y.shape, y.signature) if emit.node.x.is_constant else emit.input()
    emit.operator("FILL", [shape, emit.constant("value", value)], y)


GATHERS_ONE = Drops(lambda node: [node.axis(0)], lambda node: [node.axis(0)])
_MOVED = (of_types(*CARRIED),)

OPS = (
    Op("Gather", convert_gather, ByNode(_gather_layout), MOVES, _MOVED),
    Op("GatherElements", convert_gather_elements, NATURAL, MOVES, _MOVED),
    Op("GatherND", convert_gather_nd, NATURAL, MOVES, _MOVED),
    Op("OneHot", convert_one_hot, NATURAL, None, (of_types(*NUMBERS, "uint8", "int8", "bool", variable="T3"),)),
    Op("ReverseSequence", convert_reverse_sequence, ALONG_AXES, None, (of_types(*NUMBERS, "uint8", "int16"),)),
    Op("NonZero", convert_nonzero, NATURAL, None, (of_types(*NUMBERS, "bool"),)),
    Op("Compress", convert_compress, NATURAL, None, _MOVED),
    Op("Range", convert_range, NATURAL, None, (of_types(*NUMBERS),)),
    Op("ConstantOfShape", convert_constant_of_shape, NATURAL),
)
