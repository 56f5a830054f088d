"""The TRANSPOSE operators that bring a tensor from one layout into another.

One is the rule. The exception are many small tables, `[N, g, c]` to `[N, c, g]` with a narrow side, as channel shuffles
have them: XNNPACK transposes table by table and is slow on narrow ones. Two wide moves, over the whole of N each time,
take between a tenth and four fifths of its time.
"""

from __future__ import annotations

from edgeship.targets.tflite.graph import Tensor, Unsupported
from edgeship.targets.tflite.layout import Extents, Layout, Move, directly, extents, marked, move

NARROW = {"int8": 6, "float32": 2}
"""By type, the narrow sides up to which two moves are faster for any other side; XNNPACK takes no other type."""
MANY = 16
"""Tables from which on two moves are faster."""


def moves(tensor: Tensor, have: Layout, want: Layout, source: Extents) -> list[Move]:
    """What takes `tensor` from `have`, where it is held under the shape `source`, to `want`, one after the other."""
    goal = marked(want.shape(tensor.shape), want.shape(tensor.signature))
    shortest = move(have, want, extents(tensor))
    if shortest is not None and (steps := _wide_steps(shortest, tensor.storage.name)):
        first, last = steps
        return [first.between(source, first.result), last.between(first.result, goal)]
    way = None
    if source == marked(have.shape(tensor.shape), have.shape(tensor.signature)):
        way = directly(have, want, source)
    way = way or shortest
    if way is None:
        raise Unsupported("an order that one TRANSPOSE of 6 axes does not reach", tensor.name)
    return [way.between(source, goal)]


def _wide_steps(way: Move, dtype: str) -> tuple[Move, Move] | None:
    """Two moves that do the same faster, or None; each runs over the narrow side and moves wide tables."""
    if way.permutation != (0, 2, 1):
        return None
    tables, rows, columns = way.shape
    if tables < MANY or min(rows, columns) > NARROW.get(dtype, 0):
        return None
    if rows <= columns:
        first = Move(way.shape, (2, 1, 0))
        return first, Move(first.result, (2, 0, 1))
    first = Move(way.shape, (1, 2, 0))
    return first, Move(first.result, (2, 1, 0))
