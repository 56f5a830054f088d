"""Returns the optimizer and the learning rate of a step.

    warm-up   lr * (t + 1) / w                         for t < w
    cosine    lr / 2 * (1 + cos(pi * (t - w) / (T - w)))      (Loshchilov & Hutter 2017, without restarts)
    step      lr * factor ** floor(epoch / step_epochs)

t: step, w: steps of warm-up, T: all steps. The rate is a function of the step, so a resumed run needs no state for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.muon import Muon, hidden_matrices
from edgeship.pipeline.training_section import Training


def check_trainable(model: nn.Module) -> None:
    """Nothing. Raises InputError for a network of which nothing can be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        count = sum(1 for _ in model.parameters())
        raise InputError(
            f"the network has nothing to train: none of its {count} parameters has requires_grad; accepted: a factory "
            "whose network can be trained, all of it or a part"
        )


def make_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD, AdamW or Muon over the trainable parameters; those with fewer than two axes are not decayed.

    Raises InputError where there are none.
    """
    check_trainable(model)
    matrices = hidden_matrices(model) if settings.optimizer == "muon" else []
    apart = {id(each.parameter) for each in matrices}
    trained = [each for each in model.parameters() if each.requires_grad and id(each) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
    ]
    for count in sorted({each.groups for each in matrices}):
        alike = [each.parameter for each in matrices if each.groups == count]
        groups.append({"params": alike, "weight_decay": settings.weight_decay, "matrices": count})
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "muon":
        return Muon(groups, settings.lr, settings.momentum)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)


def learning_rate(settings: Training, step: int, steps_per_epoch: int) -> float:
    """The rate of step `step`, counted from 0 over all epochs."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "step":
        return settings.lr * float(settings.step_factor ** (step // steps_per_epoch // settings.step_epochs))
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        return settings.lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return settings.lr
