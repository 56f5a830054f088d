"""QuantPlan -> ONNX graph with QuantizeLinear/DequantizeLinear: the one quantized form every target starts from.

A quantized tensor `x` becomes  producer -> x__float -> QuantizeLinear -> x__q -> DequantizeLinear -> x,  so that `x`
is still what its readers see, in every graph. A graph input keeps its name, and its readers see `x__dq`. A weight `w`
becomes the integers `w__q` and DequantizeLinear -> `w__dq`; a bias, which belongs to its node `n`, becomes
`n__bias__q` and `n__bias__dq`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    constant_array,
    data_inputs,
    held_key,
    node_key,
    value_name,
)
from edgeship.calibration.planning.wide import WIDE_BITS
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan

PLAN_KEY = "edgeship.plan"
FACTS_KEY = "edgeship.quantization"
FLOAT_KEY = "edgeship.float"
"""Metadata: JSON, why nodes stay float -> the names of these nodes."""
WEIGHTS_KEY = "edgeship.weights"
"""Metadata: "unsigned" asks targets that can for uint8 weights, q + 128 with zero point 128, the same numbers."""
WIDE_OPSET = 21
"""The first operator set whose QuantizeLinear knows 16 bits."""


def apply_plan(model: ir.Model, plan: QuantPlan, facts: Mapping[str, str | int | float] | None = None) -> ir.Model:
    """A new QDQ model; `model` is not modified.

    The plan's digest goes into the metadata under `edgeship.plan`, `facts` (how the plan was made) and counts as JSON
    under `edgeship.quantization`, why nodes stay float under `edgeship.float`. Raises StageError when the plan was
    made for another graph.
    """
    copy = model.clone()
    writer = _Writer(copy.graph, plan)
    writer.check()
    writer.drop_folded()
    writer.quantize_activations()
    writer.quantize_constants()
    writer.remove_unused()
    counts = {"int8_nodes": len(plan.int8_nodes), "float_tensors": len(plan.stays_float)}
    copy.metadata_props[PLAN_KEY] = plan.digest()
    copy.metadata_props[FACTS_KEY] = json.dumps({**(facts or {}), **counts}, sort_keys=True)
    if plan.float_nodes:
        reasons: dict[str, list[str]] = {}
        for node, reason in plan.float_nodes.items():
            reasons.setdefault(reason, []).append(node)
        copy.metadata_props[FLOAT_KEY] = json.dumps(reasons)
    return copy


def float_nodes(model: ir.Model) -> dict[str, str]:
    """Why nodes of a model that `apply_plan` made stay float, by node name."""
    reasons = json.loads(model.metadata_props.get(FLOAT_KEY, "{}"))
    return {node: reason for reason, nodes in reasons.items() for node in nodes}


def output_steps(model: ir.Model) -> dict[str, float]:
    """The scale of each graph output of a QDQ model: one quantization step; 0.0 for an output that stays float."""
    steps: dict[str, float] = {}
    for value in model.graph.outputs:
        producer = value.producer()
        scale = None
        if producer is not None and producer.op_type == "DequantizeLinear":
            scale = constant_array(producer.inputs[1])
        steps[value_name(value)] = float(scale.reshape(())) if scale is not None and scale.size == 1 else 0.0
    return steps


class _Writer:
    def __init__(self, graph: ir.Graph, plan: QuantPlan) -> None:
        self._graph = graph
        self._plan = plan
        self._int8 = {node for node in graph if node_key(node) in set(plan.int8_nodes)}
        self._wide = {node for node in self._int8 if node_key(node) in set(plan.wide_nodes)}

    def check(self) -> None:
        """Raises StageError for names in the plan that the graph does not have."""
        names = {value.name for value in self._graph.inputs}
        names |= {value.name for node in self._graph for value in node.outputs}
        unknown = [name for name in (*self._plan.activations, *self._plan.folded) if name not in names]
        nodes = {node_key(node) for node in self._graph}
        unknown += [name for name in (*self._plan.int8_nodes, *self._plan.biases) if name not in nodes]
        opset = self._graph.opset_imports.get("", 0)
        if self._wide and opset < WIDE_OPSET:
            raise StageError(f"16-bit activations need opset {WIDE_OPSET} or later; the model has {opset}")
        if unknown:
            raise StageError(f"the plan is for another graph: this one has no {', '.join(unknown[:5])}")

    def drop_folded(self) -> None:
        """Removes each Relu or Clip that its producer's output range stands for."""
        producers = {value.name: value for node in self._graph for value in node.outputs}
        for source, target in self._plan.folded.items():
            inner, outer = producers[source], producers[target]
            activation = outer.producer()
            if activation is None or activation.inputs[0] is not inner:
                raise StageError(
                    f"the plan folds {source} into {target}, but no activation leads from one to the other"
                )
            outer.replace_all_uses_with(inner, replace_graph_outputs=True)
            self._graph.remove(activation, safe=True)
            inner.name = target

    def quantize_activations(self) -> None:
        """Puts QuantizeLinear and DequantizeLinear behind every tensor that has parameters."""
        for value in [v for v in self._graph.inputs if v.name in self._plan.activations]:
            name = value_name(value)
            readers = [(node, index) for node, index in value.uses() if node in self._int8]
            if readers:
                result = self._quantize(value, name, f"{name}__dq", before=self._first_node())
                self._redirect(readers, name, result)
        for node in list(self._graph):
            for value in node.outputs:
                if value.name in self._plan.activations:
                    self._quantize_output(node, value)

    def _quantize_output(self, node: ir.Node, value: ir.Value) -> None:
        name = value_name(value)
        made_of_integers = node in self._int8
        readers = [(reader, i) for reader, i in value.uses() if made_of_integers or reader in self._int8]
        is_output = value.is_graph_output()
        if not made_of_integers and is_output:
            # A float operator's output that leaves the graph keeps its name and precision.
            result = self._quantize(value, name, f"{name}__dq", after=node)
            self._redirect(readers, name, result)
            return
        value.name = f"{name}__float"
        result = self._quantize(value, name, name, after=node)
        if is_output:
            outputs = self._graph.outputs
            outputs[:] = [result if each is value else each for each in outputs]
        self._redirect(readers, name, result)

    def _redirect(self, readers: Sequence[tuple[ir.Node, int]], name: str, value: ir.Value) -> None:
        """Lets `readers` read the dequantized `value`; those that compute in the other width read it recast."""
        recast = self._plan.recast.get(name)
        others: list[tuple[ir.Node, int]] = []
        if recast is not None:
            is_wide = self._plan.activations[name].spec.bits == WIDE_BITS
            others = [(n, i) for n, i in readers if n in self._int8 and (n in self._wide) != is_wide]
        if others and recast is not None:
            result = self._pair(value, f"{name}__recast", f"{name}__recast__dq", recast, after=value.producer())
            for node, index in others:
                node.replace_input_with(index, result)
        for node, index in readers:
            if (node, index) not in others:
                node.replace_input_with(index, value)

    def _quantize(
        self, value: ir.Value, name: str, result: str, *, after: ir.Node | None = None, before: ir.Node | None = None
    ) -> ir.Value:
        return self._pair(value, name, result, self._plan.activations[name], after=after, before=before)

    def _pair(  # noqa: PLR0913 - where it goes is one of two, by name
        self,
        value: ir.Value,
        name: str,
        result: str,
        params: QuantParams,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> ir.Value:
        """What QuantizeLinear and DequantizeLinear make of `value`."""
        scale, zero_point = self._parameters(name, params)
        dtype = ir.DataType.from_numpy(params.spec.dtype)
        integers = ir.Value(name=f"{name}__q", type=ir.TensorType(dtype), shape=value.shape)
        floats = ir.Value(name=result, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        quantize = ir.Node(
            "", "QuantizeLinear", [value, scale, zero_point], name=f"{name}__quantize", outputs=[integers]
        )
        dequantize = ir.Node(
            "", "DequantizeLinear", [integers, scale, zero_point], name=f"{name}__dequantize", outputs=[floats]
        )
        if after is not None:
            self._graph.insert_after(after, [quantize, dequantize])
        elif before is not None:
            self._graph.insert_before(before, [quantize, dequantize])
        return floats

    def quantize_constants(self) -> None:
        """Replaces weights, biases and constant operands of int8 nodes by integers and DequantizeLinear."""
        made: dict[str, ir.Value] = {}
        for node in list(self._graph):
            if node not in self._int8:
                continue
            if node.op_type in MAC_OPERATORS:
                self._replace(node, 1, made)
                self._replace_bias(node)
            for index, value in data_inputs(node):
                if constant_array(value) is not None:
                    self._replace(node, index, made)

    def _replace(self, node: ir.Node, index: int, made: dict[str, ir.Value]) -> None:
        value = node.inputs[index]
        if value is None:
            raise StageError(f"node {node_key(node)} ({node.op_type}): input {index} is missing")
        key = held_key(self._plan.weights, node, index, value)
        if key not in self._plan.weights:
            raise StageError(
                f"the plan has no integers for {key}, input {index} of node {node_key(node)} ({node.op_type})"
            )
        if key not in made:
            made[key] = self._dequantized(key, self._plan.weights[key])
        node.replace_input_with(index, made[key])

    def _replace_bias(self, node: ir.Node) -> None:
        bias = self._plan.biases.get(node_key(node))
        if bias is not None:
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, self._dequantized(f"{node_key(node)}__bias", bias))

    def _dequantized(self, name: str, constant: QuantizedConstant) -> ir.Value:
        integers = self._initializer(f"{name}__q", constant.integers)
        scale, zero_point = self._parameters(name, constant.params, constant.integers.dtype)
        axis = constant.params.spec.axis
        attributes = {} if axis is None else {"axis": axis}
        floats = ir.Value(
            name=f"{name}__dq", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(constant.integers.shape)
        )
        node = ir.node(
            "DequantizeLinear",
            [integers, scale, zero_point],
            attributes,
            name=f"{name}__dequantize",
            outputs=[floats],
        )
        # Constants are ready before anything runs: their DequantizeLinear nodes stand at the beginning.
        self._graph.insert_before(self._first_node(), node)
        return floats

    def _parameters(self, name: str, params: QuantParams, dtype: np.dtype | None = None) -> tuple[ir.Value, ir.Value]:
        scale = self._initializer(f"{name}__scale", params.scale)
        zero_point = self._initializer(f"{name}__zero_point", params.zero_point.astype(dtype or params.spec.dtype))
        return scale, zero_point

    def _initializer(self, name: str, array: Array) -> ir.Value:
        if name in self._graph.initializers:
            raise StageError(f"the model already has an initializer called {name}")
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _first_node(self) -> ir.Node:
        return self._graph[0]

    def remove_unused(self) -> None:
        """Removes the float constants that nothing reads any more."""
        for node in [n for n in self._graph if n.op_type == "Constant"]:
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
