"""What the user wants of single tensors, by pattern, made into rules and observers.

`[[quantize.override]]` names tensors (or nodes, to keep them float) with a glob (`*`, `?`, `[abc]`) and says one thing
of them: another range algorithm, a fixed range, or that they stay float. Of several overrides the last that matches
wins. A pattern that matches nothing is an error: a typo would otherwise change nothing, silently.

Where no override says otherwise, tensors that no multiply-accumulate node reads any more (the logits, boxes and scores)
keep their min-max range: clipping the logits costs points, since it is the largest values that decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from edgeship.calibration import algorithms
from edgeship.calibration.errors import InputError, nearest
from edgeship.calibration.operators import MAC_OPERATORS, node_key, value_name
from edgeship.calibration.plan import tensors_to_observe
from edgeship.calibration.selection import readers, select
from edgeship.calibration.types import Array, Observer, OperatorRule, QuantRules

SPARED = "minmax"
"""The algorithm of the tensors that are never clipped by default."""


@dataclass(frozen=True)
class Override:
    """One wish for the tensors (or nodes, with `stays_float`) that match `pattern`; exactly one of the three is set."""

    pattern: str
    algorithm: str | None = None
    stays_float: bool = False
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.algorithm is not None) + self.stays_float + (self.range is not None) != 1:
            raise InputError(
                f"the override of {self.pattern!r} must say exactly one of: an algorithm, float = true, a range"
            )
        if self.range is not None and not self.range[0] <= 0 <= self.range[1] > self.range[0]:
            raise InputError(
                f"the override of {self.pattern!r} has the range {list(self.range)}; accepted: [low, high] with "
                "low <= 0 <= high and low < high, since zero must be representable"
            )


class Pinned:
    """An observer that represents a given range, whatever it sees."""

    def __init__(self, low: float, high: float) -> None:
        self._range = (low, high)

    def update(self, values: Array) -> None:
        """Nothing changes."""

    def merge(self, other: Observer) -> None:
        """Nothing changes."""

    def range(self) -> tuple[float, float]:
        """The given range."""
        return self._range


def rules_with_floats(model: ir.Model, rules: QuantRules, overrides: Sequence[Override]) -> QuantRules:
    """The rules under which the nodes that `overrides` keep float are float. Raises InputError for a pattern in vain.

    A node matches by its own name or by that of a tensor it makes. A Relu or Clip and the node whose range it lives in
    go together.
    """
    wanted = [each for each in overrides if each.stays_float]
    if not wanted:
        return rules
    together: dict[ir.Node, tuple[ir.Node, ...]] = {}
    for activation in select(model, rules).folds.values():
        source = activation.inputs[0].producer() if activation.inputs[0] is not None else None
        if source is not None:
            together[activation] = together[source] = (source, activation)
    reasons: dict[str, str] = {}
    for override in wanted:
        names = {node_key(node): node for node in model.graph}
        names |= {value_name(value): node for node in model.graph for value in node.outputs if value.name}
        found = [node for name, node in names.items() if fnmatchcase(name, override.pattern)]
        if not found:
            raise _in_vain(override, names, "tensor or node")
        for node in found:
            for each in together.get(node, (node,)):
                reasons[node_key(each)] = f"the recipe keeps {override.pattern!r} float"
    return replace(rules, operators={name: _checked(rule, reasons) for name, rule in rules.operators.items()})


def _checked(rule: OperatorRule, reasons: Mapping[str, str]) -> OperatorRule:
    return replace(rule, check=lambda node: reasons.get(node_key(node)) or rule.check(node))


def make_observers(
    model: ir.Model, rules: QuantRules, algorithm: str, overrides: Sequence[Override] = ()
) -> dict[str, Observer]:
    """A new observer for each tensor that has a range of its own, by name.

    Raises InputError for an unknown algorithm or a pattern in vain.
    """
    names = tensors_to_observe(model, rules)
    usual, spared = algorithms.load(algorithm), algorithms.load(SPARED)
    last = _after_the_last_layer(model)
    makers: dict[str, Callable[[], Observer]] = {name: spared if name in last else usual for name in names}
    folded = {name: value_name(node.outputs[0]) for name, node in select(model, rules).folds.items()}
    known = {**{name: name for name in names}, **folded}
    for override in overrides:
        if override.stays_float:
            continue
        targets = [target for name, target in known.items() if fnmatchcase(name, override.pattern)]
        if not targets:
            raise _in_vain(override, known, "tensor with a range of its own")
        for target in targets:
            makers[target] = _maker(override)
    return {name: make() for name, make in makers.items()}


def _maker(override: Override) -> Callable[[], Observer]:
    if override.range is not None:
        low, high = override.range
        return lambda: Pinned(low, high)
    return algorithms.load(override.algorithm or SPARED)


def _after_the_last_layer(model: ir.Model) -> set[str]:
    """The tensors from which no multiply-accumulate node is reached."""
    before: set[ir.Node] = set()
    after: set[str] = set()
    for node in reversed(list(model.graph)):
        if any(reader.op_type in MAC_OPERATORS or reader in before for reader in readers(node)):
            before.add(node)
        else:
            after.update(value_name(value) for value in node.outputs if value.name)
    return after


def _in_vain(override: Override, known: Mapping[str, object], what: str) -> InputError:
    return InputError(
        f"quantize.override: the pattern {override.pattern!r} matches no {what}{nearest(override.pattern, known)}"
    )
