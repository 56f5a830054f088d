"""A float model and its plan as one torch module: fake quantization exactly where the plan rounds.

The graph that runs is the QDQ graph itself (`qdq.apply_plan`): the same points, the same folded activations, the same
shared scales. In place of its integer constants it gets, in every pass,

    w_hat = clip(round(w / s_w), -127, 127) s_w,     b_hat = round(b / (s_x s_w)) s_x s_w

of the float weights and biases held here, which start as the float model's own. Rounding has straight-through
gradients; pair-limited weights are projected onto the limit in every pass. A weight that is zero in the float model was
pruned, and stays zero.

Parameters are held in units of the quantization: a weight in steps of its scale at the start, a bias in the steps
that a weight of one step makes with the largest input. So a learning rate means the same in every layer of every
network: AdamW with lr moves a weight by no more than about lr of its step at a time.

Scales may be learnt too (LSQ): activations' zero points stay, so that a folded ReLU stays one, and so do the
scales that a kernel or the image's pixels dictate. s = s_0 exp(t / 20), so that no step makes a scale negative.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    Layer,
    activation_inputs,
    node_key,
    read_layer,
    value_name,
)
from edgeship.calibration.learned.graph import TorchGraph
from edgeship.calibration.learned.operators.quantization import quantize_dequantize
from edgeship.calibration.learned.pairs import from_kernel_rows, kernel_rows, repaired
from edgeship.calibration.planning.pair_limit import uses_pair_kernel
from edgeship.calibration.planning.weights import quantize_bias, weight_key
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan, TensorSpec, WeightScheme
from edgeship.calibration.writing.qdq import apply_plan

_PACE = 0.05
"""Optimizers move all numbers alike; a weight of 20 steps that moves by one changes by a twentieth: so do scales."""
_FULL = 128.0
"""The integer of a large input: what biases are measured with."""
_LARGEST = 1e9
"""In steps: no weight or bias of a network that works is larger."""
_REACH = 0.25
"""In steps, how far from its integer a weight begins. Refinements choose many integers that are not the nearest; at the
very edge (0.499) the first step of an optimizer, whatever its rate, tips them all back and undoes the refinement."""
_FURTHEST = float(np.log(4.0))
"""A learnt scale stays within a factor of 4 of where it began."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight tensor: its key in the plan, its parameter here and what 1 is in it, the layer that reads it first.

    1 is nothing where a weight was pruned.
    """

    key: str
    parameter: str
    layer: Layer
    unit: Array
    spec: TensorSpec
    limited: bool


@dataclass(frozen=True, eq=False)
class _Bias:
    """One bias: its node's key, its parameter here and what 1 is in it, its layer, and whose scales it follows."""

    key: str
    parameter: str
    layer: Layer
    unit: Array
    source: str
    weight: _Weight


class FakeQuantGraph(nn.Module):
    """The quantized model, to be trained: `forward` computes what the QDQ model does, `plan` gives what was learnt.

    Weights and biases begin as the float model's own, or with `start` "plan" as near to them as gives the plan's
    integers with some room. `learn_scales` makes the scales of weights and activations parameters too, but for the
    activations in `fixed` and those that share a scale with them, or with a value that is recast.
    """

    def __init__(  # noqa: PLR0913 - three of six are keyword-only options
        self,
        model: ir.Model,
        plan: QuantPlan,
        weights: WeightScheme = "full",
        *,
        learn_scales: bool = False,
        fixed: Collection[str] = (),
        start: Literal["float", "plan"] = "float",
    ) -> None:
        super().__init__()
        self._plan = plan
        self.graph = TorchGraph(apply_plan(model, plan))
        self.inputs, self.outputs = self.graph.inputs, self.graph.outputs
        self._weights: dict[str, _Weight] = {}
        self._biases: list[_Bias] = []
        self._factors: dict[str, str] = {}
        int8 = set(plan.int8_nodes)
        for node in model.graph:
            if node_key(node) in int8 and node.op_type in MAC_OPERATORS:
                self._add_layer(read_layer(node), start == "plan", limited=weights == "pair_limited")
        if learn_scales:
            self._add_scale_factors(set(fixed))

    def forward(self, feeds: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """The outputs by name, and the values in `keep`."""
        outputs: dict[str, Tensor] = self.graph(feeds, self.given(), keep)
        return outputs

    def given(self) -> dict[str, Tensor]:
        """The graph's values that follow from what is learnt, by name: dequantized constants and learnt scales."""
        values = {f"{name}__scale": self._step(name) for name in self._plan.activations if name in self._factors}
        for weight in self._weights.values():
            values[f"{weight.key}__dq"] = self._fake_weight(weight)
        for bias in self._biases:
            scale = self._bias_scale(bias)
            values[f"{bias.key}__bias__dq"] = quantize_dequantize(self._values(bias), scale, -(2.0**31), 2.0**31 - 1)
        return values

    def plan(self) -> QuantPlan:
        """The plan with weights, biases and scales as they are now. Raises StageError where one left all bounds."""
        broken = [n for n, values in self.named_parameters() if not bool((values.detach().abs() < _LARGEST).all())]
        if broken:
            raise StageError(f"training left values beyond {_LARGEST:g} in {len(broken)} tensors; try a smaller lr")
        with torch.no_grad():
            activations = self._learnt_activations()
            constants = dict(self._plan.weights)
            for weight in self._weights.values():
                before = constants[weight.key]
                scale = self._weight_scale(weight)
                params = QuantParams(scale.cpu().numpy(), before.params.zero_point, weight.spec)
                integers = self._integers(weight, scale).cpu().numpy().astype(before.integers.dtype)
                constants[weight.key] = QuantizedConstant(params, integers)
            biases = dict(self._plan.biases)
            for bias in self._biases:
                scale = self._bias_scale(bias)
                rounded = torch.round(self._values(bias) / scale)  # as in `given`: float64 may round elsewhere
                layer = replace(bias.layer, bias=(rounded.double() * scale).cpu().numpy())
                step, params = float(activations[bias.source].scale), constants[bias.weight.key].params
                biases[bias.key] = quantize_bias(layer, step, params, biases[bias.key].params.spec)
        return replace(self._plan, activations=activations, weights=constants, biases=biases)

    def _learnt_activations(self) -> dict[str, QuantParams]:
        found = dict(self._plan.activations)
        made: dict[str, QuantParams] = {}
        for name, parameter in self._factors.items():
            if name in found:
                before = found[name]
                if parameter not in made:
                    scale = self._step(name).cpu().numpy()
                    made[parameter] = QuantParams(scale, before.zero_point, before.spec)
                found[name] = made[parameter]
        return found

    def _add_layer(self, layer: Layer, from_plan: bool, *, limited: bool) -> None:
        key = weight_key(layer, self._plan)
        if key not in self._weights:
            constant = self._plan.weights[key]
            pairs = limited and uses_pair_kernel(layer.node, layer.weights)
            values = _inside(layer.weights, constant) if from_plan else layer.weights
            unit = constant.params.dequantize(np.ones_like(constant.integers))
            kept = np.where(layer.weights == 0, 0, unit).astype(unit.dtype)
            weight = _Weight(key, f"weight_{len(self._weights)}", layer, kept, constant.params.spec, pairs)
            self._weights[key] = weight
            self.register_parameter(weight.parameter, _parameter(values / unit))
        name = node_key(layer.node)
        if name in self._plan.biases:
            constant = self._plan.biases[name]
            source, unit = value_name(activation_inputs(layer.node)[0]), np.asarray(_FULL * constant.params.scale)
            bias = _Bias(name, f"bias_{len(self._biases)}", layer, unit, source, self._weights[key])
            zeros = np.zeros(layer.channels) if layer.bias is None else layer.bias
            values = constant.integers * constant.params.scale.astype(np.float64) if from_plan else zeros
            self._biases.append(bias)
            self.register_parameter(bias.parameter, _parameter(values / unit))

    def _add_scale_factors(self, fixed: set[str]) -> None:
        groups: dict[int, list[str]] = {}
        for name, params in self._plan.activations.items():
            groups.setdefault(id(params), []).append(name)
        recast = {id(params) for params in self._plan.recast.values()}  # what reads a recast value has its parameters
        for group, names in groups.items():
            if fixed.isdisjoint(names) and group not in recast:
                parameter = f"factor_{len(set(self._factors.values()))}"
                self.register_parameter(parameter, nn.Parameter(torch.zeros(())))
                self._factors.update(dict.fromkeys(names, parameter))
        for key, weight in self._weights.items():
            parameter = f"{weight.parameter}_factor"
            shape = self._plan.weights[key].params.scale.shape
            self.register_parameter(parameter, nn.Parameter(torch.zeros(shape)))
            self._factors[_OF_WEIGHT + key] = parameter

    def _values(self, constant: _Weight | _Bias) -> Tensor:
        parameter = self.get_parameter(constant.parameter)
        return parameter * torch.from_numpy(constant.unit).to(parameter.device)

    def _step(self, name: str) -> Tensor:
        return self._scaled(self._plan.activations[name].scale, name)

    def _weight_scale(self, weight: _Weight) -> Tensor:
        return self._scaled(self._plan.weights[weight.key].params.scale, _OF_WEIGHT + weight.key)

    def _scaled(self, start: Array, name: str) -> Tensor:
        device = next(self.parameters()).device
        scale = torch.from_numpy(np.array(start)).to(device)
        if name not in self._factors:
            return scale
        factor = _PACE * self.get_parameter(self._factors[name])
        return scale * torch.exp(torch.clamp(factor, -_FURTHEST, _FURTHEST))

    def _bias_scale(self, bias: _Bias) -> Tensor:
        scale = self._step(bias.source) * self._weight_scale(bias.weight)
        return scale.repeat(bias.layer.channels // scale.numel()) if scale.ndim else scale

    def _fake_weight(self, weight: _Weight) -> Tensor:
        values, scale = self._values(weight), self._weight_scale(weight)
        spread = _along(scale, weight.spec, values.ndim)
        fake = quantize_dequantize(values, spread, float(weight.spec.qmin), float(weight.spec.qmax))
        if not weight.limited:
            return fake
        # The integers of a pair over the limit are others than the nearest; gradients pass as if they were not.
        with torch.no_grad():
            exact = self._integers(weight, scale) * spread
        return fake + (exact - fake).detach()

    def _integers(self, weight: _Weight, scale: Tensor) -> Tensor:
        values = self._values(weight)
        places = values / _along(scale, weight.spec, values.ndim)
        if not weight.limited:
            return torch.clamp(torch.round(places), weight.spec.qmin, weight.spec.qmax)
        conv = weight.layer.node.op_type == "Conv"
        rows = repaired(kernel_rows(places, weight.layer.axis, conv=conv), weight.spec.qmax)
        return from_kernel_rows(rows, values, weight.layer.axis, conv=conv)


_OF_WEIGHT = "weight of "
"""Tells the scale factor of a weight from that of an activation of the same name."""


def _along(scale: Tensor, spec: TensorSpec, rank: int) -> Tensor:
    if spec.axis is None or scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[spec.axis] = scale.numel()
    return scale.reshape(shape)


def _inside(values: Array, constant: QuantizedConstant) -> Array:
    """The numbers nearest to `values` that round to the constant's integers, with room to the next one."""
    places = constant.params.dequantize(constant.integers)
    reach = _REACH * (constant.params.dequantize(np.ones_like(constant.integers)))
    return np.asarray(np.clip(values, places - reach, places + reach), np.float32)


def _parameter(values: Array) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(values, np.float32)))
