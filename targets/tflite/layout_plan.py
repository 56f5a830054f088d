"""One decision for the whole graph: the layout of each tensor.

Operators say what they can work on (`layout_rules`). Because a Transpose only renames axes, a Reshape only regroups
them, and most operators only need their axis numbers renamed, data moves solely where two demands really clash. Wishes
travel from readers to producers first, so that a model whose own input is NHWC keeps it; then every node in order takes
the arrangement that moves the fewest elements.

What nodes really took is a firmer wish than what they hoped for, so the decision is made again with those: a tensor
that is split into parts which all end in another order moves once, before it is split. The cheapest decision stands;
one without torn axes is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgeship.targets.base import IoLayout
from edgeship.targets.tflite.graph import Graph, Node, Tensor
from edgeship.targets.tflite.layout import Layout, channels_last, extents, move, natural, same_bytes

ROUNDS = 3
"""Decisions made again at most; they settle after one or two."""
OPERATOR = 1000.0
"""Elements that could be moved in the time that it takes to start an operator."""
RENAMED = 0.01
"""Where nothing but the shape changes."""
SCATTERED = 2.0
"""How much slower a TRANSPOSE is that copies single elements instead of runs of them."""
CUT = 1e-3
"""By what share each further axis of a TRANSPOSE makes it slower; it decides between moves of equal size."""


@dataclass(frozen=True)
class Arrangement:
    """How one node works: the layout it takes each input in (None: it sees to that constant itself), and makes each
    output in.
    """

    inputs: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True)
class View:
    """What a rule sees: the node, the layouts its computed inputs come in, those its outputs are wished in; `tears`
    says whether axes may lie torn.
    """

    node: Node
    incoming: tuple[Layout | None, ...]
    wished: tuple[Layout | None, ...]
    tears: bool = True


class LayoutRule(Protocol):
    """What an operator can work on."""

    def arrangements(self, view: View) -> list[Arrangement]:
        """The ways to run the node, the preferred first."""

    def wishes(self, node: Node, wished: tuple[Layout | None, ...]) -> tuple[Layout | None, ...]:
        """How the node would like each input, given how its outputs are wished."""

    def insists(self, node: Node) -> bool:
        """Whether the layouts that the node takes are its own need, and not what it is given."""


@dataclass(frozen=True)
class LayoutPlan:
    """The decision: each node's arrangement, each computed tensor's layout, and the graph outputs'; what it costs."""

    arrangements: dict[Node, Arrangement]
    layouts: dict[Tensor, Layout]
    outputs: dict[str, Layout]
    cost: float = 0.0


def decide(graph: Graph, rule_of: Callable[[Node], LayoutRule], io_layout: IoLayout | None) -> LayoutPlan:
    """The layouts of the whole graph."""
    deciding = _Deciding(graph, rule_of, io_layout)
    plans = [deciding.plan({}, tears=False)]
    if plans[0].cost < OPERATOR:  # nothing moves
        return plans[0]
    plans.append(deciding.plan({}, tears=True))
    for _ in range(ROUNDS):
        plans.append(deciding.plan(plans[-1].arrangements, tears=True))
        if plans[-1].arrangements == plans[-2].arrangements:
            break
    return min(plans, key=lambda plan: plan.cost)


@dataclass
class _Deciding:
    graph: Graph
    rule_of: Callable[[Node], LayoutRule]
    io_layout: IoLayout | None
    moves: dict[tuple[Tensor, Layout, Layout], float] = field(default_factory=dict)

    def plan(self, before: Mapping[Node, Arrangement], *, tears: bool) -> LayoutPlan:
        """A decision that takes the layouts that nodes took `before` for the wishes of those that insist on theirs."""
        graph = self.graph
        wishes = self._wishes(before)
        layouts = {tensor: self._at_input(tensor, wishes.get(tensor)) for tensor in graph.inputs.values()}
        arrangements: dict[Node, Arrangement] = {}
        paid: dict[tuple[Tensor, Layout], float] = {}
        for node in graph.nodes:
            incoming = tuple(layouts.get(t) if t is not None else None for t in node.inputs)
            wished = tuple(wishes.get(t) for t in node.outputs)
            options = self.rule_of(node).arrangements(View(node, incoming, wished, tears))
            best = options[0]
            if len(options) > 1:
                weight = 1.0 if before and len(node.outputs) > 1 else 0.5
                costs = [self._feeding(node, o, layouts) + weight * self._pleasing(node, o, wished) for o in options]
                best = options[costs.index(min(costs))]
            arrangements[node] = best
            for tensor, want in zip(node.inputs, best.inputs, strict=False):
                if tensor is not None and want is not None and tensor in layouts:
                    paid[tensor, want] = self._moved(tensor, layouts[tensor], want)
            layouts.update(zip(node.outputs, best.outputs, strict=True))
        outputs = {name: self._at_output(t, layouts.get(t)) for name, t in graph.outputs.items()}
        for name, tensor in graph.outputs.items():
            if tensor in layouts:
                paid[tensor, outputs[name]] = self._moved(tensor, layouts[tensor], outputs[name])
        return LayoutPlan(arrangements, layouts, outputs, sum(paid.values()))

    def _wishes(self, before: Mapping[Node, Arrangement]) -> dict[Tensor, Layout]:
        """The layout most readers of each tensor would like; the first reader's where they are even. One with torn axes
        only where all would.
        """
        votes: dict[Tensor, list[Layout]] = {}
        chosen: dict[Tensor, Layout] = {}

        def choose(tensor: Tensor) -> Layout | None:
            if tensor not in chosen and votes.get(tensor):
                ballot = [layout for layout in votes[tensor][::-1] if not layout.is_torn] or votes[tensor][::-1]
                chosen[tensor] = max(ballot, key=ballot.count)
            return chosen.get(tensor)

        for output in self.graph.outputs.values():
            votes.setdefault(output, []).append(_border(output.rank, self.io_layout))
        for node in reversed(self.graph.nodes):
            rule, wished = self.rule_of(node), tuple(choose(tensor) for tensor in node.outputs)
            firm = node in before and rule.insists(node)
            wanted = before[node].inputs if firm else rule.wishes(node, wished)
            for tensor, layout in zip(node.inputs, wanted, strict=False):
                if tensor is None or layout is None or tensor.is_constant:
                    continue
                if not layout.is_torn or layout.fits(extents(tensor)):
                    votes.setdefault(tensor, []).append(layout)
        for given in self.graph.inputs.values():
            choose(given)
        return chosen

    def _at_input(self, tensor: Tensor, wished: Layout | None) -> Layout:
        if self.io_layout is None and wished is not None and wished.is_natural:
            return wished
        return _border(tensor.rank, self.io_layout)

    def _at_output(self, tensor: Tensor, made: Layout | None) -> Layout:
        border = _border(tensor.rank, self.io_layout)
        return made if self.io_layout is None and made is not None and made.is_natural else border

    def _feeding(self, node: Node, option: Arrangement, layouts: Mapping[Tensor, Layout]) -> float:
        """What it costs to bring the node's inputs into the layouts it takes."""
        return sum(
            self._moved(tensor, layouts[tensor], want)
            for tensor, want in zip(node.inputs, option.inputs, strict=False)
            if tensor is not None and want is not None and tensor in layouts
        )

    def _pleasing(self, node: Node, option: Arrangement, wished: Sequence[Layout | None]) -> float:
        """What it would cost to bring the node's outputs into the layouts they are wished in."""
        return sum(
            self._moved(tensor, makes, wish)
            for tensor, makes, wish in zip(node.outputs, option.outputs, wished, strict=True)
            if wish is not None
        )

    def _moved(self, tensor: Tensor, have: Layout, want: Layout) -> float:
        if have == want:
            return 0.0
        key = (tensor, have, want)
        if key not in self.moves:
            self.moves[key] = _cost(tensor, have, want)
        return self.moves[key]


def _cost(tensor: Tensor, have: Layout, want: Layout) -> float:
    shape = extents(tensor)
    if same_bytes(have, want, shape):
        return RENAMED
    way = move(have, want, shape)
    if way is None:
        return float("inf")
    in_runs = way.permutation[-1] == len(way.permutation) - 1
    return OPERATOR + tensor.size * (1.0 if in_runs else SCATTERED) * (1 + CUT * len(way.shape))


def _border(rank: int, io_layout: IoLayout | None) -> Layout:
    return natural(rank) if io_layout == "nchw" or rank < 4 else channels_last(rank)
