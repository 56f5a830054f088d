"""Returns the stage that makes the network smaller while it can still be trained: 1-compress/.

architecture.json, weights.safetensors and model.pt2 hold the network; compress.json what was gained and lost;
metrics.jsonl and metrics.png how training went. Without a `[compress]` table there is no such stage, and export starts
from the recipe's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.models import require_training
from edgeship.pipeline.source_files import loader_files, loader_names, source_files, teacher_files
from edgeship.pipeline.stage import Stage, StageContext

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def run(context: StageContext) -> None:
    """Compresses the recipe's network; what a killed run goes on from is kept in `context.kept`."""
    require_training()
    from edgeship.pipeline.compression.outcome import write_outcome

    recipe = context.recipe
    if recipe.compress is None:
        raise InputError(f"{recipe.path.name} has no [compress] table; there is nothing to compress")
    write_outcome(recipe, recipe.compress, context.targets, context.folder, context.kept, context.progress)


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    return {
        **recipe.dump("model", "input", "compress", "benchmark"),
        "targets": list(targets),
        "loaders": list(loader_names(recipe)),
        "training": None if recipe.data.training is None else recipe.data_digest("training"),
        "evaluation": None if recipe.data.evaluation is None else recipe.data_digest("evaluation"),
    }


def _files(recipe: Recipe) -> Sequence[Path]:
    distill = recipe.compress.distill if recipe.compress else None
    teacher = teacher_files(recipe, "compress.distill", distill.teacher) if distill else []
    return [*source_files(recipe), *loader_files(recipe), *teacher]


STAGE = Stage("compress", (), _settings, run, files=_files, applies=lambda recipe: recipe.compress is not None)
