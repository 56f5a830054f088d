"""The ways in which matrix products relate to memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout import Layout, natural
from edgeship.targets.tflite.layout_plan import Arrangement, View
from edgeship.targets.tflite.layout_rules import NATURAL, Layouts

WIDEST = 5
"""Axes of BATCH_MATMUL's operands."""


def _always(node: Node) -> bool:
    return True


@dataclass(frozen=True)
class Rows:
    """A product with a constant matrix: the reduced axis lies last, the others in any order; its columns can be
    reordered. `tears` says whether the others may be torn.
    """

    axis: Callable[[Node], int]
    applies: Callable[[Node], bool]
    tears: Callable[[Node], bool] = _always

    def arrangements(self, view: View) -> list[Arrangement]:
        """The order the input comes in, or one that makes the wished output, with the reduced axis at the end."""
        node = view.node
        if not self.applies(node):
            return NATURAL.arrangements(view)
        rest: Layouts = tuple(None if t is None else natural(t.rank) for t in node.inputs[1:])
        axis, plain = self.axis(node), natural(node.x.rank)
        candidates = [layout for layout in (view.incoming[0], self._from(node, view.wished[0])) if layout]
        given = [layout for layout in candidates if layout.before(axis)]
        layouts = dict.fromkeys([*given, *(layout.last(axis) for layout in (*candidates, plain))])
        return [
            Arrangement((layout, *rest), (self._out(layout, axis),))
            for layout in layouts
            if (view.tears and self.tears(node)) or not self._out(layout, axis).is_torn
        ]

    @staticmethod
    def _out(layout: Layout, axis: int) -> Layout:
        """The output's order: the reduced axis becomes the new last one, the others keep their order."""
        rank = max(layout.perm) + 1
        others = [a for a in range(rank) if a != axis]
        kept = layout.last(axis)
        return Layout((*(others.index(a) for a in kept.perm[:-1]), rank - 1), kept.parts)

    def _from(self, node: Node, wished: Layout | None) -> Layout | None:
        """The input's order for the wished one of the output, where that has its last axis at the end."""
        rank, axis = node.x.rank, self.axis(node)
        if wished is None or wished.perm[-1] != rank - 1 or not wished.holds_whole([rank - 1]):
            return None
        others = [a for a in range(rank) if a != axis]
        return Layout((*(others[a] for a in wished.perm[:-1]), axis), wished.parts)

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """What makes the wished output; none where that is ONNX's order, which any order of a flattened block gives."""
        if not self.applies(node):
            return NATURAL.wishes(node, wished)
        wish = self._from(node, wished[0])
        return (None if wish is None or (node.x.rank == 2 and wish.is_natural) else wish,)

    def insists(self, node: Node) -> bool:
        """Where it is no product of rows."""
        return not self.applies(node)


@dataclass(frozen=True)
class Products:
    """A product of two computed stacks of matrices: stacks in any order that both share, the second's matrices in
    either.
    """

    @staticmethod
    def _applies(node: Node) -> bool:
        a, b = node.tensor(0), node.tensor(1)
        return a.is_float and 3 <= a.rank == b.rank == node.y.rank <= WIDEST and a.shape[:-2] == b.shape[:-2]

    def arrangements(self, view: View) -> list[Arrangement]:
        """Every order of the stack's axes, the usual one first."""
        node, rank = view.node, view.node.y.rank
        if not self._applies(node):
            return NATURAL.arrangements(view)
        options = []
        for order in permutations(range(rank - 2)):
            left = Layout((*order, rank - 2, rank - 1))
            options += [
                Arrangement((left, Layout((*order, *matrix))), (left,))
                for matrix in ((rank - 2, rank - 1), (rank - 1, rank - 2))
            ]
        return options

    def wishes(self, node: Node, wished: Layouts) -> Layouts:
        """None: which order is the cheapest shows when both stacks are there."""
        return (None, None) if self._applies(node) else NATURAL.wishes(node, wished)

    def insists(self, node: Node) -> bool:
        """Yes."""
        return True


PRODUCTS = Products()
