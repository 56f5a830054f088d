"""Returns how far the graph that was trained in torch is from the QDQ model that ships, in steps of the outputs.

Both round at the same points, but sums of floats in another order can land on the other side of a rounding border: a
step now and then is what one has to expect, more would be a defect.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.writing.qdq import output_steps

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.pipeline.compression.batches import Batches

MOST = 20
"""So many samples are compared: each has many values, and the reference takes its time."""


@dataclass(frozen=True)
class Agreement:
    """The largest and the mean difference in steps over the quantized outputs of `samples`."""

    samples: int
    max_steps: float
    mean_steps: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def agreement(model: nn.Module, quantized: ir.Model, data: Batches) -> Agreement | None:
    """How the module, on the device where it is, agrees with ONNX Runtime; None where all outputs are float."""
    from edgeship.targets.onnxruntime import open_reference

    steps = {name: step for name, step in output_steps(quantized).items() if step}
    if not steps:
        return None
    reference = open_reference(to_bytes(quantized))
    device = next(model.parameters()).device
    apart: list[np.ndarray[Any, Any]] = []
    count = 0
    for batch in data.epoch(0):
        inputs = batch.inputs[: MOST - count]
        ours = model(inputs.to(device))
        for place, sample in enumerate(inputs.numpy()):
            theirs = reference.run({reference.inputs[0].name: sample[np.newaxis]})
            for name, step in steps.items():
                difference = np.abs(ours[name][place].cpu().numpy() - theirs[name][0]) / step
                apart.append(difference.reshape(-1))
        count += len(inputs)
        if count >= MOST:
            break
    every = np.rint(np.concatenate(apart))
    return Agreement(count, float(every.max()), float(every.mean()))
