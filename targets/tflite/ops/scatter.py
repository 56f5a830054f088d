"""Operators that write elements at positions: SCATTER_ND, and UNSORTED_SEGMENT_PROD, _MAX, _MIN for reductions.

none: y = where(written, scattered, x)     add: y = x + scattered (SCATTER_ND adds up what meets)
mul, max, min: y = x op (the updates of each position reduced by op; the operator's neutral element elsewhere)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.index import along_axis, from_front, static, strides

SEGMENTS = {
    "mul": ("MUL", "UNSORTED_SEGMENT_PROD"),
    "max": ("MAXIMUM", "UNSORTED_SEGMENT_MAX"),
    "min": ("MINIMUM", "UNSORTED_SEGMENT_MIN"),
}
SEGMENT_TYPES = ("float32", "int32")


def reduction_types(node: Node) -> str | None:
    """Reductions mul, max and min work on float32 and int32."""
    how = node.attribute("reduction", "none")
    if how in SEGMENTS and node.x.dtype.name not in SEGMENT_TYPES:
        return f"reduction {how} of {node.x.dtype}; accepted: {', '.join(SEGMENT_TYPES)}"
    return None


def _as_int32(emit: Emit, places: Operand) -> Operand:
    return places if places.dtype == np.int32 else emit.compute("CAST", [places], dtype=np.int32)


def scatter(emit: Emit, x: Operand, places: Operand, updates: Operand, into: Operand) -> None:
    """Writes `x` with `updates` at `places` (the last axis: indices from the front), as attribute `reduction` says."""
    how = emit.node.attribute("reduction", "none")
    shape = emit.ints("shape", x.shape)
    if how in SEGMENTS:
        _reduced(emit, x, places, updates, into)
        return
    scattered = emit.compute("SCATTER_ND", [places, updates, shape], x.shape, dtype=updates.dtype)
    if how == "add":
        emit.compute("ADD", [x, scattered], into=into)
        return
    if how != "none":
        raise Unsupported("this reduction is not known", how, "none, add, mul, max, min")
    marks = emit.constant("ones", np.ones(updates.shape, np.int32))
    count = emit.compute("SCATTER_ND", [places, marks, shape], x.shape, dtype=np.int32)
    written = emit.compute("GREATER", [count, emit.constant("zero", np.zeros((), np.int32))], dtype=np.bool_)
    emit.compute("SELECT_V2", [written, scattered, x], into=into)


def _reduced(emit: Emit, x: Operand, places: Operand, updates: Operand, into: Operand) -> None:
    """The updates that meet at a position are reduced first, whole slices by the number of the slice."""
    width = places.shape[-1]
    slices, rest = int(np.prod(x.shape[:width])), x.shape[width:]
    count = int(np.prod(places.shape[:-1]))
    numbers = places
    if width > 1:
        steps = emit.constant("strides", np.array(strides(x.shape[:width]), np.int32))
        scaled = emit.compute("MUL", [places, steps])
        numbers = emit.compute("SUM", [scaled, emit.ints("axis", [places.rank - 1])], places.shape[:-1])
    numbers = emit.writer.reshape(numbers, (count,), (count,))
    rows = emit.writer.reshape(updates, (count, *rest), (count, *rest))
    combine, segment = SEGMENTS[emit.node.attribute("reduction")]
    reduced = emit.compute(segment, [rows, numbers, emit.ints("segments", slices)], (slices, *rest))
    emit.compute(combine, [x, emit.writer.reshape(reduced, x.shape, x.shape)], into=into)


def convert_scatter_nd(emit: Emit) -> None:
    """Writes a ScatterND."""
    x, updates = emit.input(0), emit.input(2)
    static(emit, x, updates)
    found = from_front(emit, 1, x.shape[: emit.node.tensor(1).shape[-1]])
    places = _as_int32(emit, found) if isinstance(found, Operand) else emit.constant("indices", found)
    scatter(emit, x, places, updates, emit.output())


def convert_scatter_elements(emit: Emit) -> None:
    """Writes a ScatterElements over the flattened tensor, by linear positions."""
    node, x, updates, y = emit.node, emit.input(0), emit.input(2), emit.output()
    static(emit, x, updates)
    places = _as_int32(emit, along_axis(emit, 1, x.shape, node.axis(0)))
    count = int(np.prod(updates.shape))
    places = emit.writer.reshape(places, (count, 1), (count, 1))
    rows = emit.writer.reshape(updates, (count,), (count,))
    flat = emit.writer.reshape(x, (node.x.size,), (node.x.size,))
    result = emit.temporary(flat.shape, y, "flat")
    scatter(emit, flat, places, rows, result)
    emit.writer.reshape(result, y.shape, y.signature, y)


def expand_scatter(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """ScatterElements, its newer name."""
    return [scope.op("ScatterElements", *node.inputs, axis=node.attribute("axis", 0))]


def expand_tensor_scatter(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """ScatterND at the positions `write_indices[batch] + i` along the axis, modulo its size when circular."""
    past, update = node.x, node.tensor(1)
    axis = node.axis(-2)
    grid = np.indices(update.shape, dtype=np.int64)
    place: Tensor | np.ndarray = grid[axis]
    if node.has(2):
        first = scope.op("Reshape", node.tensor(2), np.array([-1] + [1] * (update.rank - 1), np.int64))
        place = scope.op("Add", first, grid[axis])
    if node.attribute("mode", "linear") == "circular":
        place = scope.op("Mod", place, np.array(past.shape[axis], np.int64))
    parts = [place if a == axis else grid[a] for a in range(update.rank)]
    rows = [scope.op("Unsqueeze", part, np.array([-1], np.int64)) for part in parts]
    return [scope.op("ScatterND", past, scope.op("Concat", *rows, axis=-1), update)]


_TYPES = (of_types("float32", "int8", "uint8", "int32", "int64"), reduction_types)
OPS = (
    Op("ScatterND", convert_scatter_nd, limits=_TYPES, since=11),
    Op("ScatterElements", convert_scatter_elements, limits=_TYPES, since=11),
)
EXPANSIONS = (Expansion("Scatter", expand_scatter), Expansion("TensorScatter", expand_tensor_scatter, 24))
