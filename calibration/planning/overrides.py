"""What the user wants of single tensors, by pattern, made into rules and observers.

`[[quantize.override]]` names tensors or nodes with a glob (`*`, `?`, `[abc]`) and says one thing of them: another
range algorithm (of activations or of weights), a fixed range, a fixed scale, that they stay float, or that they compute
on 16-bit activations. Of several overrides the last that matches wins (what a tensor's numbers are and how a node runs
are chosen apart). A pattern that matches nothing is an error: a typo would otherwise change nothing, silently.

Where no override says otherwise, tensors that no multiply-accumulate node reads any more (the logits, boxes and scores)
keep their min-max range: clipping the logits costs points, since it is the largest values that decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from edgeship.calibration import algorithms
from edgeship.calibration.errors import InputError, nearest
from edgeship.calibration.graph.operators import MAC_OPERATORS, node_key, read_layer, value_name
from edgeship.calibration.planning.pinned import Pinned, pinned_scale
from edgeship.calibration.planning.plan import tensors_to_observe
from edgeship.calibration.planning.selection import readers, select
from edgeship.calibration.types import Observer, OperatorRule, QuantPlan, QuantRules

ONE_OF = "an algorithm, a weight_algorithm, float = true, a range, a scale, int16 = true"
SPARED = "minmax"
"""The algorithm of the tensors that are never clipped by default."""
OF_STREAMS = frozenset({"moving_average"})
"""Algorithms that look at how values change from sample to sample."""


@dataclass(frozen=True)
class Override:
    """One wish for the tensors (or nodes) that match `pattern`: exactly one of the fields after it is set.

    `weight_algorithm`: what chooses the range of the weights of matching layers. `range`: [low, high] to represent.
    `scale`: the quantization step itself, with `zero_point` (0 where not given). `wide`: activations of 16 bits around
    the matching nodes. `reason`: why, where not because the recipe says so.
    """

    pattern: str
    algorithm: str | None = None
    stays_float: bool = False
    range: tuple[float, float] | None = None
    scale: float | None = None
    zero_point: int | None = None
    wide: bool = False
    weight_algorithm: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        wishes = (self.algorithm, self.weight_algorithm, self.range, self.scale)
        if sum(wish is not None for wish in wishes) + self.stays_float + self.wide != 1:
            raise InputError(f"the override of {self.pattern!r} must say exactly one of: {ONE_OF}")
        if self.range is not None and not self.range[0] <= 0 <= self.range[1] > self.range[0]:
            raise InputError(
                f"the override of {self.pattern!r} has the range {list(self.range)}; accepted: [low, high] with "
                "low <= 0 <= high and low < high, since zero must be representable"
            )
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(
                f"the override of {self.pattern!r} has the scale {self.scale}; accepted: a positive finite number"
            )
        if self.zero_point is not None and (self.scale is None or not -128 <= self.zero_point <= 127):
            raise InputError(
                f"the override of {self.pattern!r} has the zero point {self.zero_point}; accepted: -128 .. 127, beside "
                "a scale"
            )

    @property
    def is_of_activations(self) -> bool:
        """Whether it says which numbers an activation has, and not how nodes run or what weights have."""
        return not (self.stays_float or self.wide or self.weight_algorithm)


def rules_with_floats(model: ir.Model, rules: QuantRules, overrides: Sequence[Override]) -> QuantRules:
    """The rules under which the nodes that `overrides` keep float are float. Raises InputError for a pattern in vain.

    A node matches by its own name, by that of a tensor it makes, or by that of its weights. A Relu or Clip and the
    node whose range it lives in go together.
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
        for node in matching_nodes(model, override):
            for each in together.get(node, (node,)):
                reasons[node_key(each)] = kept_by(override)
    return rules_without(rules, reasons)


def rules_without(rules: QuantRules, reasons: Mapping[str, str]) -> QuantRules:
    """The rules under which the nodes called as the keys of `reasons` stay float."""
    return replace(rules, operators={name: _checked(rule, reasons) for name, rule in rules.operators.items()})


def kept_by(override: Override) -> str:
    """Why a node that the override matches stays float."""
    return override.reason or f"the recipe keeps {override.pattern!r} float"


def matching_nodes(model: ir.Model, override: Override) -> list[ir.Node]:
    """The nodes that the pattern names: by their own name, a tensor they make, or a layer's weights.

    Raises InputError for none.
    """
    called: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        values = [*node.outputs, *(node.inputs[1:2] if node.op_type in MAC_OPERATORS else ())]
        for name in {node_key(node), *(value.name for value in values if value is not None and value.name)}:
            called.setdefault(name, []).append(node)
    found = {node for name, nodes in called.items() if fnmatchcase(name, override.pattern) for node in nodes}
    if not found:
        raise _in_vain(override, called, "tensor, node or weights")
    return [node for node in model.graph if node in found]


def wide_nodes(model: ir.Model, plan: QuantPlan, overrides: Sequence[Override]) -> set[str]:
    """The integer nodes of `plan` whose activations `overrides` want in 16 bits.

    Raises InputError for a wish in vain.
    """
    folded = set(plan.folded.values())
    wanted: set[str] = set()
    for override in (each for each in overrides if each.wide):
        found = matching_nodes(model, override)
        integer = {
            node_key(node)
            for node in found
            if node_key(node) in plan.int8_nodes or any(value.name in folded for value in node.outputs)
        }
        if not integer:
            reasons = [plan.stays_float[str(v.name)] for n in found for v in n.outputs if v.name in plan.stays_float]
            raise InputError(
                f"quantize.override: {override.pattern!r} cannot be int16: it stays float"
                f"{': ' + reasons[0] if reasons else ''}"
            )
        wanted |= integer
    return wanted


def check_scales(plan: QuantPlan, overrides: Sequence[Override]) -> None:
    """Raises InputError where a tensor did not get the scale that an override pins, since it shares another's."""
    for name, params in plan.activations.items():
        last = [each for each in overrides if each.is_of_activations and fnmatchcase(name, each.pattern)]
        wanted = last[-1].scale if last else None
        if wanted is not None and params.scale != np.float32(wanted):
            raise InputError(
                f"quantize.override: tensor {name} cannot have the scale {wanted:g}: a kernel makes it share the scale "
                f"{float(params.scale):g} with other tensors; accepted: that one, or an override of all of them"
            )


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
    for name, override in _of_activations(model, rules, names, overrides).items():
        makers[name] = _maker(override, rules)
    return {name: make() for name, make in makers.items()}


def given_ranges(model: ir.Model, rules: QuantRules, overrides: Sequence[Override]) -> set[str]:
    """The tensors whose range or scale `overrides` say, so that nothing else may choose it."""
    names = tensors_to_observe(model, rules) if overrides else []
    wishes = _of_activations(model, rules, names, overrides)
    return {name for name, override in wishes.items() if override.range is not None or override.scale is not None}


def _of_activations(
    model: ir.Model, rules: QuantRules, names: Sequence[str], overrides: Sequence[Override]
) -> dict[str, Override]:
    """The last override of each tensor in `names` that has one: of its own name, or of one that lives in its range."""
    wishes = [override for override in overrides if override.is_of_activations]
    folds = select(model, rules).folds if wishes else {}
    known = {**{name: name for name in names}, **{name: value_name(node.outputs[0]) for name, node in folds.items()}}
    found: dict[str, Override] = {}
    for override in wishes:
        targets = [target for name, target in known.items() if fnmatchcase(name, override.pattern)]
        if not targets:
            raise _in_vain(override, known, "tensor with a range of its own")
        found.update(dict.fromkeys(targets, override))
    return found


def weight_observers(
    model: ir.Model, rules: QuantRules, algorithm: str, overrides: Sequence[Override] = ()
) -> dict[str, algorithms.ObserverFactory]:
    """What chooses the range of a weight tensor, by initializer name; weights that are represented whole are left out.

    A pattern names a layer, by node name, or its weights. Raises InputError for an unknown algorithm, one that means
    nothing for weights, or a pattern in vain.
    """
    if of_weights(algorithm) is None and all(override.weight_algorithm is None for override in overrides):
        return {}
    layers = [node for node in select(model, rules).int8 if node.op_type in MAC_OPERATORS]
    weights = {node: value_name(read_layer(node).weight_value) for node in layers}
    known = {name: weights[node] for node in layers for name in (node_key(node), weights[node])}
    chosen = dict.fromkeys(known.values(), of_weights(algorithm))
    for override in overrides:
        if override.weight_algorithm is None:
            continue
        targets = [target for name, target in known.items() if fnmatchcase(name, override.pattern)]
        if not targets:
            raise _in_vain(override, known, "layer or weights")
        chosen |= dict.fromkeys(targets, of_weights(override.weight_algorithm))
    return {name: factory for name, factory in chosen.items() if factory is not None}


def weight_algorithms() -> list[str]:
    """The range algorithms that mean something for weights, sorted."""
    return [name for name in algorithms.names() if name not in OF_STREAMS]


def of_weights(algorithm: str) -> algorithms.ObserverFactory | None:
    """The algorithm's observers; None for the one that represents everything."""
    if algorithm in OF_STREAMS:
        raise InputError(
            f"weight_algorithm {algorithm!r} averages over samples, and weights have none; accepted: "
            f"{', '.join(weight_algorithms())}"
        )
    if algorithm not in weight_algorithms():
        raise InputError(f"unknown range algorithm of weights {algorithm!r}{nearest(algorithm, weight_algorithms())}")
    return None if algorithm == SPARED else algorithms.load(algorithm)


def _maker(override: Override, rules: QuantRules) -> Callable[[], Observer]:
    if override.range is not None:
        low, high = override.range
        return lambda: Pinned(low, high)
    if override.scale is not None:
        scale, zero_point = override.scale, override.zero_point or 0
        return lambda: pinned_scale(scale, zero_point, rules.activation)
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
