"""Layer after layer, integers that give back what the float layer computes, from what the quantized one before sees.

The float model and its quantized form run side by side over the same samples, operator by operator. At each layer the
quantized model holds what the layers before it, already rounded for good, make of the samples; `descent` then looks
for the integers that bring the layer's output closest to the float layer's. The bias takes what is left of the mean:

    b' = b + W E[x] - W_hat E[x_hat]

A Conv or Gemm without bias gets one; for a MatMul, which cannot have one, the search has the means left in.

A fifth of the samples takes no part in the search. They choose, for every output channel, between several strengths
of the ridge, the scales offered, and the integers the plan had: a channel whose error on them would grow stays as it
was.

Memory: the values alive at one operator, of both models and all samples; `memory_mb` bounds it by using fewer samples.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.operators import (
    MAC_OPERATORS,
    Layer,
    activation_inputs,
    node_key,
    read_layer,
    value_name,
)
from edgeship.calibration.learned.descent import Problem, descend
from edgeship.calibration.learned.graph import Step, TorchGraph
from edgeship.calibration.learned.moments import (
    Moments,
    can_gather,
    from_grouped_rows,
    gather,
    grouped_rows,
    thin,
)
from edgeship.calibration.learned.pairs import repaired
from edgeship.calibration.learned.reconstruct_options import ReconstructOptions
from edgeship.calibration.observing.collect import Progress
from edgeship.calibration.planning.pair_limit import uses_pair_kernel
from edgeship.calibration.planning.weights import (
    clear_of_boundaries,
    layer_steps,
    quantize_bias,
    smallest_scale,
    weight_key,
)
from edgeship.calibration.types import Array, QuantizedConstant, QuantParams, QuantPlan, TensorSpec, WeightScheme
from edgeship.calibration.writing.qdq import apply_plan

RIDGES = (0.3, 0.03)
BIAS = TensorSpec(bits=32, signed=True, symmetric=True, axis=0)
HELD_OUT = 5
"""Every fifth sample chooses instead of teaching."""


@dataclass(frozen=True)
class Reconstructed:
    """One layer: its squared error on the samples held out, in shares of the output's variance, before and after.

    `changed` of its `weights` have other integers now.
    """

    node: str
    before: float
    after: float
    changed: int
    weights: int

    def to_json(self) -> dict[str, str | float | int]:
        """The same as plain values."""
        return {**asdict(self), "before": round(self.before, 8), "after": round(self.after, 8)}


def reconstruct(  # noqa: PLR0913, PLR0917 - what, from where, how, and who watches
    model: ir.Model,
    plan: QuantPlan,
    samples: Sequence[Mapping[str, Array]],
    weights: WeightScheme,
    options: ReconstructOptions,
    progress: Progress | None = None,
) -> tuple[QuantPlan, list[Reconstructed]]:
    """The plan with rounded weights and biases that reconstruct the float layers, and what that did to each layer.

    `samples` are feeds of the model with batch 1. Layers of other kinds than Conv, Gemm and MatMul with one matrix keep
    their integers. The result depends on the arguments alone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums keep their order, whatever the number of cores
    try:
        with torch.no_grad():
            return _Reconstruction(model, plan, samples, weights, options).run(progress)
    finally:
        torch.set_num_threads(threads)


class _Walk:
    """One of both models, run operator by operator over all samples."""

    def __init__(self, graph: TorchGraph, samples: Sequence[Mapping[str, Tensor]]) -> None:
        self._graph = graph
        self._constants = graph.constants()
        self._at = 0
        self.values = [dict(sample) for sample in samples]
        for step in graph.steps:  # what no sample has a part in is computed once: dequantized weights above all
            if all(name is None or name in self._constants for name in step.inputs):
                graph.run_step(step, self._constants)

    def set(self, name: str, values: Tensor) -> None:
        """Makes `values` what the graph's readers of `name` see; the step that computes it is left out."""
        self._constants[name] = values

    def until(self, node: str) -> Step:
        """The step of `node`, after all before it have run."""
        while self._at < len(self._graph.steps):
            step = self._graph.steps[self._at]
            if step.name == node:
                return step
            self.advance()
        raise StageError(f"node {node} is not in the graph that is reconstructed")

    def advance(self) -> int:
        """The bytes alive at the next step, after it has run for every sample and forgotten what nothing reads."""
        step = self._graph.steps[self._at]
        self._at += 1
        alive = 0
        if all(name in self._constants for name in step.outputs):
            return alive
        for values in self.values:
            self._graph.run_step(step, ChainMap(values, self._constants))
            alive += sum(value.numel() * value.element_size() for value in values.values())
            for name in step.dead:
                values.pop(name, None)
        return alive

    def peak(self) -> int:
        """The most bytes alive at any step, from here to the end."""
        return max((self.advance() for _ in range(len(self._graph.steps) - self._at)), default=0)


class _Reconstruction:
    def __init__(
        self,
        model: ir.Model,
        plan: QuantPlan,
        samples: Sequence[Mapping[str, Array]],
        weights: WeightScheme,
        options: ReconstructOptions,
    ) -> None:
        self._options, self._limited = options, weights == "pair_limited"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        int8 = set(plan.int8_nodes)
        nodes = [node for node in model.graph if node_key(node) in int8 and node.op_type in MAC_OPERATORS]
        self._layers = [layer for layer in map(read_layer, nodes) if can_gather(layer)]
        self._readers = Counter(weight_key(layer, plan) for layer in map(read_layer, nodes))
        self._plan = plan = self._with_biases(plan)
        graphs = [TorchGraph(each).to(self._device) for each in (model, apply_plan(model, plan))]
        feeds = [self._tensors(sample) for sample in self._affordable(graphs, samples)]
        self._exact, self._rounded = (_Walk(graph, feeds) for graph in graphs)

    def run(self, progress: Progress | None) -> tuple[QuantPlan, list[Reconstructed]]:
        """What `reconstruct` returns."""
        weights, biases = dict(self._plan.weights), dict(self._plan.biases)
        reports = []
        for done, layer in enumerate(self._layers, 1):
            key, name = weight_key(layer, self._plan), node_key(layer.node)
            moments, held_out = self._look(layer)
            constant, report = self._search(layer, weights[key], moments, held_out)
            if self._readers[key] == 1:
                weights[key] = constant
                reports.append(report)
                self._rounded.set(f"{key}__dq", self._tensor(constant.params.dequantize(constant.integers)))
            if name in biases:
                moments.merge(held_out)
                biases[name] = self._bias(layer, weights[key], moments, biases[name].params.spec)
                values = biases[name].integers.astype(np.float32) * biases[name].params.scale
                self._rounded.set(f"{name}__bias__dq", self._tensor(values))
            if progress is not None:
                progress(done, len(self._layers), "layers reconstructed")
        return replace(self._plan, weights=weights, biases=biases), reports

    def _with_biases(self, plan: QuantPlan) -> QuantPlan:
        """The plan with a bias of zeros for every layer that has none and can have one."""
        biases = dict(plan.biases)
        for layer in self._layers:
            name = node_key(layer.node)
            if name not in biases and layer.node.op_type != "MatMul":
                step = float(plan.activations[value_name(activation_inputs(layer.node)[0])].scale)
                biases[name] = quantize_bias(layer, step, plan.weights[weight_key(layer, plan)].params, BIAS)
        return replace(plan, biases=biases)

    def _affordable(
        self, graphs: Sequence[TorchGraph], samples: Sequence[Mapping[str, Array]]
    ) -> list[Mapping[str, Array]]:
        """As many samples, evenly spread, as the memory allows."""
        if not samples:
            raise StageError("there are no samples to reconstruct layers with")
        peak = sum(_Walk(graph, [self._tensors(samples[0])]).peak() for graph in graphs)
        most = max(int(self._options.memory_mb * 2**20 // max(peak, 1)), 2 * HELD_OUT)
        if len(samples) <= most:
            return list(samples)
        return [samples[i] for i in np.linspace(0, len(samples) - 1, most).round().astype(int)]

    def _look(self, layer: Layer) -> tuple[Moments, Moments]:
        """The moments of the layer's inputs on the samples that teach, and on those held out."""
        name = node_key(layer.node)
        exact, rounded = self._exact.until(name), self._rounded.until(name)
        sets = (Moments(layer), Moments(layer))
        generator = torch.Generator().manual_seed(self._options.seed)
        for i, (a, b) in enumerate(zip(self._exact.values, self._rounded.values, strict=True)):
            rows = [gather(layer, values[str(step.inputs[0])]) for values, step in ((a, exact), (b, rounded))]
            held_out = i % HELD_OUT == HELD_OUT - 1
            sets[held_out].update(*thin(rows, self._options.positions, generator))
        if not sets[1].count:  # fewer than five samples: they choose what they have taught
            return sets[0], sets[0]
        return sets

    def _search(
        self, layer: Layer, constant: QuantizedConstant, moments: Moments, held_out: Moments
    ) -> tuple[QuantizedConstant, Reconstructed]:
        exact = grouped_rows(layer, self._tensor(layer.weights).double())
        present = grouped_rows(layer, self._tensor(constant.integers).double())
        paired = self._limited and uses_pair_kernel(layer.node, layer.weights)
        qmax = constant.params.spec.qmax
        scale = self._spread(constant.params.scale, exact)
        centred = node_key(layer.node) in self._plan.biases
        judge = Problem(exact, scale, *self._covariances(held_out, centred), qmax, paired)
        best, best_scale, least = present, scale, judge.error(present)
        before = least.clone()
        for candidate in self._scales(layer, constant, scale, paired):
            problem = Problem(exact, candidate, *self._covariances(moments, centred), qmax, paired)
            start = present if candidate is scale else _nearest(problem)
            for ridge in RIDGES:
                integers = descend(problem, start, ridge, self._options.sweeps)
                error = replace(judge, scale=candidate).error(integers)
                better = error < least
                least = torch.where(better, error, least)
                best = torch.where(better.unsqueeze(-1), integers, best)
                best_scale = torch.where(better.unsqueeze(-1), candidate, best_scale)
        found = self._constant(layer, constant, best, best_scale)
        return found, _report(layer, judge, before, least, constant, found)

    def _scales(self, layer: Layer, constant: QuantizedConstant, scale: Tensor, paired: bool) -> list[Tensor]:
        """The scales to try, (G, m, 1) each: the plan's, and where pairs are limited also that of the full range."""
        if not paired or constant.params.spec.axis is None:
            return [scale]
        steps = layer_steps(layer, self._plan)
        others = tuple(i for i in range(layer.weights.ndim) if i != layer.axis)
        full = np.abs(layer.weights).max(axis=others).astype(np.float64) / constant.params.spec.qmax
        full = np.maximum(full, smallest_scale(layer, *steps))
        present = constant.params.scale
        if full.shape != present.shape:
            raise StageError(f"node {node_key(layer.node)}: {present.size} scales for {full.size} channels")
        between = np.sqrt(np.minimum(full, present) * present)
        clear = (clear_of_boundaries(each, *steps).astype(np.float32) for each in (full, between))
        return [scale, *(self._spread(np.minimum(each, present), scale) for each in clear)]

    def _spread(self, scale: Array, rows: Tensor) -> Tensor:
        values = self._tensor(np.broadcast_to(scale, (rows.shape[0] * rows.shape[1],)).astype(np.float32)).double()
        return values.reshape(rows.shape[0], rows.shape[1], 1)

    def _constant(self, layer: Layer, before: QuantizedConstant, integers: Tensor, scale: Tensor) -> QuantizedConstant:
        rows = from_grouped_rows(layer, integers).cpu().numpy().astype(before.integers.dtype)
        chosen = before.params.scale
        if before.params.spec.axis is not None:
            chosen = scale.reshape(-1).cpu().numpy().astype(np.float32)
        params = QuantParams(chosen, before.params.zero_point, before.params.spec)
        return QuantizedConstant(params, np.ascontiguousarray(rows))

    def _bias(self, layer: Layer, constant: QuantizedConstant, moments: Moments, spec: TensorSpec) -> QuantizedConstant:
        exact, rounded = (each.to(self._device) for each in moments.means())
        values = constant.params.dequantize(constant.integers)
        shift = _apply(grouped_rows(layer, self._tensor(layer.weights).double()), exact)
        shift -= _apply(grouped_rows(layer, self._tensor(values).double()), rounded)
        bias = np.zeros(layer.channels) if layer.bias is None else layer.bias
        corrected = replace(layer, bias=(bias + shift.cpu().numpy()).astype(np.float32))
        step = float(self._plan.activations[value_name(activation_inputs(layer.node)[0])].scale)
        return quantize_bias(corrected, step, constant.params, spec)

    def _covariances(self, moments: Moments, centred: bool) -> tuple[Tensor, Tensor]:
        second, cross = moments.covariances(centred=centred)
        return second.to(self._device), cross.to(self._device)

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self._device)

    def _tensors(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        return {name: self._tensor(np.asarray(values, np.float32)) for name, values in feeds.items()}


def _apply(rows: Tensor, values: Tensor) -> Tensor:
    """The layer's output (channels,) for the input `values` (G, K)."""
    return (rows * values.unsqueeze(1)).sum(-1).reshape(-1)


def _nearest(problem: Problem) -> Tensor:
    """Plain rounding at the problem's own scales, pairs within their limit."""
    places = problem.weights / problem.scale
    if not problem.paired:
        return torch.clamp(torch.round(places), -problem.qmax, problem.qmax)
    return repaired(places.flatten(0, 1), problem.qmax).reshape(places.shape)


def _report(  # noqa: PLR0913, PLR0917 - before and after, of each kind
    layer: Layer, judge: Problem, before: Tensor, after: Tensor, old: QuantizedConstant, new: QuantizedConstant
) -> Reconstructed:
    # E leaves out its constant w S_x w^T, the variance of the float output; with S in place of S_x it is near enough
    # to say how large an error is.
    constant = ((judge.weights @ judge.second) * judge.weights).sum(-1)
    total = float(constant.sum().clamp(min=1e-30))
    return Reconstructed(
        node_key(layer.node),
        float((before + constant).clamp(min=0).sum()) / total,
        float((after + constant).clamp(min=0).sum()) / total,
        int((old.integers != new.integers).sum()),
        int(old.integers.size),
    )
