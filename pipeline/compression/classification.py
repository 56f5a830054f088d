"""Returns the loss of a classifier against its labels.

loss = mean_i -sum_c q_ic log softmax(z_i)_c,    q = (1 - s) * onehot + s / classes      (s: label smoothing)

Where samples are mixed, onehot is the mean of both labels' by their shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.batches import Batch
from edgeship.pipeline.compression.loop import scores_of

TEACHER_ALONE = "a teacher alone (distill.weight = 1)"


@dataclass(frozen=True)
class Classification:
    """Cross-entropy with smoothed labels; `instead` is what learns without any."""

    label_smoothing: float = 0.0
    instead: str = TEACHER_ALONE

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss and the scores. Raises InputError where labels are missing or are no classes of the model."""
        scores = scores_of(model(batch.inputs))
        return cross_entropy(scores, batch, self.label_smoothing, self.instead), scores


def cross_entropy(scores: Tensor, batch: Batch, label_smoothing: float, instead: str = TEACHER_ALONE) -> Tensor:
    """The mean loss of scores (n, classes) against the batch's labels, in float32.

    Raises InputError where there are none, with what to ask for `instead`, or they are no classes of the model.
    """
    if batch.labels is None:
        raise InputError(
            f"the training data has no labels, and this loss learns from them; accepted: data with labels, or {instead}"
        )
    classes = scores.shape[1]
    low, high = int(batch.labels.min()), int(batch.labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"the training data has the labels {low}..{high}; accepted: 0..{classes - 1}, the model's {classes} classes"
        )
    if batch.others is None or batch.share_of_own is None:
        return F.cross_entropy(scores.float(), batch.labels, label_smoothing=label_smoothing)
    own, other = (
        F.cross_entropy(scores.float(), labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (batch.labels, batch.others)
    )
    return torch.lerp(other, own, batch.share_of_own).mean()
