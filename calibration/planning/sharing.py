"""Which tensors have one scale, and which: groups of tensors and the parameters of each group.

An operator whose int8 kernel moves or averages integers (Concat, MaxPool, Reshape ...) joins its inputs and output
into one group. A group's range is the union of its members' ranges; a kernel's fixed output (Softmax: 1/256, -128)
fixes its group. Where a kernel wants the zero point 0, its group has it, at the cost of less than one bit.

An operator is refused, and stays float with both sides keeping their own scales, where it would join

- a fixed output with values that do not fit its range (they would saturate), or two different fixed outputs;
- on the way to the outputs, ranges more than 16 times apart: boxes in pixels and scores in 0..1 under one scale leave
  the scores fewer than 4 bits. Before an int8 reader one scale is needed anyway, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import (
    HULL_OPERATORS,
    activation_inputs,
    constant_array,
    constant_operands,
    data_inputs,
    float_outputs,
    value_name,
)
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.planning.selection import Selection, moves, reaches
from edgeship.calibration.types import FixedOutput, QuantParams, QuantRules
from edgeship.calibration.values.ranges import Range, around_zero, choose, fixed, range_of, representable, union

MOST_UNEQUAL = 16.0
"""Joining ranges further apart than this leaves the narrower one fewer than 4 of 8 bits."""


def quantized_values(node: ir.Node, selection: Selection) -> list[ir.Value]:
    """The values that have their own parameters because `node` is int8: a folded output stands for its activation's."""
    outputs = [
        selection.folds[value_name(v)].outputs[0] if v.name in selection.folds else v for v in float_outputs(node)
    ]
    inputs = [v for v in activation_inputs(node) if v.name not in selection.folds]
    return [*inputs, *outputs]


@dataclass(frozen=True)
class _Demand:
    """What a group of tensors asks for: a kernel's fixed output, or a range."""

    fixed: FixedOutput | None
    range: Range


def share_scales(
    selection: Selection, rules: QuantRules, seen: Mapping[str, Range]
) -> tuple[Groups[str], dict[ir.Node, str]]:
    """The groups of tensors with one scale, and the nodes that cannot join theirs, each with the reason."""
    groups = Groups[str]()
    demands: dict[str, _Demand] = {}
    refused: dict[ir.Node, str] = {}
    folded = set(selection.folds.values())
    int8 = set(selection.int8)
    for node in selection.int8:
        names = [value_name(value) for value in quantized_values(node, selection)]
        for value in quantized_values(node, selection):
            if (name := value_name(value)) not in demands:
                groups.add(name)
                demands[name] = _own_demand(value, int8, rules, seen)
        if not moves(node, rules) or node in folded:
            continue
        roots = {groups.root(name): None for name in names}
        parts = [demands[root] for root in roots]
        reason = _conflict(node, parts, rules) or _too_unequal(node, parts, int8, rules)
        if reason:
            refused[node] = reason
            continue
        joined = _Demand(next((part.fixed for part in parts if part.fixed), None), union(part.range for part in parts))
        for name in names[1:]:
            groups.join(names[0], name)
        demands[groups.root(names[0])] = joined
    return groups, refused


def _own_demand(value: ir.Value, int8: set[ir.Node], rules: QuantRules, seen: Mapping[str, Range]) -> _Demand:
    producer = value.producer()
    if producer is not None and producer in int8:
        rule = rules.operators.get(producer.op_type)
        if rule is not None and rule.fixed_output:
            return _Demand(rule.fixed_output, Range())
    return _Demand(None, _range(value, seen))


def _range(value: ir.Value, seen: Mapping[str, Range]) -> Range:
    """The observed range, or for an operator that only moves or averages values the union of its inputs' ranges."""
    if value.name in seen:
        return seen[value_name(value)]
    array = constant_array(value)
    if array is not None:
        return range_of(array)
    producer = value.producer()
    if producer is None or producer.op_type not in HULL_OPERATORS:
        return Range()
    return union([*(_range(source, seen) for _, source in data_inputs(producer)), _padding(producer)])


def _padding(node: ir.Node) -> Range:
    """The range of a Pad's constant."""
    if node.op_type != "Pad" or len(node.inputs) < 3:
        return Range()
    array = constant_array(node.inputs[2])
    return Range() if array is None else range_of(array)


def _conflict(node: ir.Node, parts: Sequence[_Demand], rules: QuantRules) -> str | None:
    demanded = {part.fixed for part in parts if part.fixed}
    if not demanded:
        return None
    if len(demanded) > 1:
        steps = ", ".join(f"{d.scale:.6g}" for d in sorted(demanded, key=lambda d: d.scale))
        return f"{node.op_type} joins outputs with the different fixed scales {steps}"
    (demand,) = demanded
    allowed = representable(fixed(demand, rules.activation))
    for part in parts:
        if part.fixed is None and not part.range.within(allowed, demand.scale):
            return (
                f"{node.op_type} joins an output with the fixed range [{allowed.low:.6g}, {allowed.high:.6g}] "
                f"and values in [{part.range.low:.6g}, {part.range.high:.6g}]"
            )
    return None


def _too_unequal(node: ir.Node, parts: Sequence[_Demand], int8: set[ir.Node], rules: QuantRules) -> str | None:
    spans = [part.range.span for part in parts if not part.fixed and not part.range.is_nothing]
    if len(spans) < 2 or max(spans) <= MOST_UNEQUAL * min(spans):
        return None
    if reaches(node, lambda reader: reader in int8 and not moves(reader, rules)):
        return None  # an int8 reader needs one scale for the joined tensor anyway
    return f"{node.op_type} joins ranges of {min(spans):.6g} and {max(spans):.6g} on the way to the outputs"


def group_params(
    selection: Selection,
    rules: QuantRules,
    groups: Groups[str],
    seen: Mapping[str, Range],
    pinned: Collection[str] = (),
) -> dict[str, QuantParams]:
    """The parameters of each group, by its root; `pinned`: tensors whose very parameters the user chose."""
    ranges: dict[str, list[Range]] = {}
    demanded: dict[str, FixedOutput] = {}
    centred: set[str] = set()
    int8 = set(selection.int8)
    for node in selection.int8:
        for value in quantized_values(node, selection):
            root = groups.root(value_name(value))
            demand = _own_demand(value, int8, rules, seen)
            if demand.fixed:
                demanded[root] = demand.fixed
            elif value.name not in seen and not _derivable(value):
                raise StageError(
                    f"tensor {value.name} was not observed; make_plan needs every tensor of tensors_to_observe"
                )
            ranges.setdefault(root, []).append(demand.range)
            if _wants_zero(value, rules):
                centred.add(root)
        if moves(node, rules):
            root = groups.root(value_name(float_outputs(node)[0]))
            ranges[root] += [range_of(array) for _, _, array in constant_operands(node)]
            ranges[root].append(_padding(node))
    centred -= {groups.root(name) for name in pinned if name in groups}
    return {
        root: fixed(demanded[root], rules.activation)
        if root in demanded
        else (around_zero if root in centred else choose)(union(every), rules.activation)
        for root, every in ranges.items()
    }


def _wants_zero(value: ir.Value, rules: QuantRules) -> bool:
    """Whether a kernel that reads the value wants its zero point to be 0."""
    readers = [(rules.operators.get(node.op_type), index) for node, index in value.uses()]
    return any(rule is not None and index in rule.symmetric for rule, index in readers)


def _derivable(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in HULL_OPERATORS
