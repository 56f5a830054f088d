"""Returns training batches whose samples are mixed with one another: mixup and CutMix.

    x = w x_i + (1 - w) x_j          labels: s of y_i and 1 - s of y_j, s = mean of w over the sample
    mixup     w = l everywhere, l ~ Beta(alpha, alpha)                                     (Zhang et al. 2018)
    CutMix    w = 0 in a box of the area 1 - l about a point drawn evenly, 1 elsewhere     (Yun et al. 2019)

Every sample draws l, j and the box for itself. A box is cut off at the image's border, and s counts what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.batches import Batch, Batches
from edgeship.pipeline.training_section import Training

Array = np.ndarray[Any, np.dtype[Any]]
_OWN = 0x6D6978
"""Tells these random numbers from those that images are mirrored and moved by."""


@dataclass(frozen=True)
class MixedBatches:
    """The batches of `plain`, mixed as the settings say; what is drawn depends on (seed, epoch, step) alone."""

    plain: Batches
    settings: Training

    @property
    def steps(self) -> int:
        """The number of batches in an epoch."""
        return self.plain.steps

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The global batches of epoch `number` (from 0) without the first `skip`.

        Raises InputError where CutMix should cut what is no image.
        """
        for step, batch in enumerate(self.plain.epoch(number, skip), skip):
            yield mix(batch, self.settings, np.random.default_rng([self.settings.seed, number, step, _OWN]))


def mix(batch: Batch, settings: Training, rng: np.random.Generator) -> Batch:
    """The batch with `mix_share` of its samples mixed with others; it has no `indices`, since none is what it was."""
    inputs, count = batch.inputs, len(batch.inputs)
    other = torch.from_numpy(rng.permutation(count))
    weights = torch.from_numpy(_weights(tuple(inputs.shape), settings, rng).astype(np.float32))
    share = weights.flatten(1).mean(1)
    return Batch(
        torch.lerp(inputs[other], inputs, weights),
        batch.labels,
        others=None if batch.labels is None else batch.labels[other],
        share_of_own=share,
    )


def _weights(shape: tuple[int, ...], settings: Training, rng: np.random.Generator) -> Array:
    """w for each sample, with axes of length 1 where it is the same."""
    count = shape[0]
    flat = (count, *(1,) * (len(shape) - 1))
    mixed = (rng.random(count) < settings.mix_share).reshape(flat)
    cut = (rng.random(count) < _share_of_cutmix(settings)).reshape(flat)
    blended = rng.beta(settings.mixup, settings.mixup, count).reshape(flat) if settings.mixup else np.ones(flat)
    if not settings.cutmix:
        return np.where(mixed, blended, 1.0)
    if len(shape) != 4:
        raise InputError(
            f"training.cutmix is for images [batch, C, H, W]; the input's shape is {['batch', *shape[1:]]}; accepted: 0"
        )
    areas = 1 - rng.beta(settings.cutmix, settings.cutmix, count)
    return np.where(mixed, np.where(cut, _outside_boxes(areas, shape[2:], rng), blended), 1.0)


def _outside_boxes(areas: Array, sides: tuple[int, ...], rng: np.random.Generator) -> Array:
    """(n, 1, H, W): 0 in a box of the share of the area, of the image's proportions, and 1 elsewhere."""
    inside = []
    for side in sides:
        center = rng.uniform(0, side, (len(areas), 1))
        inside.append(np.abs(np.arange(side) + 0.5 - center) < np.sqrt(areas)[:, None] * side / 2)
    rows, columns = inside
    return np.where(rows[:, None, :, None] & columns[:, None, None, :], 0.0, 1.0)


def _share_of_cutmix(settings: Training) -> float:
    """Of the samples that are mixed."""
    return 0.5 if settings.cutmix and settings.mixup else 1.0 if settings.cutmix else 0.0
