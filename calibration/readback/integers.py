"""Operators that carry integers, carrying the real numbers behind them instead.

    Q -> Reshape -> DQ   becomes   Q -> DQ -> Reshape -> Q -> DQ

An integer survives DequantizeLinear and QuantizeLinear of the same parameters, and operators that move, select or
compare values do the same to both, so that no integer changes. What the integers mean is known from the QuantizeLinear
that made them, or, of a model's integer inputs, from the DequantizeLinear that reads them in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.readback.rewrite import DATA_TYPES, Affine, Rewriter, dtype_of, known, place


@dataclass(frozen=True)
class Carrier:
    """Which inputs and outputs hold the integers that the operator carries; None: all of them."""

    inputs: tuple[int, ...] | None = (0,)
    outputs: tuple[int, ...] | None = (0,)
    filled: int | None = None
    """The input that says what fills new places, an integer 0 where it is left out."""


_MOVING = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "GatherND", "Identity", "MaxPool", "Reshape", "Resize", "Slice",
    "SpaceToDepth", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
)  # fmt: skip
CARRIERS: Mapping[str, Carrier] = {
    **dict.fromkeys(_MOVING, Carrier()),
    "ArgMax": Carrier(outputs=()),
    "ArgMin": Carrier(outputs=()),
    "Clip": Carrier((0, 1, 2)),
    "Concat": Carrier(None),
    "Max": Carrier(None),
    "Min": Carrier(None),
    "Pad": Carrier((0, 2), filled=2),
    "Split": Carrier(outputs=None),
    "Where": Carrier((1, 2)),
}


def carry_real_numbers(graph: ir.Graph) -> None:
    """Rewrites, in place, the operators that carry integers of known meaning."""
    meanings: dict[ir.Value, Affine] = {}
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            scale, zero = place(node, 1), place(node, 2)
            array = known(scale)
            if scale is not None and array is not None and array.size == 1:
                meanings[node.outputs[0]] = Affine(scale, zero)
        elif node.op_type in CARRIERS and not node.domain:
            _carry(node, CARRIERS[node.op_type], meanings)


def _carry(node: ir.Node, carrier: Carrier, meanings: dict[ir.Value, Affine]) -> None:
    places = range(len(node.inputs)) if carrier.inputs is None else carrier.inputs
    carried = {at: value for at in places if (value := place(node, at)) is not None}
    computed = [value for value in carried.values() if known(value) is None]
    if not computed:
        return
    meaning = next((meanings[value] for value in computed if value in meanings), None)
    meaning = meaning or next((told for value in computed if (told := _told(node, carrier, value))), None)
    if meaning is None or any(not _same(meanings.get(value, meaning), meaning) for value in computed):
        return
    if _keeps_all(node, carried) and not node.outputs[0].is_graph_output() and node.graph is not None:
        node.outputs[0].replace_all_uses_with(carried[0])
        node.graph.remove(node, safe=True)
        return
    rewriter = Rewriter(node)
    inputs: list[ir.Value | None] = list(node.inputs)
    if carrier.filled is not None and place(node, carrier.filled) is None:
        inputs += [None] * (carrier.filled + 1 - len(inputs))
        kind = (dtype_of(meaning.zero_point) or ir.DataType.UINT8).numpy()
        carried[carrier.filled] = rewriter.constant("fill", np.zeros((), kind))
    for at, value in carried.items():
        inputs[at] = rewriter.real(value, meaning)
    made = rewriter.write(node.op_type, inputs, node.attributes.values(), len(node.outputs))
    returned = range(len(made)) if carrier.outputs is None else carrier.outputs
    for at in returned:
        made[at] = rewriter.integers(made[at], meaning)
        meanings[made[at]] = meaning
    rewriter.finish(made)


def _keeps_all(node: ir.Node, carried: Mapping[int, ir.Value]) -> bool:
    """Whether a Clip has the bounds that its type has anyway."""
    if node.op_type != "Clip":
        return False
    low, high = (known(carried.get(at)) for at in (1, 2))
    kind = next((array.dtype for array in (low, high) if array is not None), None)
    if kind is None or kind.kind not in "iu":
        return False
    limits = np.iinfo(kind)
    return (low is None or low.item() <= limits.min) and (high is None or high.item() >= limits.max)


def _told(node: ir.Node, carrier: Carrier, value: ir.Value) -> Affine | None:
    """What an integer input of the model means to the DequantizeLinear that reads it in the end."""
    if value.producer() is not None or value.dtype not in DATA_TYPES:
        return None
    outputs = node.outputs if carrier.outputs is None else [node.outputs[at] for at in carrier.outputs]
    waiting, seen = list(outputs), set(outputs)
    while waiting:
        for reader, at in waiting.pop().uses():
            if reader.op_type == "DequantizeLinear" and at == 0:
                scale, zero = place(reader, 1), place(reader, 2)
                array = known(scale)
                return Affine(scale, zero) if scale is not None and array is not None and array.size == 1 else None
            if reader.op_type in CARRIERS:
                new = [output for output in reader.outputs if output not in seen]
                seen.update(new)
                waiting += new
    return None


def _same(a: Affine, b: Affine) -> bool:
    """Whether both mean the same."""
    pairs = ((known(a.scale), known(b.scale)), (_point(a), _point(b)))
    return all(x is not None and y is not None and np.array_equal(x.reshape(-1), y.reshape(-1)) for x, y in pairs)


def _point(meaning: Affine) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    if meaning.zero_point is None:
        return np.zeros(1, np.int64)
    array = known(meaning.zero_point)
    return None if array is None else array.astype(np.int64)
