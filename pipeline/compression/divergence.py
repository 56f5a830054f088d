"""Says that training has diverged: a loss, or what is trained, is no finite number any more."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgeship.calibration.errors import StageError
from edgeship.pipeline.compression.checkpoint import FILE, Position

_NAMED = 3
"""So many tensors are named; the rest are counted."""


def not_finite(model: nn.Module) -> set[str]:
    """The parameters and buffers that hold NaN or infinities."""
    return {
        name
        for name, values in model.state_dict().items()
        if torch.is_tensor(values) and values.is_floating_point() and not bool(torch.isfinite(values).all())
    }


def diverged(seen: str, folder: Path, position: Position, steps: int, rate: float) -> StageError:
    """The error. `seen`: what is not finite, and when; `steps`: those of an epoch; `rate`: the learning rate then.

    `position` is where training is: with `step` of the epoch's steps done.
    """
    kept = folder / FILE
    if kept.exists():
        rest = f"the checkpoint of epoch {position.epoch} is kept in {kept}"
    else:
        rest = f"no epoch of {folder.name} was finished"
    done = position.epoch * steps + position.step
    return StageError(
        f"training: {seen} step {done} (epoch {position.epoch + 1}, batch {position.step}, learning rate {rate:.3g}); "
        f"{rest}; accepted: finite numbers: try a smaller lr, warmup_epochs, clip_norm"
    )


def listed(names: set[str]) -> str:
    """Some of the names."""
    some = sorted(names)[:_NAMED]
    more = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return f"{', '.join(some)}{more}"
