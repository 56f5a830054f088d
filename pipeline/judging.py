"""Returns what parity, accuracy and latency have in common: the samples to judge with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError
from edgeship.pipeline.artifacts import input_shapes

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Samples
    from edgeship.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Jury:
    """The samples artifacts are judged on, and whether they are the recipe's evaluation or calibration data."""

    samples: Samples
    kind: str


def open_jury(recipe: Recipe, simplified: Path) -> Jury:
    """The evaluation samples, or the calibration samples where the recipe has no others."""
    shapes = input_shapes(simplified)
    samples = recipe.evaluation_samples(shapes)
    if samples is not None:
        return Jury(samples, "evaluation")
    return Jury(recipe.calibration_samples(shapes), "calibration")


def jury_digest(recipe: Recipe) -> str:
    """SHA-256 over the samples that `open_jury` gives. Raises InputError when the recipe has no samples at all."""
    digest = recipe.data_digest("evaluation") or recipe.data_digest("calibration")
    if digest is None:
        raise InputError(
            f"{recipe.path.name}: neither data.evaluation nor data.calibration is set; artifacts are judged on samples"
        )
    return digest
