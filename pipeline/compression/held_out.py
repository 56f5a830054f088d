"""Returns what training brought on samples it did not see, so that what it made worse is not kept.

With t the float model's outputs and s the quantized one's, over all samples held out:

    SQNR = 10 log10( sum t^2 / sum (t - s)^2 )      the mean over outputs, in dB
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    from edgeship.calibration.learned.graph import TorchGraph
    from edgeship.pipeline.compression.batches import Batches
    from edgeship.pipeline.compression.loop import Loss

EVERY = 5
"""Every fifth sample judges instead of teaching, as in layer reconstruction."""
MOST = 1000
"""Of many samples fewer than a fifth: so many tell plans apart."""


def split(count: int, what: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which of `count` samples teach, and which judge. Raises InputError where there is only one."""
    if count < 2:
        raise InputError(f"quantize.qat: {what} hold {count} sample; accepted: at least 2, one of which judges")
    every = min(max(EVERY, math.ceil(count / MOST)), count)
    judges = np.arange(count) % every == every - 1
    return np.flatnonzero(~judges), np.flatnonzero(judges)


@dataclass(frozen=True)
class Standing:
    """How near the quantized model is to the float one, in dB, and for training with labels its loss."""

    sqnr_db: float
    loss: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The standing before and after training on `samples` held out, and by which of the two numbers it is judged."""

    samples: int
    judged_by: Literal["sqnr_db", "loss"]
    before: Standing
    after: Standing

    @property
    def improved(self) -> bool:
        """Whether training is kept; what is no number is no improvement."""
        if self.judged_by == "loss":
            return (self.after.loss or 0.0) < (self.before.loss or 0.0)
        return self.after.sqnr_db > self.before.sqnr_db

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is no finite number."""
        before, after = (
            {key: value for key, value in asdict(each).items() if key == "sqnr_db" or self.judged_by == "loss"}
            for each in (self.before, self.after)
        )
        return {
            "kept": "trained" if self.improved else "start",
            "judged_by": self.judged_by,
            "held_out": {"samples": self.samples, "before": _finite(before), "after": _finite(after)},
        }


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}


@torch.no_grad()
def standing(
    model: nn.Module, teacher: TorchGraph, data: Batches, device: torch.device, loss: Loss | None
) -> tuple[Standing, int]:
    """How the model stands on all samples of `data`, `loss` told where there is one, and how many they are."""
    was_training = model.training
    model.to(device).eval()
    teacher.to(device)
    signal, noise = (torch.zeros(len(teacher.outputs), dtype=torch.float64) for _ in range(2))
    total, count = 0.0, 0
    for cpu_batch in data.epoch(0):
        batch = cpu_batch.to(device)
        ours: dict[str, Tensor] = model(batch.inputs)
        theirs = teacher({teacher.inputs[0]: batch.inputs})
        signal += torch.stack([theirs[name].double().square().sum() for name in teacher.outputs]).cpu()
        noise += torch.stack([(theirs[n].double() - ours[n].double()).square().sum() for n in teacher.outputs]).cpu()
        if loss is not None:
            total += float(loss(model, batch)[0]) * len(batch.inputs)
        count += len(batch.inputs)
    model.train(was_training)
    decibels = 10 * torch.log10(signal.clamp(min=1e-30) / noise.clamp(min=1e-30))
    return Standing(float(decibels.mean()), None if loss is None else total / count), count
