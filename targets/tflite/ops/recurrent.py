"""Recurrent cells, unrolled over a static sequence: RNN, GRU, LSTM as the standard's own formulas have them.

What the inputs add to the gates is one matrix product for all steps; each step then multiplies the state alone.
TFLite's own sequence kernels keep their state between runs and start it at zero: they would not be the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported

LONGEST = 1024
_USUAL = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_PARAMETERS: dict[str, tuple[tuple[str, float], ...]] = {
    "Affine": (("alpha", 1.0), ("beta", 0.0)),
    "Elu": (("alpha", 1.0),),
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
    "LeakyRelu": (("alpha", 0.01),),
    "ScaledTanh": (("alpha", 1.0), ("beta", 1.0)),
    "ThresholdedRelu": (("alpha", 1.0),),
}
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One direction of a node: its weights turned for a product from the right, and the functions of its gates."""

    scope: Scope
    node: Node
    hidden: int
    recurrent: Tensor
    recurrent_bias: Tensor | None
    peepholes: Tensor | None
    functions: Sequence[Activation]

    def gates(self, x: Tensor, state: Tensor | None) -> Tensor:
        """What goes into all gates: `x` plus the product of the state."""
        return x if state is None else self.scope.op("Add", x, self.scope.op("MatMul", state, self.recurrent))

    def parts(self, x: Tensor, count: int) -> list[Tensor]:
        """`x` cut into gates along its last axis."""
        return self.scope.ops("Split", count, x, axis=-1, num_outputs=count) if count > 1 else [x]


def expand_rnn(scope: Scope, node: Node) -> list[Tensor]:
    """The steps of the cell one after the other, over a static sequence of at most 1024."""
    return _recurrent(scope, node, _rnn_step, states=1)


def expand_gru(scope: Scope, node: Node) -> list[Tensor]:
    """The steps of the cell one after the other, over a static sequence of at most 1024."""
    return _recurrent(scope, node, _gru_step, states=1)


def expand_lstm(scope: Scope, node: Node) -> list[Tensor]:
    """The steps of the cell one after the other, over a static sequence of at most 1024."""
    return _recurrent(scope, node, _lstm_step, states=2)


def _rnn_step(cell: Cell, x: Tensor, states: Sequence[Tensor | None]) -> list[Tensor]:
    return [cell.functions[0](cell.gates(x, states[0]))]


def _gru_step(cell: Cell, x: Tensor, states: Sequence[Tensor | None]) -> list[Tensor]:
    """h' = n + z (h - n) with the update gate z."""
    scope, (state,) = cell.scope, states
    if cell.node.attribute("linear_before_reset", 0):
        update, new = _gru_reset_after(cell, x, state)
    else:
        update, new = _gru_reset_before(cell, x, state)
    if state is None:
        return [scope.op("Sub", new, scope.op("Mul", update, new))]
    return [scope.op("Add", new, scope.op("Mul", update, scope.op("Sub", state, new)))]


def _gru_reset_before(cell: Cell, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The update gate and n = f(x + R (r h))."""
    scope, sizes = cell.scope, np.array([2 * cell.hidden, cell.hidden], np.int64)
    x_gates, x_new = scope.ops("Split", 2, x, sizes, axis=-1)
    if state is None:
        return cell.parts(cell.functions[0](x_gates), 2)[0], cell.functions[1](x_new)
    gate_weights, new_weights = scope.ops("Split", 2, cell.recurrent, sizes, axis=-1)
    gates = scope.op("Add", x_gates, scope.op("MatMul", state, gate_weights))
    update, reset = cell.parts(cell.functions[0](gates), 2)
    inner = scope.op("MatMul", scope.op("Mul", reset, state), new_weights)
    return update, cell.functions[1](scope.op("Add", x_new, inner))


def _gru_reset_after(cell: Cell, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The update gate and n = f(x + r (R h + b)): linear_before_reset."""
    scope, sizes = cell.scope, np.array([2 * cell.hidden, cell.hidden], np.int64)
    x_gates, x_new = scope.ops("Split", 2, x, sizes, axis=-1)
    product = None if state is None else scope.op("MatMul", state, cell.recurrent)
    if product is None:
        product = cell.recurrent_bias
    elif cell.recurrent_bias is not None:
        product = scope.op("Add", product, cell.recurrent_bias)
    if product is None:
        return cell.parts(cell.functions[0](x_gates), 2)[0], cell.functions[1](x_new)
    h_gates, h_new = scope.ops("Split", 2, product, sizes, axis=-1)
    update, reset = cell.parts(cell.functions[0](scope.op("Add", x_gates, h_gates)), 2)
    return update, cell.functions[1](scope.op("Add", x_new, scope.op("Mul", reset, h_new)))


def _lstm_step(cell: Cell, x: Tensor, states: Sequence[Tensor | None]) -> list[Tensor]:
    """h' = o tanh(c') with c' = f c + i g; peepholes let the gates i and f see c, and o see c'."""
    scope, (state, memory) = cell.scope, states
    squash, candidate, shown = cell.functions
    gates, coupled = cell.gates(x, state), bool(cell.node.attribute("input_forget", 0))
    if cell.peepholes is None and not coupled:
        three, new = scope.ops("Split", 2, gates, np.array([3 * cell.hidden, cell.hidden], np.int64), axis=-1)
        enter, leave, keep = cell.parts(squash(three), 3)
        updated = _remembered(scope, enter, candidate(new), keep, memory)
        return [scope.op("Mul", leave, shown(updated)), updated]
    enter, leave, keep, new = cell.parts(gates, 4)
    seen = cell.parts(cell.peepholes, 3) if cell.peepholes is not None else []
    if seen and memory is not None:
        enter = scope.op("Add", enter, scope.op("Mul", seen[0], memory))
        keep = scope.op("Add", keep, scope.op("Mul", seen[2], memory))
    enter = squash(enter)
    keep = scope.op("Sub", np.array(1, np.float32), enter) if coupled else squash(keep)
    updated = _remembered(scope, enter, candidate(new), keep, memory)
    if seen:
        leave = scope.op("Add", leave, scope.op("Mul", seen[1], updated))
    return [scope.op("Mul", squash(leave), shown(updated)), updated]


def _remembered(scope: Scope, enter: Tensor, new: Tensor, keep: Tensor, memory: Tensor | None) -> Tensor:
    """keep * memory + enter * new."""
    added = scope.op("Mul", enter, new)
    return added if memory is None else scope.op("Add", scope.op("Mul", keep, memory), added)


Step = Callable[[Cell, Tensor, Sequence[Tensor | None]], list[Tensor]]


def _recurrent(scope: Scope, node: Node, step: Step, states: int) -> list[Tensor]:
    """Y, Y_h and, for two states, Y_c."""
    batch_first = bool(node.attribute("layout", 0))
    x = scope.op("Transpose", node.x, perm=[1, 0, 2]) if batch_first else node.x
    if not 0 < x.shape[0] <= LONGEST:
        raise Unsupported("its sequence is not empty and not too long", f"{x.shape[0]} steps", f"1 to {LONGEST} steps")
    direction = node.attribute("direction", "forward")
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    results = [_direction(scope, node, step, x, states, place, back) for place, back in enumerate(backwards)]
    steps, size = x.shape[0], int(node.attribute("hidden_size", results[0][1][0].shape[-1]))
    shape = np.array([steps, 1, -1, size], np.int64)
    sequences = [scope.op("Reshape", _joined(scope, rows, 0), shape) for rows, _ in results]
    y = _joined(scope, sequences, 1)
    if batch_first:
        y = scope.op("Transpose", y, perm=[2, 0, 1, 3])
    axis = np.array([1 if batch_first else 0], np.int64)
    finals = [
        _joined(scope, [scope.op("Unsqueeze", final[place], axis) for _, final in results], int(axis[0]))
        for place in range(states)
    ]
    return [y, *finals][: len(node.outputs)]


def _joined(scope: Scope, parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else scope.op("Concat", *parts, axis=axis)


def _direction(  # noqa: PLR0913, PLR0917 - the parts of a recurrent node
    scope: Scope, node: Node, step: Step, x: Tensor, states: int, place: int, back: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The hidden state after each step in the sequence's order, each [batch, hidden], and the final states."""
    cell, inputs = _cell(scope, node, x, place)
    steps = x.shape[0]
    rows = scope.ops("Split", steps, inputs, axis=0, num_outputs=steps) if steps > 1 else [inputs]
    current = [_initial(scope, node, index, place) for index in (5, 6)[:states]]
    new: list[Tensor] = []
    shown: dict[int, Tensor] = {}
    for moment in reversed(range(steps)) if back else range(steps):
        new = step(cell, rows[moment], current)
        shown[moment] = new[0]
        alive = _alive(scope, node.tensor(4), moment) if node.has(4) else None
        if alive is not None and (alive.data is None or not alive.data.all()):
            zero = np.zeros((), np.float32)
            shown[moment] = scope.op("Where", alive, new[0], zero)
            new = [scope.op("Where", alive, a, zero if b is None else b) for a, b in zip(new, current, strict=True)]
        current = list(new)
    return [shown[moment] for moment in range(steps)], new


def _alive(scope: Scope, lengths: Tensor, moment: int) -> Tensor:
    """[batch, 1]: whether the sequence has not ended at step `moment`."""
    column = scope.op("Reshape", lengths, np.array([-1, 1], np.int64))
    return scope.op("Less", np.array(moment, lengths.dtype), column)


def _cell(scope: Scope, node: Node, x: Tensor, place: int) -> tuple[Cell, Tensor]:
    """The cell of one direction, and what the inputs and biases add to its gates: [steps * batch, gates]."""

    def part(index: int) -> Tensor | None:
        return scope.op("Gather", node.tensor(index), np.array(place, np.int64), axis=0) if node.has(index) else None

    weights, recurrent, bias = part(1), part(2), part(3)
    if weights is None or recurrent is None:
        raise Unsupported("needs W and R", "they are left out")
    size, width = recurrent.shape[1], recurrent.shape[0]
    own: Tensor | None = None
    if bias is not None:
        outer, own = scope.ops("Split", 2, bias, axis=0, num_outputs=2)
        if not node.attribute("linear_before_reset", 0):
            bias, own = scope.op("Add", outer, own), None
        else:
            bias = outer
    flat = scope.op("Reshape", x, np.array([-1, x.shape[2]], np.int64))
    inputs = scope.op("MatMul", flat, scope.op("Transpose", weights, perm=[1, 0]))
    if bias is not None:
        inputs = scope.op("Add", inputs, bias)
    if width != _GATES[node.op_type] * size:
        raise Unsupported("R has one square block per gate", f"{list(recurrent.shape)}")
    turned = scope.op("Transpose", recurrent, perm=[1, 0])
    functions = _functions(scope, node, place)
    return Cell(scope, node, size, turned, own, part(7), functions), inputs


def _initial(scope: Scope, node: Node, index: int, place: int) -> Tensor | None:
    """The state before the first step, [batch, hidden]; None for zeros."""
    if not node.has(index) or node.tensor(index).number == 0:
        return None
    if node.tensor(index).data is not None and not node.tensor(index).values().any():
        return None
    axis = 1 if node.attribute("layout", 0) else 0
    return scope.op("Gather", node.tensor(index), np.array(place, np.int64), axis=axis)


def _functions(scope: Scope, node: Node, place: int) -> list[Activation]:
    """The functions of this direction's gates; parameters are handed out to those that take one, in order."""
    usual = _USUAL[node.op_type]
    names = list(node.attribute("activations") or usual * (place + 1))
    alphas, betas = (iter(node.attribute(f"activation_{kind}") or []) for kind in ("alpha", "beta"))
    clip = node.attribute("clip")
    made = [_function(scope, name, {"alpha": alphas, "beta": betas}, clip) for name in names]
    return made[place * len(usual) : (place + 1) * len(usual)]


def _function(scope: Scope, name: str, given: dict[str, Iterator[float]], clip: float | None) -> Activation:
    values = {key: float(next(given[key], default)) for key, default in _PARAMETERS.get(name, ())}

    def apply(x: Tensor) -> Tensor:
        if clip is not None:
            x = scope.op("Clip", x, np.array(-clip, np.float32), np.array(clip, np.float32))
        if name == "Affine":
            scaled = scope.op("Mul", x, np.array(values["alpha"], np.float32))
            return scope.op("Add", scaled, np.array(values["beta"], np.float32))
        if name == "ScaledTanh":
            inner = scope.op("Tanh", scope.op("Mul", x, np.array(values["beta"], np.float32)))
            return scope.op("Mul", inner, np.array(values["alpha"], np.float32))
        return scope.op(name, x, **values)

    return apply


EXPANSIONS = (
    Expansion("RNN", expand_rnn),
    Expansion("GRU", expand_gru),
    Expansion("LSTM", expand_lstm),
)
