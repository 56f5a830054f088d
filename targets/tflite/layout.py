"""The order in which a tensor's elements lie in memory, and what Transpose and Reshape make of it.

A layout is a permutation: physical axis i holds ONNX axis `perm[i]`; channels-last of a 4-D tensor is (0, 2, 3, 1).
An ONNX axis may also lie torn into parts, with other axes between them: the windows of [windows, pixels, channels]
as they lie in the picture are (row of windows, row, column of windows, column, channel).

Memory is a number in mixed radix: the digits, outermost first, each with its size and its weight in the tensor's flat
index. Reshape keeps the flat index and so the digits; Transpose gives them other weights. Data moves only where the
digits' order must change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.graph import Tensor

Extents = tuple[int, ...]
Part = tuple[int, int]
"""Of one ONNX axis: how many places, and how many of the axis's own steps lie between neighbours."""
Digit = tuple[int, int]
"""Of a whole tensor: how many places, and how many elements of ONNX's own order lie between neighbours."""
_DYNAMIC = 1_000_003
"""Stands for an unknown dimension where shapes are matched: a prime, so that no product of static ones equals it."""
MOST_AXES = 6
"""Axes that TRANSPOSE takes."""


@dataclass(frozen=True)
class Layout:
    """Physical axis i holds ONNX axis `perm[i]`, all of it, or where `parts[i]` is given this part of it."""

    perm: tuple[int, ...]
    parts: tuple[Part | None, ...] = ()

    @property
    def is_torn(self) -> bool:
        """Whether an ONNX axis lies in parts."""
        return bool(self.parts)

    @property
    def is_natural(self) -> bool:
        """Whether this is ONNX's own order."""
        return not self.parts and self.perm == tuple(range(len(self.perm)))

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The physical shape of a tensor of ONNX shape `shape`, or of such a signature."""
        if not self.parts:
            return tuple(shape[axis] for axis in self.perm)
        return tuple(
            shape[axis] if part is None else _size(part[0], dynamic=shape[axis] == -1)
            for axis, part in zip(self.perm, self.parts, strict=True)
        )

    def axis(self, axis: int) -> int:
        """Where ONNX axis `axis` lies, which must be in one place."""
        return self.perm.index(axis)

    def holds_whole(self, axes: Sequence[int]) -> bool:
        """Whether each of the ONNX axes lies in one place."""
        return not self.parts or all(self.parts[self.perm.index(axis)] is None for axis in axes)

    def without(self, axes: Sequence[int]) -> Layout:
        """The layout after ONNX axes `axes` are dropped from the shape."""
        kept = [axis for axis in range(max(self.perm, default=-1) + 1) if axis not in axes]
        return self._of([(kept.index(axis), part) for axis, part in self._places() if axis in kept])

    def last(self, axis: int) -> Layout:
        """This layout with all of ONNX axis `axis` moved to the end."""
        return self._of([place for place in self._places() if place[0] != axis] + [(axis, None)])

    def before(self, axis: int) -> Layout | None:
        """What lies before ONNX axis `axis`, if that takes the end of memory, in one place or in parts; else None."""
        count = self.perm.count(axis)
        return self._of(list(self._places())[:-count]) if self.perm[-count:] == (axis,) * count else None

    def only(self, axis: int) -> Layout:
        """The order in which ONNX axis `axis` lies, as the layout of a tensor that has no other."""
        return self._of([(0, part) for other, part in self._places() if other == axis])

    def renamed(self, names: Sequence[int]) -> Layout:
        """The same memory when ONNX axis a is called `names[a]`."""
        return Layout(tuple(names[axis] for axis in self.perm), self.parts)

    def fits(self, shape: Extents) -> bool:
        """Whether the parts make up the axes of `shape`."""
        held = [1] * len(shape)
        for axis, part in self._places():
            held[axis] *= part[0] if part else shape[axis]
        return held == list(shape)

    def fitted(self, shape: Sequence[int]) -> Layout:
        """This layout for a tensor that has size 1 along axes that lie in parts here."""
        if not self.parts:
            return self
        ones = [part and ((1, part[1]) if shape[axis] == 1 else part) for axis, part in self._places()]
        return Layout(self.perm, tuple(ones))

    def lay(self, data: Array) -> Array:
        """A constant in ONNX's order as it lies in memory (a view)."""
        if not self.parts:
            return data.transpose(self.perm)
        whole = np.ascontiguousarray(data)
        sizes = self.shape(data.shape)
        steps = [
            whole.strides[axis] * (1 if part is None else part[1])
            for axis, part in zip(self.perm, self.parts, strict=True)
        ]
        return np.lib.stride_tricks.as_strided(whole, sizes, steps, writeable=False)

    def digits(self, shape: Extents) -> tuple[Digit, ...]:
        """Memory as digits, neighbours that make one number joined."""
        weights = _weights(shape)
        found: list[Digit] = []
        for axis, part in self._places():
            size, step = part or (shape[axis], 1)
            if size == 1:
                continue
            weight = weights[axis] * step
            if found and found[-1][1] == size * weight:
                size *= found.pop()[0]
            found.append((size, weight))
        return tuple(found)

    def _places(self) -> list[tuple[int, Part | None]]:
        return list(zip(self.perm, self.parts or (None,) * len(self.perm), strict=True))

    @staticmethod
    def _of(places: Sequence[tuple[int, Part | None]]) -> Layout:
        parts = tuple(part for _, part in places)
        return Layout(tuple(axis for axis, _ in places), parts if any(parts) else ())


def _size(extent: int, *, dynamic: bool) -> int:
    """A part's size: -1 where it is the dynamic one of an axis whose signature is asked for."""
    if not extent or extent % _DYNAMIC:
        return extent
    return -1 if dynamic else _size(extent // _DYNAMIC, dynamic=dynamic)


@cache
def natural(rank: int) -> Layout:
    """ONNX's own order."""
    return Layout(tuple(range(rank)))


@cache
def channels_last(rank: int) -> Layout:
    """Batch, space, channels; the natural order where there is no space."""
    return Layout((0, *range(2, rank), 1)) if rank > 2 else natural(rank)


def extents(tensor: Tensor) -> Extents:
    """The shape with dynamic dimensions marked, for comparing and matching."""
    return marked(tensor.shape, tensor.signature)


def marked(shape: Sequence[int], signature: Sequence[int]) -> Extents:
    """A physical shape with dynamic dimensions marked."""
    return tuple(s * _DYNAMIC if d == -1 else s for s, d in zip(shape, signature, strict=True))


def unmarked(shape: Extents) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape, and the signature."""
    return tuple(_size(s, dynamic=False) for s in shape), tuple(_size(s, dynamic=True) for s in shape)


def same_bytes(a: Layout, b: Layout, shape: Extents) -> bool:
    """Whether both lay a tensor out identically in memory: they differ at most in where axes of size 1 stand."""
    return a == b or 0 in shape or a.digits(shape) == b.digits(shape)


def reshaped(source: Layout, before: Extents, after: Extents, wished: Layout | None = None) -> Layout | None:
    """The layout in which `after` needs no data movement when `before` lies as `source`; None when there is none."""
    if 0 in before or prod(before) != prod(after):
        return natural(len(after)) if source.is_natural else None
    digits = source.digits(before)
    for candidate in (wished, natural(len(after)), channels_last(len(after))):
        if candidate and candidate.digits(after) == digits:
            return candidate
    return _placed(digits, after)


def gathered(source: Layout, before: Extents, after: Extents) -> Layout | None:
    """The layout nearest to `source` that a reshape to `after` leaves as it is: what it mixes lies together."""
    if 0 in before or prod(before) != prod(after):
        return None
    edges = sorted({1, prod(before)} | (_edges(before) & _edges(after)))
    digits = _cut(source.digits(before), edges)
    if digits is None:
        return None
    starts = dict.fromkeys(max(edge for edge in edges if edge <= weight) for _, weight in digits)
    ends = dict(pairwise(edges))
    return _placed([(ends[start] // start, start) for start in starts], before)


def _edges(shape: Extents) -> set[int]:
    return set(_weights(shape))


def _placed(digits: Sequence[Digit], shape: Extents) -> Layout | None:
    """The layout of a tensor of `shape` whose memory is `digits`; None where an axis would begin within a digit that
    it does not divide, or too many digits are left to be moved in one go.
    """
    places: list[tuple[int, Part | None]] = []
    weights = _weights(shape)
    for digit in digits:
        parts = _parts(digit, shape, weights)
        if parts is None:
            return None
        places += parts
    if len(digits) > MOST_AXES:
        return None
    for axis, size in enumerate(shape):
        if size == 1:
            behind = [place for place, (other, _) in enumerate(places) if other == axis - 1]
            places.insert(behind[-1] + 1 if behind else 0, (axis, None))
    return Layout._of(places)


def _parts(digit: Digit, shape: Extents, weights: Sequence[int]) -> list[tuple[int, Part | None]] | None:
    """The axes, and parts of axes, that one digit runs over, outermost first."""
    size, weight = digit
    places: list[tuple[int, Part | None]] = []
    while size > 1:
        axis = next(a for a, w in enumerate(weights) if w <= weight < w * shape[a])
        end = weights[axis] * shape[axis]
        if weight % weights[axis] or end % weight:
            return None
        room = end // weight
        taken = size if room % size == 0 else room
        if size % taken:
            return None
        whole = taken == shape[axis]
        places.insert(0, (axis, None if whole else (taken, weight // weights[axis])))
        size, weight = size // taken, weight * taken
    return places


def _weights(shape: Extents) -> list[int]:
    weights = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        weights[axis] = weights[axis + 1] * shape[axis + 1]
    return weights


@dataclass(frozen=True)
class Move:
    """A change of order as TRANSPOSE does it: the shape it reads, the permutation, the shape it writes.

    Shapes are extents: dynamic dimensions marked.
    """

    shape: Extents
    permutation: tuple[int, ...]

    @property
    def result(self) -> Extents:
        """The shape that is written."""
        return tuple(self.shape[place] for place in self.permutation)

    @property
    def back(self) -> Move:
        """The way back."""
        return Move(self.result, tuple(sorted(range(len(self.shape)), key=self.permutation.__getitem__)))

    def between(self, source: Extents, target: Extents) -> Move:
        """The same move on finer axes, so that as few of `source` and `target` as can be need another shape."""
        reading, writing = self._reading(source), self.back._reading(target)
        both = reading and reading.back._reading(target)
        options = [self, *(way for way in (reading, writing and writing.back, both and both.back) if way)]
        return min(options, key=lambda way: (way.shape != source) + (way.result != target))

    def _reading(self, source: Extents) -> Move | None:
        """The same move with `source` as the shape it reads; axes of size 1 only where they lead."""
        groups: list[list[int]] = []
        rest = list(source)
        lead = [rest.pop(0)] if rest[:1] == [1] and self.shape[:1] != (1,) else []
        for size in self.shape:
            group: list[int] = []
            while rest and (not group or prod(group) < size):
                group.append(rest.pop(0))
            if prod(group) != size:
                return None
            groups.append(group)
        if rest or len(source) > MOST_AXES:
            return None
        starts = [len(lead) + sum(map(len, groups[:place])) for place in range(len(groups))]
        order = [start + i for p in self.permutation for start in (starts[p],) for i in range(len(groups[p]))]
        return Move(source, (*range(len(lead)), *order))


def move(have: Layout, want: Layout, shape: Extents) -> Move | None:
    """The fewest axes that bring a tensor from one layout into another; None where it cannot be done in one go."""
    source, target = list(have.digits(shape)), list(want.digits(shape))
    edges = sorted({edge for size, weight in (*source, *target) for edge in (weight, weight * size)})
    fine, wanted = _cut(source, edges), _cut(target, edges)
    if fine is None or wanted is None or sorted(fine) != sorted(wanted):
        return None
    order = [wanted.index(digit) for digit in fine]
    runs: list[list[int]] = []
    for place, goal in enumerate(order):
        if runs and order[place - 1] + 1 == goal:
            runs[-1].append(place)
        else:
            runs.append([place])
    if len(runs) > MOST_AXES:
        return None
    sizes = [prod(fine[place][0] for place in run) for run in runs]
    permutation = sorted(range(len(runs)), key=lambda run: order[runs[run][0]])
    return Move(tuple(sizes), tuple(permutation))


def directly(have: Layout, want: Layout, source: Extents) -> Move | None:
    """The move between two layouts of whole axes, axis by axis; `source` is the shape that the first says."""
    if have.is_torn or want.is_torn or len(source) > MOST_AXES:
        return None
    return Move(source, tuple(have.axis(axis) for axis in want.perm))


def _cut(digits: Sequence[Digit], edges: Sequence[int]) -> list[Digit] | None:
    """The digits with a cut at every edge; None where an edge does not divide a digit."""
    found: list[Digit] = []
    for size, weight in digits:
        bounds = sorted({weight, weight * size, *(edge for edge in edges if weight < edge < weight * size)})
        pieces: list[Digit] = []
        for low, high in pairwise(bounds):
            if high % low:
                return None
            pieces.insert(0, (high // low, low))
        found += pieces
    return found
