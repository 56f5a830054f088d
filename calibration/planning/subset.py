"""A complete plan -> one that quantizes a few nodes only: what these nodes alone cost is then measurable."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    activation_inputs,
    constant_key,
    float_outputs,
    node_key,
    value_name,
)
from edgeship.calibration.types import QuantPlan


def layers_of(model: ir.Model, plan: QuantPlan) -> dict[str, ir.Node]:
    """The multiply-accumulate nodes that run in integers, by name in graph order: what one reverts or improves."""
    int8 = set(plan.int8_nodes)
    return {node_key(node): node for node in model.graph if node.op_type in MAC_OPERATORS and node_key(node) in int8}


def restricted(model: ir.Model, plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
    """The plan with only `nodes` in integers, each with its inputs, weights, bias, and the output it lives in."""
    chosen = [node for node in model.graph if node_key(node) in nodes]
    names: set[str] = set()
    keys: set[str] = set()
    folded: dict[str, str] = {}
    for node in chosen:
        names |= {value_name(value) for value in activation_inputs(node)}
        for value in float_outputs(node):
            name = value_name(value)
            if name in plan.folded:
                folded[name] = plan.folded[name]
            names.add(plan.folded.get(name, name))
        for index, source in enumerate(node.inputs):
            if source is not None and source.name:
                keys |= {source.name, constant_key(node, index, source)}
    return replace(
        plan,
        activations={name: params for name, params in plan.activations.items() if name in names},
        weights={key: constant for key, constant in plan.weights.items() if key in keys},
        biases={key: bias for key, bias in plan.biases.items() if key in nodes},
        folded=folded,
        stays_float={},
        float_nodes={},
        int8_nodes=tuple(key for key in plan.int8_nodes if key in nodes),
        wide_nodes=tuple(key for key in plan.wide_nodes if key in nodes),
        recast={name: params for name, params in plan.recast.items() if name in names},
    )
