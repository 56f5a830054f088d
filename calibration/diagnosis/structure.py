"""What in a model's structure int8 is known to suffer from, each with the fix that a user can accept.

    float_outputs       an output that mixes ranges (boxes in pixels with scores in 0..1 under one scale) stays float
    float_concats       a Concat of inputs whose ranges are far apart stays float: each input keeps its own scale
    wide_activations    SiLU (x * Sigmoid(x)) and HardSwish compute on 16-bit activations
    wide_outputs        the scores of many classes, of which the two largest often become the same integer, get 16 bits
    equalize            (a refinement) layers whose output channels have weights of very different size

Dead channels, BatchNormalization that was not folded, and padded MaxPool of negative values are told without a fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    HULL_OPERATORS,
    activation_inputs,
    attribute,
    node_key,
    read_layer,
    value_name,
)
from edgeship.calibration.planning.subset import layers_of
from edgeship.calibration.samples.checks import few
from edgeship.calibration.types import Array, Finding, Observer, QuantPlan

FIXES = ("float_outputs", "float_concats", "wide_activations", "wide_outputs")
WIDE_FIXES = frozenset({"wide_activations", "wide_outputs"})
"""Those that give nodes 16-bit activations."""
MIXED = 64.0
"""Channels of an output whose ranges are further apart than this share fewer than 2 of the narrow one's 8 bits."""
UNLIKE = 16.0
DEAD = 1e-5
EXPLODING = 100.0
MOST_CHANNELS = 256
NEAR = 8
"""Steps between the two largest scores up to which samples are counted: one in so many of these is within one step."""
TIED = 0.02
"""Decisions between scores within one step of each other that are remarkable, as a share of all. About half of them
become the same integer, and in half of those the other class comes first: every fourth decides otherwise."""


@dataclass(frozen=True)
class Trouble:
    """What is wrong, the fix that applies, if any, and the nodes it is about."""

    finding: Finding
    fix: str | None = None
    nodes: tuple[str, ...] = ()


class ChannelSpans:
    """The range of each channel of a tensor of rank 3 or more, along its shortest axis but the batch."""

    def __init__(self) -> None:
        self._low: Array | None = None
        self._high: Array | None = None

    def update(self, values: Array) -> None:
        """Takes in one batch; tensors without a short axis are left out."""
        if values.ndim < 3:
            return
        axis = min(range(1, values.ndim), key=lambda i: (values.shape[i] < 2, values.shape[i]))
        if not 2 <= values.shape[axis] <= MOST_CHANNELS:
            return
        others = tuple(i for i in range(values.ndim) if i != axis)
        low, high = values.min(axis=others), values.max(axis=others)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    def spans(self) -> Array:
        """The length of each channel's range, zero included; empty where nothing was seen."""
        if self._low is None or self._high is None:
            return np.zeros(0)
        return np.asarray(np.maximum(self._high, 0) - np.minimum(self._low, 0))


class TopGaps:
    """How far the largest score of each row of a (batch, classes) tensor is above the second one."""

    def __init__(self) -> None:
        self.gaps: list[float] = []

    def update(self, values: Array) -> None:
        """Takes in one batch; tensors of another rank, or of fewer than two classes, are left out."""
        if values.ndim == 2 and values.shape[1] > 1:
            top = np.partition(values, -2, axis=1)[:, -2:]
            self.gaps += [float(gap) for gap in top[:, 1] - top[:, 0]]

    def tied(self, step: float) -> float:
        """The share of samples whose two largest scores lie within one `step`, from those within `NEAR` of them."""
        return sum(gap < NEAR * step for gap in self.gaps) / NEAR / max(len(self.gaps), 1)


def quantizable_outputs(model: ir.Model) -> list[str]:
    """The names of the outputs that nodes compute in real numbers: no constants, inputs, indices or truth values."""
    return [
        value_name(value)
        for value in model.graph.outputs
        if value.producer() is not None and (value.dtype is None or value.dtype.is_floating_point())
    ]


def troubles(
    model: ir.Model,
    plan: QuantPlan,
    observers: Mapping[str, Observer],
    outputs: Mapping[str, ChannelSpans],
    gaps: Mapping[str, TopGaps],
) -> list[Trouble]:
    """Everything that int8 is known to suffer from in `model`; `outputs`, `gaps`: what its outputs looked like."""
    checks: Sequence[Callable[[], Iterable[Trouble]]] = (
        lambda: _mixed_outputs(model, plan, outputs),
        lambda: _tied_outputs(model, plan, gaps),
        lambda: _concats(model, plan, observers),
        lambda: _gated(model, plan),
        lambda: _max_pools(model, plan, observers),
        lambda: _normalization(model),
        lambda: _channels(model, plan),
    )
    return [trouble for check in checks for trouble in check()]


def summed_up(found: Iterable[Trouble]) -> list[Finding]:
    """The findings of `found`, those that many nodes share in one: a network of a kind has the same trouble all over.

    The first nodes are named with what was seen at each, the others counted.
    """
    alike: dict[tuple[str, str], list[Finding]] = {}
    for trouble in found:
        alike.setdefault((trouble.finding.rule, trouble.finding.accepted), []).append(trouble.finding)
    return [_as_one(findings) for findings in alike.values()]


def _as_one(findings: Sequence[Finding]) -> Finding:
    first = findings[0]
    if len(findings) == 1:
        return first
    where, seen = ([getattr(each, key) for each in findings] for key in ("where", "seen"))
    return replace(first, where=few(where), seen=first.seen if len(set(seen)) == 1 else few(seen))


def _note(node: ir.Node, rule: str, seen: str, fix: str) -> Finding:
    return Finding(f"{node_key(node)} ({node.op_type})", rule, seen, fix, "note")


def _accept(fix: str) -> str:
    return f'quantize.fixes = ["{fix}"]'


def _mixed_outputs(model: ir.Model, plan: QuantPlan, outputs: Mapping[str, ChannelSpans]) -> Iterable[Trouble]:
    for value in model.graph.outputs:
        spans = outputs[value_name(value)].spans() if value.name in outputs else np.zeros(0)
        used = spans[spans > 0]
        node = value.producer()
        if node is None or value.name not in plan.activations or used.size < 2 or used.max() <= MIXED * used.min():
            continue
        chain = [node]
        while chain[-1].op_type in HULL_OPERATORS and len(activation_inputs(chain[-1])) == 1:
            before = activation_inputs(chain[-1])[0].producer()
            if before is None:
                break
            chain.append(before)
        seen = f"channels with ranges of {used.min():.4g} and {used.max():.4g}"
        finding = _note(node, f"output {value.name} mixes ranges under one scale", seen, _accept("float_outputs"))
        yield Trouble(finding, "float_outputs", tuple(node_key(each) for each in chain))


def _tied_outputs(model: ir.Model, plan: QuantPlan, gaps: Mapping[str, TopGaps]) -> Iterable[Trouble]:
    for value in model.graph.outputs:
        node, params = value.producer(), plan.activations.get(value_name(value))
        if node is None or params is None or value.name not in gaps or node_key(node) in plan.wide_nodes:
            continue
        tied = gaps[value_name(value)].tied(float(params.scale))
        if tied >= TIED and node_key(node) in plan.int8_nodes:
            rule = f"the two largest scores of {value.name} often become the same integer"
            seen = f"within one step in about {100 * tied:.1f} % of the samples"
            yield Trouble(_note(node, rule, seen, _accept("wide_outputs")), "wide_outputs", (node_key(node),))


def _concats(model: ir.Model, plan: QuantPlan, observers: Mapping[str, Observer]) -> Iterable[Trouble]:
    for node in model.graph:
        if node.op_type != "Concat" or node_key(node) not in plan.int8_nodes:
            continue
        ranges = [observers[value_name(v)].range() for v in activation_inputs(node) if v.name in observers]
        spans = [high - low for low, high in ranges if high > low]
        if len(spans) > 1 and max(spans) > UNLIKE * min(spans):
            seen = f"inputs with ranges of {min(spans):.4g} and {max(spans):.4g}"
            finding = _note(node, "joins unlike ranges under one scale", seen, _accept("float_concats"))
            yield Trouble(finding, "float_concats", (node_key(node),))


def _gated(model: ir.Model, plan: QuantPlan) -> Iterable[Trouble]:
    for node in model.graph:
        nodes = (node,) if node.op_type == "HardSwish" else _silu(node)
        keys = tuple(node_key(each) for each in nodes)
        if keys and all(key in plan.int8_nodes for key in keys) and not set(keys) <= set(plan.wide_nodes):
            name = "HardSwish" if node.op_type == "HardSwish" else "SiLU"
            rule = f"{name} needs fine steps around zero and a wide range at once"
            yield Trouble(_note(node, rule, "8 bits", _accept("wide_activations")), "wide_activations", keys)


def _silu(node: ir.Node) -> tuple[ir.Node, ...]:
    """The Sigmoid and Mul of x * Sigmoid(x), where `node` is the Mul; else none."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return ()
    for value, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        gate = value.producer() if value is not None else None
        if gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is other:
            return (gate, node)
    return ()


def _max_pools(model: ir.Model, plan: QuantPlan, observers: Mapping[str, Observer]) -> Iterable[Trouble]:
    for node in model.graph:
        if node.op_type != "MaxPool" or not any(attribute(node, "pads", ())) or node_key(node) not in plan.int8_nodes:
            continue
        source = activation_inputs(node)[0]
        low = observers[value_name(source)].range()[0] if source.name in observers else 0.0
        if low < 0:
            rule = "is padded over negative values: a runtime may pad with an own -infinity operator"
            yield Trouble(_note(node, rule, f"values from {low:.4g}", "padding after a ReLU"))


def _normalization(model: ir.Model) -> Iterable[Trouble]:
    for node in model.graph:
        if node.op_type == "BatchNormalization":
            rule = "was not folded into a layer, and computes in float between integers"
            yield Trouble(_note(node, rule, "no Conv or Gemm alone before it", "a normalization behind a layer"))


def _channels(model: ir.Model, plan: QuantPlan) -> Iterable[Trouble]:
    for node in layers_of(model, plan).values():
        layer = read_layer(node)
        others = tuple(i for i in range(layer.weights.ndim) if i != layer.axis)
        largest = np.abs(layer.weights).max(axis=others)
        most = float(largest.max(initial=0.0))
        dead = int((largest <= DEAD * most).sum())
        if dead:
            rule = f"output channels with next to no weights, under {DEAD:g} of the largest"
            yield Trouble(_note(node, rule, f"{dead} of {largest.size}", "pruning them: [compress.prune]"))
        middle = float(np.median(largest[largest > DEAD * most])) if most else 0.0
        if middle and most > EXPLODING * middle:
            rule = "an output channel whose weights dwarf the others'"
            seen = f"{most:.4g}, median {middle:.4g}"
            yield Trouble(_note(node, rule, seen, 'quantize.refine = ["equalize", "bias_correction"]'))
