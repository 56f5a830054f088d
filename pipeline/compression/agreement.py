"""Returns how far the graph that was trained in torch is from the QDQ model that ships, in quantization steps.

Both round at the same points, but sums of floats in another order can land on the other side of a rounding border. So
a layer that is given the same values may differ by one step now and then; more would be a defect. From the input to the
outputs such steps add up: a deep network can end two steps apart with every layer right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeship.calibration.graph.operators import constant_array, value_name
from edgeship.calibration.observing.expose import Exposer
from edgeship.calibration.readback.exact import is_whole
from edgeship.calibration.writing.qdq import output_steps
from edgeship.pipeline.compression.checkpoint import seeded

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.learned.fake_quant import FakeQuantGraph
    from edgeship.pipeline.compression.batches import Batches

MOST = 20
"""So many samples are compared: each has many values, and the reference takes its time."""


@dataclass(frozen=True)
class Agreement:
    """Differences in steps over `samples`: of the quantized outputs the largest and the mean, from input to output, and
    of all quantized values the largest where each is computed from the reference's values before it.
    """

    samples: int
    max_steps: float
    mean_steps: float
    layer_max_steps: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@seeded()
@torch.no_grad()
def agreement(graph: FakeQuantGraph, quantized: ir.Model, data: Batches) -> Agreement | None:
    """How the graph, on the device where it is, agrees with ONNX Runtime; None where all outputs are float.

    A loader that draws numbers draws the same ones each time.
    """
    from edgeship.targets.onnxruntime import open_reference

    outputs = [name for name, step in output_steps(quantized).items() if step]
    if not outputs:
        return None
    steps = _value_steps(quantized)
    exposed = Exposer(quantized)
    reference = open_reference(exposed(list(steps)), weights=exposed.weights)
    (name,) = graph.inputs
    device = next(graph.parameters()).device
    apart: list[np.ndarray[Any, Any]] = []
    layers: list[float] = []
    for sample in islice(_samples(data), MOST):
        feeds = {name: sample.to(device)}
        theirs = reference.run({name: sample.numpy()})
        ours = graph(feeds)
        apart += [_apart(ours[each], theirs[each], steps[each]).reshape(-1) for each in outputs]
        layers.append(_largest_of_layers(graph, feeds, theirs, steps))
    every = np.concatenate(apart)
    return Agreement(len(layers), float(every.max()), float(every.mean()), max(layers))


def _samples(data: Batches) -> Iterator[torch.Tensor]:
    for batch in data.epoch(0):
        yield from (sample.unsqueeze(0) for sample in batch.inputs)


def _value_steps(quantized: ir.Model) -> dict[str, float]:
    """The scale of every value that is quantized while the model runs."""
    steps = {}
    for node in quantized.graph:
        source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        scale = constant_array(node.inputs[1]) if source is not None and source.op_type == "QuantizeLinear" else None
        if scale is not None and scale.size == 1 and source is not None and not is_whole(node, source):
            steps[value_name(node.outputs[0])] = float(scale.reshape(()))
    return steps


def _largest_of_layers(
    graph: FakeQuantGraph, feeds: Mapping[str, torch.Tensor], theirs: Mapping[str, Any], steps: Mapping[str, float]
) -> float:
    """Runs step after step; what the reference has of a value takes its place for all that follow."""
    given = graph.given()
    values = {**graph.graph.constants(), **feeds, **given}
    largest = 0.0
    for step in graph.graph.steps:
        if all(name in given for name in step.outputs):
            continue
        graph.graph.run_step(step, values)
        for name in steps.keys() & set(step.outputs):
            largest = max(largest, float(_apart(values[name], theirs[name], steps[name]).max()))
            values[name] = torch.from_numpy(theirs[name]).to(values[name].device)
    return largest


def _apart(ours: torch.Tensor, theirs: np.ndarray[Any, Any], step: float) -> np.ndarray[Any, Any]:
    return np.asarray(np.rint(np.abs(ours.cpu().numpy() - theirs) / step))
