"""Returns how good each artifact is in its real runtime, against the float model on the same samples.

With labels: top-1 and top-5. Without: how often the artifact decides as the float model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeship.calibration.types import Session
from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.compare import Comparison
from edgeship.pipeline.judging import Jury, jury_digest, open_jury
from edgeship.pipeline.scoring import Score, class_scores, drop_of
from edgeship.pipeline.stage import Progress, Stage, StageContext
from edgeship.pipeline.workspace import write_json
from edgeship.targets.base import load

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

FLOAT = "fp32"


def run(context: StageContext) -> None:
    """Writes accuracy.json: the float model's score and each target's, or their agreement where nothing has labels."""
    from edgeship.targets.onnxruntime import open_float

    simplified = context.inputs["simplify"] / "model.onnx"
    jury = open_jury(context.recipe, simplified)
    sessions: dict[str, Session] = {
        name: load(name).open(context.inputs["convert"] / artifact_path(name)) for name in context.targets
    }
    reference = open_float(simplified.read_bytes())
    facts = judge(reference, sessions, jury, context.progress)
    write_json(context.folder / "accuracy.json", facts)


def judge(reference: Session, sessions: Mapping[str, Session], jury: Jury, progress: Progress) -> dict[str, Any]:
    """The scores of the reference and of each session on the jury's samples, as plain values."""
    scores: dict[str, Score] = {name: Score() for name in (FLOAT, *sessions)}
    comparisons = {name: Comparison(decides=jury.decides) for name in sessions}
    for done, sample in enumerate(jury.samples):
        progress(done, len(jury.samples), "samples")
        outputs = {FLOAT: reference.run(sample.feeds)}
        for name, session in sessions.items():
            outputs[name] = session.run(sample.feeds)
            comparisons[name].update(outputs[FLOAT], outputs[name])
        for name, values in outputs.items():
            classes = class_scores(values)
            if sample.label is not None and classes is not None:
                scores[name].update(classes, sample.label, sample.name)
    progress(len(jury.samples), len(jury.samples), "samples")
    scored = jury.samples.has_labels and scores[FLOAT].n > 0
    targets = {}
    for name in sessions:
        score = {**scores[name].to_json(), **drop_of(scores[name], scores[FLOAT])} if scored else {}
        targets[name] = {"n": len(jury.samples), **score, **_against_float(comparisons[name])}
    own = scores[FLOAT].to_json() if scored else {"n": len(jury.samples)}
    return {"data": jury.kind, "labels": scored, "fp32": own, "targets": targets}


def _against_float(comparison: Comparison) -> dict[str, Any]:
    outputs = {name: difference.to_json() for name, difference in sorted(comparison.differences().items())}
    return {"fp32_agreement": comparison.agreement, "outputs": outputs}


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    from edgeship.pipeline.machine import cpu_key

    return {"targets": list(targets), "data": jury_digest(recipe), "cpu": cpu_key()}


STAGE = Stage(name="accuracy", needs=("simplify", "convert"), settings=_settings, run=run)
