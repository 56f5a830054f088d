"""A complete int8 plan -> one in which some or all nodes compute on 16-bit activations and 8-bit weights (16x8).

    s_16 = max(|low|, |high|) / 32767,  z_16 = 0;   bias at s_16 s_w[c], int32

(TensorFlow Lite 16x8 quantization specification.) Softmax, Sigmoid and Tanh have the fixed output scale 1/32768 there.
[low, high] is what the 8-bit parameters represent: whatever chose the ranges, shares them and pins them still holds.
Between a node of one width and a reader of the other the value is quantized once more (`QuantPlan.recast`).

A ReLU cannot live in its producer's output range here, since a symmetric range has negative values: it stays a node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    ACTIVATION_OPERATORS,
    MAC_OPERATORS,
    activation_inputs,
    constant_key,
    constant_operands,
    float_outputs,
    held_key,
    node_key,
    value_name,
)
from edgeship.calibration.planning.weights import LARGEST_BIAS
from edgeship.calibration.types import QuantizedConstant, QuantParams, QuantPlan, TensorSpec
from edgeship.calibration.values.ranges import Range, choose, range_of, representable

WIDE_BITS = 16
WIDE = TensorSpec(bits=WIDE_BITS, signed=True, symmetric=True)
_UNIT = QuantParams(np.asarray(1 / 32768), np.zeros(()), WIDE)
_FIXED_8 = ((1 / 256, -128), (1 / 128, 0))
"""The 8-bit output parameters of Softmax and Sigmoid, and of Tanh."""


def widen(model: ir.Model, plan: QuantPlan, nodes: Collection[str] | None = None) -> QuantPlan:
    """The plan with the integer nodes called `nodes` (all where None) on 16-bit activations; the others as they are.

    A ReLU or Clip goes with the node that it alone follows. `model` is the float model the plan is for.
    """
    return _Widening(model, plan, nodes).plan()


def wide_params(narrow: QuantParams) -> QuantParams:
    """The 16-bit parameters for what per-tensor 8-bit ones represent."""
    if any(narrow.scale == np.float32(scale) and narrow.zero_point == zero for scale, zero in _FIXED_8):
        return _UNIT
    covered = representable(narrow)
    return choose(Range(min(covered.low, 0.0), max(covered.high, 0.0)), WIDE)


class _Widening:
    def __init__(self, model: ir.Model, narrow: QuantPlan, nodes: Collection[str] | None) -> None:
        self._narrow = narrow
        self._by_key = {node_key(node): node for node in model.graph}
        self._producers = {value_name(v): node for node in model.graph for v in node.outputs if v.name}
        # A folded activation's node is not among the int8 nodes: its output belongs to the node it is folded into.
        self._makers = {
            target: self._producers[source] for source, target in narrow.folded.items() if source in self._producers
        }
        self._readers: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            for value in activation_inputs(node):
                self._readers.setdefault(value_name(value), []).append(node)
        self._wide = self._with_activations(narrow.int8_nodes if nodes is None else nodes)
        self._int8 = [node_key(node) for node in model.graph if self._is_integer(node)]

    def _with_activations(self, nodes: Iterable[str]) -> set[str]:
        chosen: set[str] = set()
        for key in nodes:
            node = self._by_key[key]
            if node.op_type in ACTIVATION_OPERATORS:
                maker = self._makers.get(value_name(node.outputs[0]))
                node = maker if maker is not None else node
            chosen.add(node_key(node))
            for reader in _lone_reader(node):
                if reader.op_type in ACTIVATION_OPERATORS:
                    chosen.add(node_key(reader))
        folded = {node_key(self._producers[target]) for target in self._narrow.folded.values()}
        return {key for key in chosen if key in set(self._narrow.int8_nodes) or key in folded}

    def _is_integer(self, node: ir.Node) -> bool:
        return node_key(node) in self._narrow.int8_nodes or node_key(node) in self._wide

    def plan(self) -> QuantPlan:
        """The widened plan."""
        folded = {
            source: target
            for source, target in self._narrow.folded.items()
            if node_key(self._producers[source]) not in self._wide
        }
        narrow = dict(self._narrow.activations)
        for source, target in self._narrow.folded.items():
            if source not in folded:
                narrow[source] = narrow[target]
        activations, recast = {}, {}
        made: dict[int, QuantParams] = {}  # tensors that share their parameters still do

        def widened(params: QuantParams) -> QuantParams:
            if id(params) not in made:
                made[id(params)] = wide_params(params)
            return made[id(params)]

        for name, params in narrow.items():
            wide, mixed = self._width(name, folded)
            activations[name] = widened(params) if wide else params
            if mixed:
                recast[name] = params if wide else widened(params)
        weights, biases = self._constants(narrow, folded)
        return replace(
            self._narrow,
            activations=activations,
            weights=weights,
            biases=biases,
            folded=folded,
            int8_nodes=tuple(self._int8),
            wide_nodes=tuple(key for key in self._int8 if key in self._wide),
            recast=recast,
        )

    def _width(self, name: str, folded: Mapping[str, str]) -> tuple[bool, bool]:
        """Whether the value is kept in 16 bits, and whether it has integer readers of the other width."""
        inner = {node_key(self._producers[target]) for target in folded.values()}
        readers = self._readers.get(name, [])
        keys = [key for key in map(node_key, readers) if key in set(self._int8) and key not in inner]
        maker = self._makers.get(name) if name in folded.values() else self._producers.get(name)
        made_of_integers = maker is not None and node_key(maker) in set(self._int8)
        if maker is not None and made_of_integers:
            wide = node_key(maker) in self._wide
        else:
            wide = bool(keys) and all(key in self._wide for key in keys)
        return wide, any((key in self._wide) != wide for key in keys)

    def _constants(
        self, narrow: Mapping[str, QuantParams], folded: Mapping[str, str]
    ) -> tuple[dict[str, QuantizedConstant], dict[str, QuantizedConstant]]:
        weights, biases = dict(self._narrow.weights), dict(self._narrow.biases)
        for key in self._int8:
            if key not in self._wide:
                continue
            node = self._by_key[key]
            for index, value, array in constant_operands(node):
                own = constant_key(node, index, value)
                before = self._narrow.weights[held_key(self._narrow.weights, node, index, value)]
                shared = narrow.get(value_name(float_outputs(node)[0]))
                moved = shared is not None and before.params.same_as(shared)
                params = wide_params(before.params) if moved else choose(range_of(array), WIDE)
                weights[own] = QuantizedConstant(params, params.quantize(array))
            if node.op_type in MAC_OPERATORS:
                self._layer(node, narrow, weights, biases)
        return weights, biases

    def _layer(
        self,
        node: ir.Node,
        narrow: Mapping[str, QuantParams],
        weights: dict[str, QuantizedConstant],
        biases: dict[str, QuantizedConstant],
    ) -> None:
        """Puts the node's bias at the finer scale; where it would leave int32, the channel's weight scale grows."""
        value = node.inputs[1]
        bias = biases.get(node_key(node))
        if value is None or bias is None:
            return
        own = constant_key(node, 1, value)
        constant = weights[held_key(weights, node, 1, value)]
        step = float(wide_params(narrow[value_name(activation_inputs(node)[0])]).scale)
        real = bias.params.dequantize(bias.integers).astype(np.float64)
        scale = constant.params.scale.astype(np.float64)
        per_scale = np.abs(real).reshape(-1, max(scale.size, 1)).max(axis=0).reshape(scale.shape)
        floor = per_scale / (step * LARGEST_BIAS) * (1 + 1e-6)
        if (floor > scale).any():
            params = QuantParams(np.maximum(scale, floor), constant.params.zero_point, constant.params.spec)
            floats = constant.params.dequantize(constant.integers)
            constant = weights[own] = QuantizedConstant(params, params.quantize(floats))
        finer = (np.float32(step) * constant.params.scale).astype(np.float32)
        finer = np.broadcast_to(
            np.tile(finer, real.size // finer.size) if finer.ndim else finer, bias.params.scale.shape
        )
        integers = np.rint(real / finer.astype(np.float64)).astype(np.int32)
        biases[node_key(node)] = QuantizedConstant(
            QuantParams(np.array(finer), bias.params.zero_point, bias.params.spec), integers
        )


def _lone_reader(node: ir.Node) -> list[ir.Node]:
    """The node that alone reads the only output, as a list of one; else none."""
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return []
    readers = [reader for reader, _ in node.outputs[0].uses()]
    return readers if len(readers) == 1 else []
