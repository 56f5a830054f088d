"""Which nodes run on integers, decided from the graph's structure and the runtimes' rules alone.

A node is int8 when every runtime has a kernel for it. Five exceptions keep numbers where they are best:

- Post-processing. A connected group of nodes after the last multiply-accumulate (no MAC node on any path from it to
  an output) that holds an operator without int8 kernel stays float as a whole: requantizing decoded boxes between
  Slice and Exp would cost precision at the very outputs and save nothing. The boundary is where integers stop costing
  nothing: operators that only move the values of one MAC node (Transpose, Reshape, Slice) keep that node's scale,
  lose nothing and move a quarter of the bytes, so they stay int8. An operator that joins several (Concat) is float
  there: in int8 it would press all heads into one scale.
- What a float operator divides by, or takes the logarithm of, stays float, and so do the sums and moves it comes from:
  in steps, small numbers are 0 (linear attention divides by sums that are small for many queries).
- The factors and terms that follow a float normalization are its own: rounding between them would only cost precision.
- Moving values between float operators needs no integers.
- A Relu or Clip that alone follows an int8 node lives in that node's output range and needs no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import (
    ACTIVATION_OPERATORS,
    MAC_OPERATORS,
    activation_bounds,
    activation_inputs,
    data_inputs,
    float_outputs,
    is_float,
    node_key,
    value_name,
    why_not_layer,
)
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.types import QuantRules


@dataclass(frozen=True)
class Selection:
    """`int8`: the nodes that run on integers, in graph order. `reasons`: why each other node does not.

    `folds`: name of an int8 node's output -> the Relu or Clip that alone reads it.
    """

    int8: tuple[ir.Node, ...]
    reasons: Mapping[ir.Node, str]
    folds: Mapping[str, ir.Node]

    def without(self, refused: Mapping[ir.Node, str], rules: QuantRules) -> Selection:
        """The same selection with the `refused` nodes in float, and what then only moves float values."""
        reasons = {**self.reasons, **refused}
        nodes = [node for node in self.int8 if node not in refused]
        _release_idle_moves(nodes, reasons, self.folds, rules)
        return Selection(tuple(node for node in nodes if node not in reasons), reasons, self.folds)


def select(model: ir.Model, rules: QuantRules) -> Selection:
    """The nodes of a float graph that run on integers under `rules`.

    Raises InputError for a model that is quantized already, or when no node can be int8 (with every reason).
    """
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    _check_graph(model, nodes)
    reasons = {node: reason for node in nodes if (reason := _why_float(node, rules)) is not None}
    folds = _foldable(nodes, reasons, rules)
    for activation in folds.values():
        reasons.pop(activation, None)
    int8 = [node for node in nodes if node not in reasons]
    _release_tails(nodes, reasons, folds, rules)
    _release_divisors(nodes, reasons, rules)
    _release_affine(nodes, reasons, rules)
    _release_idle_moves(int8, reasons, folds, rules)
    folds = {name: node for name, node in folds.items() if node not in reasons}
    chosen = tuple(node for node in int8 if node not in reasons)
    if not chosen:
        listed = "; ".join(f"{node_key(n)} ({n.op_type}): {reason}" for n, reason in list(reasons.items())[:10])
        raise InputError(
            f"no node of the model can be int8 under the rules of {rules.name}: {listed or 'it has no nodes'}"
        )
    return Selection(chosen, reasons, folds)


def moves(node: ir.Node, rules: QuantRules) -> bool:
    """Whether the node's int8 kernel needs one scale for its inputs and outputs."""
    rule = rules.operators.get(node.op_type)
    return rule is not None and rule.shares_scale and not rule.rescales(node)


def _check_graph(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    seen: set[str] = set()
    for node in nodes:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "QLinearMatMul"}:
            raise InputError(
                f"the model is quantized already: node {node_key(node)} is a {node.op_type}; accepted: a float model"
            )
        if node_key(node) in seen:
            raise InputError(f"two nodes are called {node_key(node)}; run `edgeship simplify` on the model first")
        seen.add(node_key(node))
    if model.opset_imports.get("", 0) < 13:
        raise InputError(
            f"the model has opset {model.opset_imports.get('', 0)}; per-channel DequantizeLinear needs 13 or newer: "
            "run `edgeship simplify` on the model first"
        )


def _why_float(node: ir.Node, rules: QuantRules) -> str | None:
    if node.domain not in {"", "ai.onnx"}:
        return f"{node.domain}.{node.op_type} is not a standard ONNX operator"
    rule = rules.operators.get(node.op_type)
    if rule is None:
        return f"no int8 {node.op_type} kernel in {rules.name}"
    return _why_not_values(node) or (why_not_layer(node) if node.op_type in MAC_OPERATORS else None) or rule.check(node)


def _why_not_values(node: ir.Node) -> str | None:
    if any(attr.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for attr in node.attributes.values()):
        return f"{node.op_type} holds a subgraph"
    values = [value for _, value in data_inputs(node)] + float_outputs(node)
    other = sorted({str(v.dtype) for v in values if v.dtype is not None and v.dtype != ir.DataType.FLOAT})
    if other:
        return f"it works on {', '.join(other)}, not FLOAT"
    if not activation_inputs(node) or not float_outputs(node):
        return "it computes no float values from the model's inputs"
    return None


def _foldable(nodes: Iterable[ir.Node], reasons: Mapping[ir.Node, str], rules: QuantRules) -> dict[str, ir.Node]:
    folds: dict[str, ir.Node] = {}
    taken: set[ir.Node] = set()
    for node in nodes:
        rule = rules.operators.get(node.op_type)
        if node in reasons or node in taken or rule is None or moves(node, rules) or rule.fixed_output:
            continue
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        uses = list(node.outputs[0].uses())
        if len(uses) != 1:
            continue
        reader, index = uses[0]
        if reader.op_type in ACTIVATION_OPERATORS and index == 0 and reader.graph is node.graph:
            bounds = activation_bounds(reader)
            if bounds is not None and bounds[0] <= 0.0 <= bounds[1]:
                folds[value_name(node.outputs[0])] = reader
                taken.add(reader)
    return folds


def _release_tails(
    nodes: list[ir.Node], reasons: dict[ir.Node, str], folds: Mapping[str, ir.Node], rules: QuantRules
) -> None:
    tail = _after_macs(nodes, folds)
    components = Groups[ir.Node]()
    for node in tail:
        components.add(node)
        for reader in readers(node):
            if reader in tail:
                components.join(node, reader)
    for members in components.members():
        blockers = [node for node in members if node in reasons and any(is_float(v) for v in node.outputs)]
        if not blockers:
            continue
        names = sorted({node.op_type for node in blockers})
        kept: set[ir.Node] = set()
        for node in members:
            sources = activation_inputs(node)
            if node not in reasons and moves(node, rules) and len(sources) == 1:
                producer = sources[0].producer()
                if producer is not None and (producer in kept or (producer not in tail and producer not in reasons)):
                    kept.add(node)
                    continue
            reasons.setdefault(
                node, f"post-processing with {', '.join(names)}, which has no int8 kernel, stays float as a whole"
            )


def _after_macs(nodes: list[ir.Node], folds: Mapping[str, ir.Node]) -> dict[ir.Node, None]:
    """The nodes from which no MAC node can be reached but which a MAC node reaches, in graph order."""
    before: set[ir.Node] = set()
    for node in reversed(nodes):
        if node.op_type in MAC_OPERATORS or any(reader in before for reader in readers(node)):
            before.add(node)
    after: set[ir.Node] = set()
    for node in nodes:
        if any(p.op_type in MAC_OPERATORS or p in after for v in node.inputs if v is not None and (p := v.producer())):
            after.add(node)
    folded_into_mac = {
        reader for name, reader in folds.items() if (p := _producer_of_input(reader)) and p.op_type in MAC_OPERATORS
    }
    return {node: None for node in nodes if node in after and node not in before and node not in folded_into_mac}


def _producer_of_input(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None


_DIVISORS = {"Div": 1, "Reciprocal": 0, "Log": 0}
"""Operators that make small numbers matter, and the input where."""


def _release_divisors(nodes: list[ir.Node], reasons: dict[ir.Node, str], rules: QuantRules) -> None:
    for node in nodes:
        place = _DIVISORS.get(node.op_type)
        divisor = None if place is None or node not in reasons else node.inputs[place]
        for maker in [] if divisor is None else _makers_of_small_numbers(divisor, rules):
            reasons.setdefault(maker, f"{node_key(node)} ({node.op_type}) is float, and small numbers matter to it")


def _makers_of_small_numbers(value: ir.Value, rules: QuantRules) -> Iterable[ir.Node]:
    """What makes the value, and as far back as it is small where an input is: through moves, roots and powers.

    A sum is small without that; where it is one of powers, those are made in float too. What a multiply-accumulate
    makes has the steps that it has.
    """
    waiting, found = [value], dict[ir.Node, None]()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in found or node.op_type in MAC_OPERATORS:
            continue
        found[node] = None
        inputs = activation_inputs(node)
        if node.op_type.startswith("Reduce"):
            makers = (maker for each in inputs if (maker := each.producer()))
            found.update((maker, None) for maker in makers if _is_of_one(maker, "Mul", "Pow"))
        elif (
            moves(node, rules)
            or node.op_type in {"Abs", "Clip", "Neg", "Pow", "Sqrt"}
            or _is_of_one(node, "Add", "Max", "Mul", "Sub")
        ):
            waiting += inputs
    return found


def _is_of_one(node: ir.Node, *operators: str) -> bool:
    return node.op_type in operators and len(set(activation_inputs(node))) == 1


_NORMALIZATIONS = frozenset({
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "RMSNormalization",
})  # fmt: skip


def _release_affine(nodes: list[ir.Node], reasons: dict[ir.Node, str], rules: QuantRules) -> None:
    """What a normalization's result alone is moved to, multiplied by and added to, up to the last such operator."""
    for node in nodes:
        if node.op_type not in _NORMALIZATIONS or node not in reasons:
            continue
        chain: list[ir.Node] = []
        value = node.outputs[0]
        while not value.is_graph_output() and len(uses := list(value.uses())) == 1:
            reader = uses[0][0]
            if len(activation_inputs(reader)) != 1 or not (moves(reader, rules) or reader.op_type in {"Add", "Mul"}):
                break
            chain.append(reader)
            value = reader.outputs[0]
        while chain and moves(chain[-1], rules):
            chain.pop()
        for reader in chain:
            reasons.setdefault(reader, f"it is a part of {node_key(node)} ({node.op_type}), which is float")


def _release_idle_moves(
    int8: list[ir.Node], reasons: dict[ir.Node, str], folds: Mapping[str, ir.Node], rules: QuantRules
) -> None:
    folded = set(folds.values())
    groups = Groups[str]()
    anchored: set[str] = set()
    for node in int8:
        if node in reasons:
            continue
        names = [value_name(v) for v in (*activation_inputs(node), *float_outputs(node))]
        for name in names:
            groups.add(name)
        if moves(node, rules) and node not in folded:
            for name in names[1:]:
                groups.join(names[0], name)
        else:
            anchored.update(names)
    roots = {groups.root(name) for name in anchored}
    for node in int8:
        if node in reasons or node in folded or not moves(node, rules):
            continue
        if groups.root(value_name(node.outputs[0])) not in roots:
            reasons[node] = "it only moves values between float operators"


def readers(node: ir.Node) -> list[ir.Node]:
    """The nodes that read any output of `node`."""
    return [reader for value in node.outputs for reader, _ in value.uses()]


def reaches(start: ir.Node, found: Callable[[ir.Node], bool]) -> bool:
    """Whether any node after `start` satisfies `found`."""
    waiting, seen = list(readers(start)), set[ir.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if found(node):
            return True
        waiting.extend(readers(node))
    return False
