"""The ways in which operators relate to memory layout, each a rule that operator entries name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from edgeship.targets.tflite.dtypes import USUAL
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout import (
    Arrangement,
    Layout,
    LayoutRule,
    View,
    channels_last,
    extents,
    flattened,
    natural,
    reshaped,
)

Layouts = tuple[Layout | None, ...]


@dataclass(frozen=True)
class Natural:
    """Works in ONNX's own order only."""

    keeps_order: ClassVar[bool] = False

    def arrangements(self, view: View) -> list[Arrangement]:
        """The one way."""
        inputs = tuple(None if t is None else natural(t.rank) for t in view.node.inputs)
        return [Arrangement(inputs, tuple(natural(t.rank) for t in view.node.outputs))]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """ONNX's order for all."""
        return tuple(None if t is None else natural(t.rank) for t in node.inputs)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


NATURAL = Natural()


@dataclass(frozen=True)
class ChannelsLast:
    """Works on and makes channels-last tensors: the inputs `data` are such, the others lie in ONNX's order."""

    keeps_order: ClassVar[bool] = False
    data: tuple[int, ...] = (0,)

    def arrangements(self, view: View) -> list[Arrangement]:
        """The one way."""
        outputs = tuple(channels_last(t.rank) for t in view.node.outputs)
        return [Arrangement(self._inputs(view.node, natural), outputs)]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """Channels last for the data."""
        return self._inputs(node, lambda rank: None)

    def _inputs(self, node: Node, others: Callable[[int], Layout | None]) -> Layouts:
        return tuple(
            None if t is None else channels_last(t.rank) if index in self.data else others(t.rank)
            for index, t in enumerate(node.inputs)
        )

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Pointwise:
    """Elementwise with broadcasting: any order, the same for all inputs of full rank."""

    keeps_order: ClassVar[bool] = True

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order an input comes in or a reader wishes, and ONNX's own."""
        node, rank = view.node, view.node.y.rank
        full = [have for t, have in zip(node.inputs, view.incoming, strict=True) if have and t and t.rank == rank]
        candidates = [layout for layout in (*full, *view.wished) if layout is not None]
        if not self.takes_any_order(node, 0):
            candidates = [layout for layout in candidates if not layout.split]
        candidates.append(natural(rank))
        return [self._arranged(node, layout) for layout in dict.fromkeys(candidates)]

    @staticmethod
    def _arranged(node: Node, layout: Layout) -> Arrangement:
        rank = node.y.rank
        inputs = [None if t is None else layout if t.rank == rank else natural(t.rank) for t in node.inputs]
        return Arrangement(tuple(inputs), tuple(layout for _ in node.outputs))

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the output is wished."""
        return tuple(wished[0] if t is not None and t.rank == node.y.rank else None for t in node.inputs)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """With one computed tensor and nothing that differs from element to element."""
        return all(t is None or i == index or t.size == 1 for i, t in enumerate(node.inputs))


@dataclass(frozen=True)
class Converts(Pointwise):
    """A change of type: data moves where its type is one that TRANSPOSE takes."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """In the order the output is wished or the input comes in where that tensor's type cannot move; else as any."""
        node = view.node
        fixed = view.wished[0] if node.y.dtype.name not in USUAL else None
        fixed = view.incoming[0] if node.x.dtype.name not in USUAL else fixed
        if fixed is None or fixed.split:
            return super().arrangements(view)
        return [self._arranged(node, fixed)]


@dataclass(frozen=True)
class AlongAxes:
    """Any order, the same in and out; the operator renames its axis numbers. `data` inputs are tensors, the rest
    parameters.
    """

    keeps_order: ClassVar[bool] = False
    data: int | None = 1

    def _is_data(self, node: Node, index: int) -> bool:
        return node.inputs[index] is not None and (self.data is None or index < self.data)

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order an input comes in or a reader wishes, and ONNX's own."""
        node = view.node
        given = [have for i, have in enumerate(view.incoming) if have and self._is_data(node, i)]
        candidates = [*given, *(wish for wish in view.wished if wish), natural(node.x.rank)]
        return [
            Arrangement(
                tuple(
                    layout if self._is_data(node, i) else None if t is None else natural(t.rank)
                    for i, t in enumerate(node.inputs)
                ),
                tuple(layout for _ in node.outputs),
            )
            for layout in dict.fromkeys(candidates)
            if not layout.split
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the first output is wished."""
        wish = next((layout for layout in wished if layout), None)
        return tuple(wish if self._is_data(node, i) else None for i in range(len(node.inputs)))

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never: axes would mix."""
        return False


@dataclass(frozen=True)
class LastAxis:
    """Works along the last axis in memory: the order of the others does not matter. `axis` finds it in ONNX's
    numbering.
    """

    keeps_order: ClassVar[bool] = False
    axis: Callable[[Node], int]

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order that has the axis at the end."""
        node, axis = view.node, self.axis(view.node)
        given = [layout for layout in (*view.incoming[:1], *view.wished) if layout and not layout.split]
        candidates = [layout.last(axis) for layout in (*given, natural(node.x.rank))]
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        return [
            Arrangement((layout, *rest), tuple(layout for _ in node.outputs)) for layout in dict.fromkeys(candidates)
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The wished order with the axis at the end."""
        axis, rank = self.axis(node), node.x.rank
        for layout in (wished[0], channels_last(rank), natural(rank)):
            if layout and not layout.split and layout.perm[-1] == axis:
                return (layout,)
        return (natural(rank).last(axis),)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Drops:
    """Any order; ONNX axes that `axes` names vanish from the output (a reduction without keepdims, a scalar Gather)."""

    keeps_order: ClassVar[bool] = False
    axes: Callable[[Node], list[int]]

    def arrangements(self, view: View) -> list[Arrangement]:
        """In the order the input comes in, and ONNX's own."""
        node, axes = view.node, self.axes(view.node)
        given = [layout for layout in view.incoming[:1] if layout and not layout.split]
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        return [
            Arrangement((layout, *rest), tuple(layout.without(axes) for _ in node.outputs))
            for layout in dict.fromkeys([*given, natural(node.x.rank)])
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the output is wished where the ranks agree; else no wish."""
        return (wished[0] if wished[0] and len(wished[0].perm) == node.x.rank else None,)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Renames:
    """Transpose: the data stays, its axes get new names, so every order of the input gives one of the output."""

    keeps_order: ClassVar[bool] = False

    permutation: Callable[[Node], list[int]]

    def arrangements(self, view: View) -> list[Arrangement]:
        """The one that moves nothing."""
        names = self.permutation(view.node)
        source = view.incoming[0]
        if source is None or source.split:
            source = natural(view.node.x.rank)
        return [Arrangement((source,), (Layout(tuple(names.index(axis) for axis in source.perm)),))]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The wished order under the old names."""
        if wished[0] is None or wished[0].split:
            return (None,)
        names = self.permutation(node)
        return (Layout(tuple(names[axis] for axis in wished[0].perm)),)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Reshapes:
    """Reshape and its kin: an order survives when whole runs of axes move together; a flattening may leave it to its
    readers.
    """

    keeps_order: ClassVar[bool] = False

    def arrangements(self, view: View) -> list[Arrangement]:
        """Without moving data where there is such a way; from ONNX's order otherwise."""
        node = view.node
        before, after = extents(node.x), extents(node.y)
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        source = view.incoming[0]
        options = []
        if source is not None:
            carried = reshaped(source, before, after, view.wished[0])
            if carried:
                options.append(Arrangement((source, *rest), (carried,)))
            elif (scrambled := flattened(source, before, after)) and view.absorbs(node.y):
                return [Arrangement((source, *rest), (scrambled,))]
        wish = view.wished[0]
        needed = reshaped(wish, after, before, source) if wish else None
        if wish and needed:
            options.append(Arrangement((needed, *rest), (wish,)))
        plain = reshaped(natural(node.x.rank), before, after, view.wished[0]) or natural(node.y.rank)
        return [*options, Arrangement((natural(node.x.rank), *rest), (plain,))]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The order that would carry over into the wished one; none where anything can be absorbed."""
        if wished[0] is None:
            return (None,)
        back = reshaped(wished[0], extents(node.y), extents(node.x), channels_last(node.x.rank))
        return (back,)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Rows:
    """A product with a constant matrix: the reduced axis lies last, the others in any order; its columns can be
    reordered.
    """

    keeps_order: ClassVar[bool] = False
    axis: Callable[[Node], int]
    applies: Callable[[Node], bool]

    def arrangements(self, view: View) -> list[Arrangement]:
        """The order the input comes in, with the reduced axis at the end."""
        node = view.node
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        source = view.incoming[0] or natural(node.x.rank)
        if not self.applies(node):
            return NATURAL.arrangements(view)
        axis = self.axis(node)
        if source.split and axis == 1:
            return [Arrangement((source, *rest), (natural(node.y.rank),))]
        layouts = dict.fromkeys([Layout(source.perm).last(axis), natural(node.x.rank).last(axis)])
        return [Arrangement((layout, *rest), (self._out(layout, axis),)) for layout in layouts]

    @staticmethod
    def _out(layout: Layout, axis: int) -> Layout:
        """The output's order: the reduced axis becomes the new last one, the others keep their order."""
        rank = len(layout.perm)
        others = [a for a in range(rank) if a != axis]
        return Layout((*(others.index(a) for a in layout.perm[:-1]), rank - 1))

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """ONNX's order, unless a flattened block in any order will do."""
        if not self.applies(node):
            return NATURAL.wishes(node, wished)
        return (None if self.takes_any_order(node, 0) else natural(node.x.rank),)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """The flattened features, when the matrix is a constant."""
        return index == 0 and node.x.rank == 2 and self.axis(node) == 1 and self.applies(node)


CHANNELS_LAST = ChannelsLast()
POINTWISE = Pointwise()
CONVERTS = Converts()
ALONG_AXES = AlongAxes()
ALONG_AXES_ALL = AlongAxes(data=None)
RESHAPES = Reshapes()


@dataclass(frozen=True)
class ByNode:
    """Another rule for each node, as its attributes ask."""

    choose: Callable[[Node], LayoutRule]
    keeps_order: ClassVar[bool] = False

    def arrangements(self, view: View) -> list[Arrangement]:
        """The chosen rule's."""
        return self.choose(view.node).arrangements(view)

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The chosen rule's."""
        return self.choose(node).wishes(node, wished)

    def takes_any_order(self, node: Node, index: int) -> bool:
        """Never."""
        return False
