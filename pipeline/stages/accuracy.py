"""Returns how good each artifact is in its real runtime, against the float model on the same samples.

With labels: top-1 and top-5. Without: how often the artifact decides as the float model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeship.calibration.types import Session
from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.judging import judge, jury_digest, open_jury
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import write_json
from edgeship.targets.base import load

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def run(context: StageContext) -> None:
    """Writes accuracy.json: the float model's score and each target's, or their agreement where nothing has labels."""
    from edgeship.targets.onnxruntime import open_float

    simplified = context.inputs["simplify"] / "model.onnx"
    jury = open_jury(context.recipe, simplified)
    sessions: dict[str, Session] = {
        name: load(name).open(context.inputs["convert"] / artifact_path(name)) for name in context.targets
    }
    reference = open_float(simplified.read_bytes())
    facts = judge(lambda _place, sample: reference.run(sample.feeds), sessions, jury, context.progress)
    write_json(context.folder / "accuracy.json", facts)


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    from edgeship.pipeline.machine import cpu_key

    return {"targets": list(targets), "data": jury_digest(recipe), "cpu": cpu_key()}


STAGE = Stage(name="accuracy", needs=("simplify", "convert"), settings=_settings, run=run)
