"""Operators that move values without computing: shapes, slices, pads, joins and splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported
from edgeship.targets.tflite.layout import unmarked
from edgeship.targets.tflite.layout_rules import (
    ALONG_AXES,
    POINTWISE,
    RESHAPES,
    AlongAxes,
    Renames,
)
from edgeship.targets.tflite.op import MOVES, Op

WIDEST_SLICE = 5
"""Axes that SLICE takes."""
WIDEST_PAD = 5
"""Axes that PAD and PADV2 take."""


def convert_reshape(emit: Emit) -> None:
    """Writes nothing for a Reshape, Flatten, Squeeze, Unsqueeze or Transpose: memory stays as it is, and who reads it
    under another shape sees to the RESHAPE.
    """
    emit.alias(emit.in_memory())


def convert_alias(emit: Emit) -> None:
    """Writes nothing: the output is the input."""
    emit.alias(emit.input())


def permutation(node: Node) -> list[int]:
    """The `perm` of a Transpose."""
    return list(node.attribute("perm") or range(node.x.rank)[::-1])


def convert_concat(emit: Emit) -> None:
    """Writes a Concat of the inputs that are not empty."""
    axis = emit.output_layout.axis(emit.node.axis(0, emit.node.y.rank))
    operands = [emit.input(i) for i, t in enumerate(emit.node.inputs) if t is not None and t.size]
    if len(operands) == 1:
        emit.alias(operands[0])
        return
    emit.operator("CONCATENATION", operands, emit.output(), axis=axis)


def convert_slice(emit: Emit) -> None:
    """Writes a Slice: SLICE where every step is 1 or picks from blocks, else STRIDED_SLICE."""
    cuts = {emit.layout.axis(axis): cut for axis, cut in _cuts(emit.node).items()}
    x = emit.input()
    spans = _spans(x, cuts)
    if spans is None:
        _strided(emit, x, cuts)
        return
    blocks = emit.writer.viewed(x, *unmarked(tuple(span.extent for span in spans)))
    shape, size = unmarked(tuple(span.count for span in spans))
    begin = [span.start for span in spans]
    operands = [blocks, emit.ints("begin", begin), emit.ints("size", size)]
    emit.operator("SLICE", operands, emit.output_as(shape, size))


@dataclass(frozen=True)
class _Span:
    """Of the `extent` places along one axis, `count` from `start`."""

    extent: int
    start: int
    count: int


def _spans(x: Operand, cuts: Mapping[int, tuple[int, int, int]]) -> list[_Span] | None:
    """The cuts without steps, on more axes or wider ones; None where there is no such way, or only by single elements.

    An axis of which every s-th place is taken is one of blocks and one of the s places in each; the latter joins the
    axis behind it where that is taken whole: every second row and column of [N, H, W, C] is a part of
    [N, H/2, 2 W/2, 2 C]. XNNPACK copies such parts in runs; it has no STRIDED_SLICE with steps, and TFLite's own
    takes up to 80 times as long.
    """
    spans: list[_Span] = []
    joins = False
    for place, extent in enumerate(x.extents):
        start, count, step = cuts.get(place, (0, extent, 1))
        if step != 1 and (step < 1 or extent % step or not count or place == x.rank - 1):
            return None
        blocks = extent // step
        if joins and count == blocks and x.signature[place] != -1:
            spans[-1] = _Span(spans[-1].extent * blocks, spans[-1].start * blocks, blocks)
        else:
            spans.append(_Span(blocks, start // step, count))
        joins = step != 1
        if joins:
            spans.append(_Span(step, start % step, 1))
    return spans if len(spans) <= max(x.rank, WIDEST_SLICE) else None


def _cuts(node: Node) -> dict[int, tuple[int, int, int]]:
    """Axis -> (start, count, step) with everything counted from the front, as ONNX clamps it."""
    starts, ends = node.ints("starts", 1), node.ints("ends", 2)
    if starts is None or ends is None:
        raise Unsupported("needs starts and ends", "they are left out")
    axes = node.ints("axes", 3) or list(range(len(starts)))
    steps = node.ints("steps", 4) or [1] * len(starts)
    cuts = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis + node.x.rank if axis < 0 else axis
        if node.x.signature[place] == -1:
            if (start, step) == (0, 1) and end >= 2**31 - 1:
                continue
            raise Unsupported("slices a dynamic dimension", f"axis {place}", "a static batch")
        chosen = range(node.x.shape[place])[start:end:step]
        cuts[place] = (chosen.start, len(chosen), step)
    return cuts


def _strided(emit: Emit, x: Operand, cuts: dict[int, tuple[int, int, int]]) -> None:
    begin, end, strides, end_mask = [0] * x.rank, [0] * x.rank, [1] * x.rank, 0
    for place in range(x.rank):
        if place in cuts:
            start, count, step = cuts[place]
            begin[place], end[place], strides[place] = start, start + count * step, step
        if place not in cuts or end[place] < 0:
            end_mask |= 1 << place  # to the very end, whatever `end` says
    operands = [x, emit.ints("begin", begin), emit.ints("end", end), emit.ints("strides", strides)]
    emit.operator("STRIDED_SLICE", operands, emit.output(), end_mask=end_mask)


def convert_pad(emit: Emit) -> None:
    """Writes a Pad: PAD, PADV2, MIRROR_PAD, or a GATHER per axis for edge and wrap; negative pads cut first."""
    node, x, y = emit.node, emit.input(), emit.output()
    pads = _pads(node)
    mode = node.attribute("mode", "constant")
    widths = [pads[axis] for axis in emit.layout.perm]
    if any(front < 0 or behind < 0 for front, behind in widths):
        x, widths = _cropped(emit, x, widths)
    if mode == "constant":
        _constant_pad(emit, x, widths, y)
    elif mode == "reflect":
        emit.operator("MIRROR_PAD", [x, emit.ints("paddings", widths)], y, mode="REFLECT")
    else:
        _gathered_pad(emit, x, widths, mode, y)


def _pads(node: Node) -> list[tuple[int, int]]:
    """(front, behind) for every ONNX axis."""
    flat = node.ints("pads", 1)
    if flat is None:
        raise Unsupported("needs pads", "they are left out")
    axes = node.ints("axes", 3) or list(range(node.x.rank))
    pads = [(0, 0)] * node.x.rank
    for place, axis in enumerate(axes):
        pads[axis] = (flat[place], flat[place + len(axes)])
    if any(pads[axis] != (0, 0) and size == -1 for axis, size in enumerate(node.x.signature)):
        raise Unsupported("pads a dynamic dimension", f"pads {flat}", "a static batch")
    return pads


def _cropped(emit: Emit, x: Operand, widths: list[tuple[int, int]]) -> tuple[Operand, list[tuple[int, int]]]:
    begin = [max(-front, 0) for front, _ in widths]
    size = [n - max(-front, 0) - max(-behind, 0) for n, (front, behind) in zip(x.shape, widths, strict=True)]
    cut = emit.temporary(size, x, "cut")
    extent = [s if d != -1 else -1 for s, d in zip(size, x.signature, strict=True)]
    emit.operator("SLICE", [x, emit.ints("begin", begin), emit.ints("size", extent)], cut)
    return cut, [(max(front, 0), max(behind, 0)) for front, behind in widths]


def _constant_pad(emit: Emit, x: Operand, widths: Sequence[tuple[int, int]], y: Operand) -> None:
    fill = _fill(emit, x)
    if x.rank <= WIDEST_PAD:
        _padded(emit, x, widths, fill, y)
        return
    groups = _merged(widths)
    while len(groups) > WIDEST_PAD:  # the axes at the end first; those before them wait as one
        waiting = len(groups) - WIDEST_PAD + 1
        axes = [place for group in groups[waiting:] for place in group]
        now = [pads if place in axes else (0, 0) for place, pads in enumerate(widths)]
        x = _padded_merged(emit, x, now, fill)
        widths = [(0, 0) if place in axes else pads for place, pads in enumerate(widths)]
        groups = _merged(widths)
    emit.writer.reshape(_padded_merged(emit, x, widths, fill), y.shape, y.signature, y)


def _fill(emit: Emit, x: Operand) -> Operand | None:
    """What a Pad fills in; None for zero."""
    node = emit.node
    if node.has(2) and not node.tensor(2).is_constant:
        return emit.writer.reshape(emit.input(2), (), ())
    given = node.parameter("value", 2)
    value = given.reshape(-1)[0] if given is not None and given.size else 0
    if value == 0:
        return None
    return emit.real("value", value, x) if x.quant else emit.constant("value", np.array(value, x.dtype))


def _padded(emit: Emit, x: Operand, widths: Sequence[tuple[int, int]], fill: Operand | None, y: Operand) -> None:
    operands = [x, emit.ints("paddings", widths), *([] if fill is None else [fill])]
    emit.operator("PAD" if fill is None else "PADV2", operands, y)


def _merged(widths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The axes in groups, neighbours that are not padded together."""
    groups: list[list[int]] = []
    for place, pads in enumerate(widths):
        if groups and pads == (0, 0) == widths[place - 1]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _padded_merged(emit: Emit, x: Operand, widths: Sequence[tuple[int, int]], fill: Operand | None) -> Operand:
    """`x` padded, its axes that are not padded merged meanwhile."""
    groups = _merged(widths)
    whole = [prod(x.extents[place] for place in group) for group in groups]
    pads = [widths[group[0]] for group in groups]
    shape, signature = unmarked(tuple(whole))
    narrow = emit.writer.reshape(x, shape, signature)
    sizes = tuple(size + sum(pad) for size, pad in zip(shape, pads, strict=True))
    known = tuple(-1 if d == -1 else size for size, d in zip(sizes, signature, strict=True))
    target = emit.temporary(sizes, x, "padded", signature=known)
    _padded(emit, narrow, pads, fill, target)
    after = tuple(size + sum(pad) for size, pad in zip(x.shape, widths, strict=True))
    return emit.writer.reshape(
        target, after, tuple(-1 if d == -1 else size for size, d in zip(after, x.signature, strict=True))
    )


def _gathered_pad(emit: Emit, x: Operand, widths: Sequence[tuple[int, int]], mode: str, y: Operand) -> None:
    places = [place for place, pads in enumerate(widths) if pads != (0, 0)]
    if not places:
        emit.writer.reshape(x, y.shape, y.signature, y)
    for place in places:
        size, (front, behind) = x.shape[place], widths[place]
        indices = np.arange(-front, size + behind)
        indices = np.clip(indices, 0, size - 1) if mode == "edge" else indices % size
        shape = [len(indices) if i == place else s for i, s in enumerate(x.shape)]
        target = y if place == places[-1] else emit.temporary(shape, x, "padded")
        emit.operator("GATHER", [x, emit.ints("indices", indices)], target, axis=place)
        x = target


def stored_fill(node: Node) -> str | None:
    """A number that is filled in is one that the output's integers have."""
    quant = node.y.quant or node.x.quant
    if quant is None or node.y.quant or node.attribute("mode", "constant") != "constant" or not node.has(2):
        return None
    fill = node.parameter("value", 2)
    if fill is None or not fill.size or np.array_equal(quant.dequantize(quant.quantize(fill)), fill):
        return None
    return f"it fills in {float(fill.reshape(-1)[0]):.6g}, which is none of the input's integers"


def short_reflection(node: Node) -> str | None:
    """A reflection is shorter than the axis it mirrors."""
    if node.attribute("mode", "constant") != "reflect":
        return None
    long = [axis for axis, pads in enumerate(_pads(node)) if max(pads) >= node.x.shape[axis] and max(pads) > 0]
    return f"it reflects more than axis {long[0]} holds ({node.x.shape[long[0]]})" if long else None


def convert_split(emit: Emit) -> None:
    """Writes a Split into parts: SPLIT where they are equal, else SPLIT_V."""
    node, x = emit.node, emit.input()
    axis = node.axis(0)
    place, outputs = emit.layout.axis(axis), [emit.output(i) for i in range(len(node.outputs))]
    sizes = [tensor.shape[axis] for tensor in node.outputs]
    if len(sizes) == 1:
        emit.writer.reshape(x, outputs[0].shape, outputs[0].signature, outputs[0])
    elif len(set(sizes)) == 1:
        emit.operator("SPLIT", [emit.ints("axis", place), x], outputs, num_splits=len(sizes))
    else:
        emit.operator(
            "SPLIT_V", [x, emit.ints("sizes", sizes), emit.ints("axis", place)], outputs, num_splits=len(sizes)
        )


def convert_expand(emit: Emit) -> None:
    """Writes an Expand."""
    x, y = emit.broadcast(0), emit.output()
    emit.operator("BROADCAST_TO", [x, emit.writer.sizes.extent(y.shape, y.signature)], y)


def convert_tile(emit: Emit) -> None:
    """Writes a Tile."""
    repeats, x, y = emit.node.ints("repeats", 1) or [], emit.input(), emit.output()
    counts = [repeats[axis] for axis in emit.layout.perm]
    grows = zip(counts, x.signature, y.signature, strict=True)
    known = [-1 if after == -1 != before else count for count, before, after in grows]
    emit.operator("TILE", [x, emit.writer.sizes.extent(counts, known)], y)


def _joined_axis(node: Node) -> list[int]:
    return [node.axis(0, node.y.rank)]


def _split_axis(node: Node) -> list[int]:
    return [node.axis(0)]


SPLIT_TYPES = of_types("float32", "int8", "uint8", "int16", "int32", "int64")
OPS = (
    *(Op(name, convert_reshape, RESHAPES, MOVES) for name in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")),
    Op("Transpose", convert_reshape, Renames(permutation), MOVES),
    Op("Identity", convert_alias, POINTWISE, MOVES),
    Op("Concat", convert_concat, AlongAxes(None, _joined_axis), MOVES),
    Op("Slice", convert_slice, ALONG_AXES, MOVES),
    Op(
        "Pad",
        convert_pad,
        ALONG_AXES,
        replace(MOVES, real_inputs=frozenset({2}), limits=(stored_fill,)),
        (short_reflection,),
    ),
    Op("Split", convert_split, AlongAxes(1, _split_axis), MOVES, (SPLIT_TYPES,)),
    Op("Expand", convert_expand, POINTWISE, MOVES),
    Op("Tile", convert_tile, ALONG_AXES, MOVES),
)
