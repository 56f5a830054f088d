"""Returns what judging has in common: the samples to judge with, and how good artifacts are on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.artifacts import input_shapes
from edgeship.pipeline.compare import Comparison
from edgeship.pipeline.scoring import Score, class_scores, drop_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Sample, Samples
    from edgeship.calibration.types import Array, Session
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.stage import Progress

FLOAT = "fp32"
_SAME_VALUES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze"})
_SAME_LENGTH = frozenset({"Add", "Clip", "Expand", "Identity", "Max"})
"""What a length goes through before something is divided by it: it must not be zero, and has the vector's shape."""


@dataclass(frozen=True)
class Jury:
    """The samples artifacts are judged on, and whether they are the recipe's evaluation or calibration data.

    `decides`: whether the model's outputs are scores, of which the largest is a decision. The samples have classes only
    where it does.
    """

    samples: Samples
    kind: str
    decides: bool


def open_jury(recipe: Recipe, simplified: Path) -> Jury:
    """The evaluation samples, or the calibration samples where the recipe has no others."""
    from edgeship.calibration.graph.onnx_file import load_onnx

    shapes, decides = input_shapes(simplified), decides_on_classes(recipe, load_onnx(simplified))
    samples = recipe.evaluation_samples(shapes)
    kind = "calibration" if samples is None else "evaluation"
    given = recipe.calibration_samples(shapes) if samples is None else samples
    return Jury(given if decides else given.without_labels(), kind, decides)


def judge(
    reference: Callable[[int, Sample], Mapping[str, Array]],
    sessions: Mapping[str, Session],
    jury: Jury,
    progress: Progress,
) -> dict[str, Any]:
    """The scores of the float model and of each session on the jury's samples, as plain values.

    `reference` gives the float model's outputs for a sample, which is told by its place, too.
    """
    scores: dict[str, Score] = {name: Score() for name in (FLOAT, *sessions)}
    comparisons = {name: Comparison(decides=jury.decides) for name in sessions}
    for done, sample in enumerate(jury.samples):
        progress(done, len(jury.samples), "samples")
        outputs = {FLOAT: reference(done, sample)}
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


def decides_on_classes(recipe: Recipe, model: ir.Model) -> bool:
    """Whether the outputs of the simplified model are scores of classes, as `model.outputs` says or the graph tells."""
    if recipe.model.outputs != "auto":
        return recipe.model.outputs == "classes"
    return not any(_has_unit_length(value) for value in model.graph.outputs)


def _has_unit_length(value: ir.Value) -> bool:
    """Whether the output is a vector divided by its length."""
    node = _producer(value, _SAME_VALUES)
    if node is None or node.op_type != "Div":
        return node is not None and node.op_type == "LpNormalization"
    vector, length = node.inputs
    norm = None if length is None else _producer(length, _SAME_LENGTH)
    return norm is not None and norm.op_type == "ReduceL2" and norm.inputs[0] is vector


def _producer(value: ir.Value, passing: frozenset[str]) -> ir.Node | None:
    """The node that computes the value, behind nodes of the `passing` operators."""
    node = value.producer()
    while node is not None and node.op_type in passing and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def jury_digest(recipe: Recipe) -> str:
    """SHA-256 over what `open_jury` gives. Raises InputError when the recipe has no samples at all."""
    digest = recipe.data_digest("evaluation") or recipe.data_digest("calibration")
    if digest is None:
        raise InputError(
            f"{recipe.path.name}: neither data.evaluation nor data.calibration is set; artifacts are judged on samples"
        )
    return hashlib.sha256(f"{digest} {recipe.model.outputs}".encode()).hexdigest()
