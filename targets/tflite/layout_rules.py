"""The ways in which operators relate to memory layout, each a rule that operator entries name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeship.targets.tflite.dtypes import USUAL
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout import MOST_AXES, Layout, channels_last, extents, gathered, natural, reshaped
from edgeship.targets.tflite.layout_plan import Arrangement, LayoutRule, View

Layouts = tuple[Layout | None, ...]
WIDEST = 6
"""Physical axes of torn tensors that operators work on: what the faster kernels take."""


@dataclass(frozen=True)
class Natural:
    """Works in ONNX's own order only."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """The one way."""
        inputs = tuple(None if t is None else natural(t.rank) for t in view.node.inputs)
        return [Arrangement(inputs, tuple(natural(t.rank) for t in view.node.outputs))]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """ONNX's order for all."""
        return tuple(None if t is None else natural(t.rank) for t in node.inputs)

    def insists(self, node: Node) -> bool:
        """Yes."""
        return True


NATURAL = Natural()


@dataclass(frozen=True)
class ChannelsLast:
    """Works on and makes channels-last tensors: the inputs `data` are such, the others lie in ONNX's order."""

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

    def insists(self, node: Node) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True)
class Pointwise:
    """Elementwise with broadcasting: any order, the same for all inputs of full rank."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order an input comes in or a reader wishes, and ONNX's own."""
        node, rank = view.node, view.node.y.rank
        full = [have for t, have in zip(node.inputs, view.incoming, strict=True) if have and t and t.rank == rank]
        alone = all(t is None or t.is_constant or t.rank == rank or t.size == 1 for t in node.inputs)
        shape = extents(node.y)
        candidates = [
            layout
            for layout in (*full, *view.wished)
            if layout and (not layout.is_torn or (alone and _usable(layout, view, ()) and layout.fits(shape)))
        ]
        candidates.append(natural(rank))
        return [self._arranged(node, layout) for layout in dict.fromkeys(candidates)]

    @staticmethod
    def _arranged(node: Node, layout: Layout) -> Arrangement:
        rank = node.y.rank
        inputs = [
            None if t is None else layout.fitted(t.shape) if t.rank == rank else natural(t.rank) for t in node.inputs
        ]
        return Arrangement(tuple(inputs), tuple(layout for _ in node.outputs))

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the output is wished."""
        wish = wished[0]
        return tuple(
            wish.fitted(t.shape) if wish and t is not None and t.rank == node.y.rank else None for t in node.inputs
        )

    def insists(self, node: Node) -> bool:
        """No."""
        return False


def _usable(layout: Layout, view: View, axes: Sequence[int] | None) -> bool:
    """Whether an operator that needs `axes` whole (None: all) can work on the layout."""
    if not layout.is_torn:
        return True
    return axes is not None and view.tears and len(layout.perm) <= WIDEST and layout.holds_whole(axes)


@dataclass(frozen=True)
class Converts(Pointwise):
    """A change of type: data moves where its type is one that TRANSPOSE takes."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """In the order the output is wished or the input comes in where that tensor's type cannot move; else as any."""
        node = view.node
        fixed = view.wished[0] if node.y.dtype.name not in USUAL else None
        fixed = view.incoming[0] if node.x.dtype.name not in USUAL else fixed
        if fixed is None or fixed.is_torn:
            return super().arrangements(view)
        return [self._arranged(node, fixed)]


def _no_axes(node: Node) -> None:
    return None


@dataclass(frozen=True)
class AlongAxes:
    """Any order, the same in and out; the operator renames its axis numbers. `data` inputs are tensors, the rest
    parameters. `touches` names the axes that the operator needs in one place; the others may then be torn.
    """

    data: int | None = 1
    touches: Callable[[Node], Sequence[int] | None] = _no_axes

    def _is_data(self, node: Node, index: int) -> bool:
        return node.inputs[index] is not None and (self.data is None or index < self.data)

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order an input comes in or a reader wishes, and ONNX's own."""
        node, axes = view.node, self.touches(view.node)
        given = [have for i, have in enumerate(view.incoming) if self._is_data(node, i)]
        candidates = [layout for layout in (*given, *view.wished) if layout and _usable(layout, view, axes)]
        return [
            Arrangement(
                tuple(
                    layout if self._is_data(node, i) else None if t is None else natural(t.rank)
                    for i, t in enumerate(node.inputs)
                ),
                tuple(layout for _ in node.outputs),
            )
            for layout in dict.fromkeys([*candidates, natural(node.x.rank)])
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the first output is wished."""
        wish = next((layout for layout in wished if layout), None)
        return tuple(wish if self._is_data(node, i) else None for i in range(len(node.inputs)))

    def insists(self, node: Node) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class LastAxis:
    """Works along the last axis in memory: the order of the others does not matter. `axis` finds it in ONNX's
    numbering; `torn` says whether the others may be torn.
    """

    axis: Callable[[Node], int]
    torn: bool = False

    def arrangements(self, view: View) -> list[Arrangement]:
        """One for each order that has the axis at the end."""
        node, axis = view.node, self.axis(view.node)
        given = [layout for layout in (*view.incoming[:1], *view.wished) if layout]
        candidates = [layout.last(axis) for layout in (*given, natural(node.x.rank))]
        if not (self.torn and view.tears):
            candidates = [layout for layout in candidates if not layout.is_torn]
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        return [
            Arrangement((layout, *rest), tuple(layout for _ in node.outputs)) for layout in dict.fromkeys(candidates)
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The wished order with the axis at the end."""
        axis, rank = self.axis(node), node.x.rank
        if wished[0] is None and axis == rank - 1:
            return (None,)
        for layout in (wished[0], channels_last(rank), natural(rank)):
            if layout and layout.last(axis) == layout:
                return (layout,)
        return (natural(rank).last(axis),)

    def insists(self, node: Node) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class Drops:
    """Any order; ONNX axes that `axes` names vanish from the output (a reduction without keepdims, a scalar Gather).
    `touches` names the axes that the operator needs in one place.
    """

    axes: Callable[[Node], list[int]]
    touches: Callable[[Node], Sequence[int] | None] = _no_axes

    def arrangements(self, view: View) -> list[Arrangement]:
        """In the order the input comes in, and ONNX's own."""
        node, axes, touched = view.node, self.axes(view.node), self.touches(view.node)
        given = [layout for layout in view.incoming[:1] if layout and _usable(layout, view, touched)]
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        return [
            Arrangement((layout, *rest), tuple(layout.without(axes).fitted(t.shape) for t in node.outputs))
            for layout in dict.fromkeys([*given, natural(node.x.rank)])
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """As the output is wished where the ranks agree; else no wish."""
        return (wished[0] if wished[0] and not wished[0].is_torn and len(wished[0].perm) == node.x.rank else None,)

    def insists(self, node: Node) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class Renames:
    """Transpose: the data stays, its axes get new names, so every order of the input gives one of the output."""

    permutation: Callable[[Node], list[int]]

    def arrangements(self, view: View) -> list[Arrangement]:
        """The one that moves nothing; where the new names leave too many pieces to be moved later, others too."""
        node, rank = view.node, view.node.x.rank
        names = self.permutation(node)
        back = [names.index(axis) for axis in range(rank)]
        source = view.incoming[0] or natural(rank)
        carried = Arrangement((source,), (source.renamed(back),))
        if not source.is_torn or len(carried.outputs[0].digits(extents(node.y))) <= MOST_AXES:
            return [carried]
        wish = view.wished[0] or natural(rank)
        return [Arrangement((layout.renamed(names),), (layout,)) for layout in (wish, natural(rank))] + [
            Arrangement((natural(rank),), (natural(rank).renamed(back),))
        ]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The wished order under the old names."""
        return (wished[0].renamed(self.permutation(node)) if wished[0] else None,)

    def insists(self, node: Node) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class Reshapes:
    """Reshape and its kin: memory stays as it is where its order can be said of the new axes."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """Without moving data where there is such a way; from ONNX's order otherwise."""
        node, wish = view.node, view.wished[0]
        before, after = extents(node.x), extents(node.y)
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        source = view.incoming[0]
        options = []
        if source is not None and (carried := reshaped(source, before, after, wish)):
            options.append(Arrangement((source, *rest), (carried,)))
        if wish and (needed := reshaped(wish, after, before, source)):
            options.append(Arrangement((needed, *rest), (wish,)))
        if not options and source is not None and (needed := gathered(source, before, after)):
            carried = reshaped(needed, before, after, wish)
            options += [Arrangement((needed, *rest), (carried,))] if carried else []
        plain = reshaped(natural(node.x.rank), before, after, wish) or natural(node.y.rank)
        options.append(Arrangement((natural(node.x.rank), *rest), (plain,)))
        if view.tears:
            return options
        return [option for option in options if not _tears(node, option)]

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The order that would carry over into the wished one."""
        if wished[0] is None:
            return (None,)
        before, after, usual = extents(node.x), extents(node.y), channels_last(node.x.rank)
        back = reshaped(wished[0], after, before, usual)
        if back is None and (near := gathered(wished[0], after, before)):
            back = reshaped(near, after, before, usual)
        return (back,)

    def insists(self, node: Node) -> bool:
        """No."""
        return False


def _tears(node: Node, option: Arrangement) -> bool:
    """Whether a layout is torn; the channels and places of a flattened [N, C, H, W] may always change order."""
    layout = option.outputs[0]
    if node.y.rank == 2 and layout.perm[:1] == (0,) and layout.perm.count(0) == 1:
        return option.inputs[0] is not None and option.inputs[0].is_torn
    return any(given is not None and given.is_torn for given in (option.inputs[0], layout))


CHANNELS_LAST = ChannelsLast()
POINTWISE = Pointwise()
CONVERTS = Converts()
ALONG_AXES = AlongAxes()
RESHAPES = Reshapes()


@dataclass(frozen=True)
class ByNode:
    """Another rule for each node, as its attributes ask."""

    choose: Callable[[Node], LayoutRule]

    def arrangements(self, view: View) -> list[Arrangement]:
        """The chosen rule's."""
        return self.choose(view.node).arrangements(view)

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """The chosen rule's."""
        return self.choose(node).wishes(node, wished)

    def insists(self, node: Node) -> bool:
        """As the chosen rule does."""
        return self.choose(node).insists(node)
