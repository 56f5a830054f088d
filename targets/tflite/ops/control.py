"""Control flow, resolved while the model is read: branches chosen or selected from, loops unrolled.

Where the trip count and the condition of a loop are known at conversion, each pass writes the body once, with what
depends on the pass number alone folded away; other loops become WHILE (`loop.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported
from edgeship.targets.tflite.ops.loop import FOREVER, goes_on, keep_loop

MOST_PASSES = 1024
_AXES0 = np.array([0], np.int64)


def expand_if(scope: Scope, node: Node) -> list[Tensor]:
    """The branch that a constant condition chooses; both, and a selection, where the condition is computed."""
    branches: list[ir.Graph] = [node.attribute("then_branch"), node.attribute("else_branch")]
    if node.x.data is not None:
        return scope.body(branches[0 if node.x.data.reshape(()) else 1], [])
    yes, no = (scope.body(branch, []) for branch in branches)
    for a, b in zip(yes, no, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            seen = f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
            raise Unsupported("branches under a computed condition give one type and shape", seen)
    condition = scope.op("Reshape", node.x, np.zeros(0, np.int64)) if node.x.rank else node.x
    return [a if a is b else scope.op("Where", condition, a, b) for a, b in zip(yes, no, strict=True)]


def expand_loop(scope: Scope, node: Node) -> list[Tensor]:
    """Every pass after the other where their number is known at conversion, and small; else a WHILE."""
    body: ir.Graph = node.attribute("body")
    if any(node.has(place) and node.tensor(place).data is None for place in (0, 1)):
        return keep_loop(scope, node)
    trips, going = _known(node, 0, FOREVER), _known(node, 1, 1)
    carried = [node.tensor(place) for place in range(2, len(node.inputs))]
    rows: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    if trips > MOST_PASSES and goes_on(body):
        if trips == FOREVER:
            raise Unsupported("never ends", "a loop without a trip count or a condition", "one of both")
        return keep_loop(scope, node)
    step = 0
    while going and step < trips:
        if step == MOST_PASSES:
            return keep_loop(scope, node)
        pass_number = Tensor(f"{scope.prefix}/pass", (), np.dtype(np.int64), data=np.array(step, np.int64))
        condition = Tensor(f"{scope.prefix}/condition", (), np.dtype(np.bool_), data=np.array(True))
        verdict, *values = scope.body(body, [pass_number, condition, *carried])
        carried, scanned = values[: len(carried)], values[len(carried) :]
        for row, value in zip(rows, scanned, strict=True):
            row.append(value)
        step += 1
        if step < trips and verdict.data is None:
            return keep_loop(scope, node)
        going = bool(verdict.data.reshape(())) if verdict.data is not None else False
    return [*carried, *(_stacked(scope, row, 0, node) for row in rows)]


def _known(node: Node, place: int, default: int) -> int:
    return int(node.tensor(place).values().reshape(())) if node.has(place) else default


def _stacked(scope: Scope, row: Sequence[Tensor], axis: int, node: Node) -> Tensor:
    """The values of all passes along a new axis."""
    if not row:
        raise Unsupported("collects values of no pass", f"{node.op_type} of length 0", "at least one pass")
    axes = np.array([axis], np.int64)
    wide = [scope.op("Unsqueeze", value, axes) for value in row]
    return wide[0] if len(wide) == 1 else scope.op("Concat", *wide, axis=axis)


def expand_scan(scope: Scope, node: Node) -> list[Tensor]:
    """Every pass after the other; the sequence length is static."""
    body: ir.Graph = node.attribute("body")
    if node.opset < 9:
        return _batched_scan(scope, node, body)
    count = int(node.attribute("num_scan_inputs"))
    states = [node.tensor(place) for place in range(len(node.inputs) - count)]
    sequences = [node.tensor(place) for place in range(len(states), len(node.inputs))]
    outputs = len(body.outputs) - len(states)
    axes = [a + t.rank if a < 0 else a for a, t in zip(_ints(node, "scan_input_axes", count), sequences, strict=True)]
    backwards = _ints(node, "scan_input_directions", count)
    states, rows = _scanned(scope, body, states, sequences, axes, backwards)
    out_axes = _ints(node, "scan_output_axes", outputs)
    out_backwards = _ints(node, "scan_output_directions", outputs)
    collected = [
        _stacked(scope, row[::-1] if back else row, axis + row[0].rank + 1 if axis < 0 else axis, node)
        for row, axis, back in zip(rows, out_axes, out_backwards, strict=True)
    ]
    return [*states, *collected]


def _ints(node: Node, name: str, count: int) -> list[int]:
    return list(node.attribute(name) or [0] * count)


def _scanned(  # noqa: PLR0913, PLR0917 - a scan's parts
    scope: Scope,
    body: ir.Graph,
    states: list[Tensor],
    sequences: Sequence[Tensor],
    axes: Sequence[int],
    backwards: Sequence[int],
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The final states, and the scan outputs pass by pass."""
    length = sequences[0].shape[axes[0]]
    if any(t.signature[axis] == -1 for t, axis in zip(sequences, axes, strict=True)) or not length:
        raise Unsupported("the length of its sequence is static and not 0", sequences[0].name, "a static length")
    rows: list[list[Tensor]] = [[] for _ in range(len(body.outputs) - len(states))]
    for step in range(length):
        slices = [
            scope.op("Gather", t, np.array(length - 1 - step if back else step, np.int64), axis=axis)
            for t, axis, back in zip(sequences, axes, backwards, strict=True)
        ]
        values = scope.body(body, [*states, *slices])
        states = values[: len(states)]
        for row, value in zip(rows, values[len(states) :], strict=True):
            row.append(value)
    return states, rows


def _batched_scan(scope: Scope, node: Node, body: ir.Graph) -> list[Tensor]:
    """Opset 8: axis 0 is the batch, axis 1 the sequence, in and out; no sequence lengths."""
    if node.has(0):
        raise Unsupported("sequence lengths of their own", node.tensor(0).name, "all sequences of one length")
    given = [node.tensor(place) for place in range(1, len(node.inputs))]
    count = int(node.attribute("num_scan_inputs"))
    backwards = _ints(node, "directions", count)
    results: list[list[Tensor]] = []
    for sample in range(given[0].shape[0]):
        parts = [scope.op("Gather", t, np.array(sample, np.int64), axis=0) for t in given]
        states, sequences = parts[: len(parts) - count], parts[len(parts) - count :]
        states, rows = _scanned(scope, body, states, sequences, [0] * count, backwards)
        results.append([*states, *(_stacked(scope, row, 0, node) for row in rows)])
    return [_stacked(scope, values, 0, node) for values in zip(*results, strict=True)]


def expand_has_element(scope: Scope, node: Node) -> list[Tensor]:
    """Known at conversion: whether a tensor is given."""
    return [scope.op("Identity", np.array(node.has(0)))]


def expand_get_element(scope: Scope, node: Node) -> list[Tensor]:
    """The tensor itself."""
    return [node.x]


EXPANSIONS = (
    Expansion("If", expand_if),
    Expansion("Loop", expand_loop),
    Expansion("Scan", expand_scan),
    Expansion("Optional", expand_get_element),
    Expansion("OptionalGetElement", expand_get_element),
    Expansion("OptionalHasElement", expand_has_element),
)
