"""Float graph + rules + observed ranges -> QuantPlan: every number of the quantized model, before the model is touched.

1. `selection.select` says which nodes are int8 (structure and rules only).
2. `sharing` says which tensors have one scale, and its value; `input_grid`, `clear_scales` and `reciprocal` move it a
   little where runtimes would round differently.
3. A Relu or Clip that lives in its producer's output range is folded where the parameters provably do its work.
   Otherwise (its group also holds negative values) it stays a node, and its input gets its output's parameters: the
   kernel then only cuts integers, and what it would cut may saturate.
4. `weights` turns constants into integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from edgeship.calibration.algorithms import ObserverFactory
from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import (
    HULL_OPERATORS,
    MAC_OPERATORS,
    Layer,
    activation_bounds,
    activation_inputs,
    constant_array,
    constant_key,
    constant_operands,
    float_outputs,
    is_float,
    node_key,
    read_layer,
    value_name,
)
from edgeship.calibration.planning.clear_scales import clear_scales, operand_params
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.planning.input_grid import image_input_params
from edgeship.calibration.planning.pinned import Pinned
from edgeship.calibration.planning.reciprocal import clear_reciprocals
from edgeship.calibration.planning.selection import Selection, moves, select
from edgeship.calibration.planning.sharing import group_params, quantized_values, share_scales
from edgeship.calibration.planning.weights import quantize_bias, weight_params
from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.calibration.types import Array, Observer, QuantizedConstant, QuantParams, QuantPlan, QuantRules
from edgeship.calibration.values.ranges import Range, representable


def tensors_to_observe(model: ir.Model, rules: QuantRules) -> list[str]:
    """The names of the tensors whose ranges `make_plan` needs, in graph order.

    Left out are tensors with a fixed output scale, those folded away, and those whose values are other observed
    tensors' values (the output of a Reshape, a MaxPool, a Concat).
    """
    selection = select(model, rules)
    names: dict[str, None] = {}
    int8 = set(selection.int8)
    for node in selection.int8:
        for value in quantized_values(node, selection):
            producer = value.producer()
            if producer is not None and producer in int8:
                rule = rules.operators.get(producer.op_type)
                if rule is not None and rule.fixed_output:
                    continue
                if moves(producer, rules) and producer.op_type in HULL_OPERATORS:
                    continue
            names[value_name(value)] = None
    return list(names)


def make_plan(
    model: ir.Model,
    rules: QuantRules,
    observers: Mapping[str, Observer],
    of_weights: Mapping[str, ObserverFactory] | None = None,
) -> QuantPlan:
    """Every scale, zero point and integer of the quantized model.

    `observers` holds at least the tensors of `tensors_to_observe`. `of_weights`: what chooses the range of a weight, by
    initializer name; the others are represented whole. Raises InputError when nothing can be int8 or a
    weight is NaN or infinite, StageError when a tensor was not observed.
    """
    selection = select(model, rules)
    seen = {name: Range(*observer.range()) for name, observer in observers.items()}
    groups, refused = share_scales(selection, rules, seen)
    if refused:
        selection = selection.without(refused, rules)
        groups, _ = share_scales(selection, rules, seen)
    pinned = {name for name, observer in observers.items() if isinstance(observer, Pinned) and observer.exact}
    by_group = group_params(selection, rules, groups, seen, pinned)
    if not any(value.name in pinned for value in model.graph.inputs):
        by_group |= _image_inputs(model, rules, groups, by_group)
    kept = {*pinned, *map(value_name, model.graph.inputs)}
    by_group = clear_scales(selection, rules, groups, by_group, kept)
    by_group = clear_reciprocals(selection, rules, groups, by_group, kept)
    activations, folded = _activation_params(selection, groups, by_group)
    weights, biases = _constants(selection, rules, activations, folded, groups, of_weights or {})
    return QuantPlan(
        activations=activations,
        weights=weights,
        biases=biases,
        folded=folded,
        stays_float=_stays_float(model, selection, {*activations, *folded}),
        int8_nodes=_int8_nodes(selection, rules, folded),
        float_nodes={node_key(node): reason for node, reason in selection.reasons.items()},
    )


def _image_inputs(
    model: ir.Model, rules: QuantRules, groups: Groups[str], by_group: Mapping[str, QuantParams]
) -> dict[str, QuantParams]:
    """The parameters of the groups of image inputs, by root; the model's metadata says what the pixels become."""
    preprocessing = Preprocessing.from_metadata(model.metadata_props)
    images = [value_name(value) for value in model.graph.inputs if is_float(value) and len(value.shape or ()) == 4]
    if preprocessing is None or len(images) != 1 or images[0] not in groups:
        return {}
    root = groups.root(images[0])
    return {root: image_input_params(representable(by_group[root]), preprocessing, rules.activation)}


def _int8_nodes(selection: Selection, rules: QuantRules, folded: Mapping[str, str]) -> tuple[str, ...]:
    dropped = {activation for name, activation in selection.folds.items() if name in folded}
    nodes = [node for node in selection.int8 if node not in dropped and node.op_type in rules.operators]
    return tuple(node_key(node) for node in nodes)


def _activation_params(
    selection: Selection, groups: Groups[str], by_group: Mapping[str, QuantParams]
) -> tuple[dict[str, QuantParams], dict[str, str]]:
    activations: dict[str, QuantParams] = {}
    for node in selection.int8:
        for value in quantized_values(node, selection):
            name = value_name(value)
            activations[name] = by_group[groups.root(name)]
    folded: dict[str, str] = {}
    for name, activation in selection.folds.items():
        target = value_name(activation.outputs[0])
        if _does_the_work(activations[target], activation):
            folded[name] = target
        else:
            activations[name] = activations[target]
    return activations, folded


def _does_the_work(params: QuantParams, activation: ir.Node) -> bool:
    """Whether saturating to the quantizer's range is what the activation does, to within half a step."""
    bounds = activation_bounds(activation)
    return bounds is not None and representable(params).within(Range(*bounds), 0.5 * float(params.scale))


def _constants(  # noqa: PLR0913, PLR0917 - what was decided so far
    selection: Selection,
    rules: QuantRules,
    activations: Mapping[str, QuantParams],
    folded: Mapping[str, str],
    groups: Groups[str],
    of_weights: Mapping[str, ObserverFactory],
) -> tuple[dict[str, QuantizedConstant], dict[str, QuantizedConstant]]:
    """Weights and constant operands by initializer name, biases by node name.

    An initializer that nodes need in different ways (a Conv's weights that are also an Add's operand) is kept once
    per need: the first under its name, others under `constant_key(...)`.
    """
    weights: dict[str, QuantizedConstant] = {}
    biases: dict[str, QuantizedConstant] = {}
    needs: dict[str, tuple[object, ...]] = {}

    def made(node: ir.Node) -> QuantParams:
        name = value_name(float_outputs(node)[0])
        return activations[folded.get(name, name)]

    def key(node: ir.Node, index: int, value: ir.Value, need: tuple[object, ...]) -> str:
        name = value_name(value)
        return name if needs.setdefault(name, need) == need else constant_key(node, index, value)

    users: dict[str, list[Layer]] = {}
    for node in selection.int8:
        if node.op_type in MAC_OPERATORS:
            layer = read_layer(node)
            users.setdefault(key(node, 1, layer.weight_value, ("weights", layer.axis)), []).append(layer)
        for index, value, array in constant_operands(node):
            _check_finite(array, node)
            group = groups.root(value_name(float_outputs(node)[0])) if moves(node, rules) else None
            params = activations[group] if group else operand_params(node, value, made(node), rules.activation)
            need = ("operand", group or float(params.scale))
            weights[key(node, index, value, need)] = QuantizedConstant(params, params.quantize(array))
    for name, layers in users.items():
        steps = [_steps(layer, activations, folded) for layer in layers]
        observer = of_weights.get(value_name(layers[0].weight_value))
        params = weight_params(layers, steps, rules.weight, observer)
        weights[name] = QuantizedConstant(params, params.quantize(layers[0].weights))
        for layer, (input_step, _) in zip(layers, steps, strict=True):
            if layer.bias is not None:
                biases[node_key(layer.node)] = quantize_bias(layer, input_step, params, rules.bias)
    return weights, biases


def _steps(layer: Layer, activations: Mapping[str, QuantParams], folded: Mapping[str, str]) -> tuple[float, float]:
    source, result = value_name(activation_inputs(layer.node)[0]), value_name(layer.node.outputs[0])
    return float(activations[source].scale), float(activations[folded.get(result, result)].scale)


def _check_finite(array: Array, node: ir.Node) -> None:
    if not np.isfinite(array).all():
        raise InputError(
            f"node {node_key(node)} ({node.op_type}): a constant operand has NaN or infinite values; "
            "only finite values can be quantized"
        )


def _stays_float(model: ir.Model, selection: Selection, quantized: Iterable[str]) -> dict[str, str]:
    known = set(quantized)
    reasons: dict[str, str] = {}
    for value in model.graph.inputs:
        if is_float(value) and value.name not in known:
            reasons[value_name(value)] = "no int8 operator reads this input"
    int8 = set(selection.int8)
    read_by_int8 = {value.name for node in int8 for value in node.inputs if value is not None}
    for node in model.graph:
        if node in int8 or node.op_type == "Constant":
            continue
        why = f"{node_key(node)} ({node.op_type}): {selection.reasons[node]}"
        constants = [v for v in node.inputs if v is not None and is_float(v) and constant_array(v) is not None]
        for value in [*float_outputs(node), *constants]:
            if value.name not in known and value.name not in read_by_int8:
                reasons.setdefault(value_name(value), why)
    return reasons
