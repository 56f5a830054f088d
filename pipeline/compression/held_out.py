"""Returns what training brought on samples it did not see, so that what it made worse is not kept.

With t the float model's outputs and s the quantized one's, over all samples held out:

    SQNR = 10 log10( sum t^2 / sum (t - s)^2 )      the mean over outputs, in dB

Training that shall have the float model's outputs must raise it. Training on classes leaves the float model behind and
is judged by its loss, l, after against before in each of k parts of the samples:

    d = mean(l_after - l_before),   e = std(l_after - l_before) / sqrt(k)       worse where d > 2 e

Worse it must not be; better it cannot always be seen to be: where the float model was trained on these very samples, it
knows their classes by heart, and a plan that has learnt for more than them forgets a little of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.checkpoint import seeded

if TYPE_CHECKING:
    from edgeship.calibration.learned.graph import TorchGraph
    from edgeship.pipeline.compression.batches import Batches
    from edgeship.pipeline.compression.loop import Loss

EVERY = 5
"""Every fifth sample judges instead of teaching, as in layer reconstruction."""
MOST = 1000
"""Of many samples fewer than a fifth: so many tell plans apart."""
PARTS = 20
"""In how many parts, at least, the samples held out are judged, so that chance can be told from a difference."""


def split(count: int, what: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Which of `count` samples teach, and which judge. Raises InputError where there is only one."""
    if count < 2:
        raise InputError(f"quantize.qat: {what} hold {count} sample; accepted: at least 2, one of which judges")
    every = min(max(EVERY, math.ceil(count / MOST)), count)
    judges = np.arange(count) % every == every - 1
    return np.flatnonzero(~judges), np.flatnonzero(judges)


@dataclass(frozen=True)
class Standing:
    """How near the quantized model is to the float one, in dB, and for training on classes its loss in each part."""

    sqnr_db: float
    losses: tuple[float, ...] = ()

    @property
    def loss(self) -> float | None:
        """The mean loss, where there is one."""
        return sum(self.losses) / len(self.losses) if self.losses else None


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
            difference, error = self.loss_difference
            return difference <= 2 * error
        return self.after.sqnr_db > self.before.sqnr_db

    @property
    def loss_difference(self) -> tuple[float, float]:
        """How much larger the loss became, and the standard error of that."""
        differences = np.subtract(self.after.losses, self.before.losses)
        error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return float(differences.mean()), error

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is no finite number."""
        held_out: dict[str, Any] = {"samples": self.samples}
        for name, each in (("before", self.before), ("after", self.after)):
            held_out[name] = {"sqnr_db": _finite(each.sqnr_db)}
            if each.loss is not None:
                held_out[name]["loss"] = _finite(each.loss)
        if self.judged_by == "loss":
            held_out["loss_difference"], held_out["standard_error"] = map(_finite, self.loss_difference)
        return {
            "kept": "trained" if self.improved else "start",
            "judged_by": self.judged_by,
            "held_out": held_out,
        }


def real_outputs(outputs: Mapping[str, Tensor]) -> list[str]:
    """The names of the outputs that are floats: the integers of an ArgMax have no distance, and teach nothing.

    Raises InputError where there is none.
    """
    real = [name for name, values in outputs.items() if values.is_floating_point()]
    if not real:
        raise InputError(
            f"quantize.qat: all outputs of the model are integers ({', '.join(outputs)}), which nothing can be learnt "
            "from; accepted: a model with an output of floats"
        )
    return real


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@seeded()
@torch.no_grad()
def standing(  # noqa: PLR0913, PLR0917 - what, against what, on what, where, by what, and who watches
    model: nn.Module,
    teacher: TorchGraph,
    data: Batches,
    device: torch.device,
    loss: Loss | None,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Standing, int]:
    """How the model stands on all samples of `data`, `loss` told where there is one, and how many they are.

    A loader that draws numbers draws the same ones each time, so that the parts before and after can be compared.
    `tell` hears how many of the batches are done.
    """
    was_training = model.training
    model.to(device).eval()
    teacher.to(device)
    signal, noise = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    losses: list[float] = []
    count = 0
    for place, cpu_batch in enumerate(data.epoch(0)):
        batch = cpu_batch.to(device)
        ours: dict[str, Tensor] = model(batch.inputs)
        theirs = teacher({teacher.inputs[0]: batch.inputs})
        real = real_outputs(theirs)
        signal = signal + torch.stack([theirs[name].double().square().sum() for name in real]).cpu()
        noise = noise + torch.stack([(theirs[n].double() - ours[n].double()).square().sum() for n in real]).cpu()
        if loss is not None:
            losses.append(float(loss(model, batch)[0]))
        count += len(batch.inputs)
        tell(place + 1, data.steps)
    model.train(was_training)
    decibels = 10 * torch.log10(signal.clamp(min=1e-30) / noise.clamp(min=1e-30))
    return Standing(float(decibels.mean()), tuple(losses)), count
