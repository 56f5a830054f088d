"""Returns the samples that ranges are chosen on, once nothing is wrong with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError
from edgeship.pipeline.artifacts import input_shapes

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.checks import Expected
    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.samples.preprocessing import Preprocessing
    from edgeship.calibration.types import Finding
    from edgeship.pipeline.recipe import Recipe

ASKED = (16, 64)
"""The fewest labelled samples that tell a model from a guess, and the most that it is asked about."""
CHANCE = 0.01
"""A score that a guess reaches more often than this is no better than guessing."""


def calibration_samples(recipe: Recipe, path: Path, model: ir.Model) -> tuple[Samples, list[Finding]]:
    """The recipe's samples for the model at `path`, and what is remarkable about them.

    Raises InputError when they are useless.
    """
    from edgeship.calibration.samples.checks import Expected

    shapes = input_shapes(path)
    samples = recipe.calibration_samples(shapes)
    evaluation = recipe.evaluation_samples(shapes)
    expected = Expected(
        _declared(recipe, next(iter(shapes.values()), ())),
        classes_of(model),
        () if evaluation is None else evaluation.contents(),
    )
    findings = checked(samples, expected, "data.calibration")
    labelled = samples if samples.has_labels or evaluation is None else evaluation
    return samples, [*findings, *guessing(model, labelled)]


def checked(samples: Samples, expected: Expected, where: str) -> list[Finding]:
    """The notes on `samples`. Raises InputError with the errors."""
    from edgeship.calibration.samples.checks import check_calibration

    findings = check_calibration(samples, expected)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise InputError(f"{where} cannot be used: {'; '.join(errors)}")
    return findings


def guessing(model: ir.Model, samples: Samples) -> list[Finding]:
    """A note where the float `model` is right no more often than by guessing, on the first labelled `samples`.

    Wrong preprocessing, labels of another order or weights that were not loaded look like this, and int8 keeps it.
    """
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.calibration.types import Finding
    from edgeship.pipeline.scoring import class_scores
    from edgeship.targets.onnxruntime import open_float

    classes, fewest = classes_of(model), ASKED[0]
    few = samples.take(min(len(samples), ASKED[1]))
    if classes < 2 or not few.has_labels or len(few) < fewest:
        return []
    session, right = open_float(to_bytes(model)), 0
    for sample in few:
        scores = class_scores(session.run(sample.feeds))
        right += scores is not None and int(scores.argmax()) == sample.label
    if _chance(right, len(few), 1 / classes) <= CHANCE:
        return []
    rule = "the float model is no better than guessing: wrong preprocessing, labels in another order, or no weights"
    seen = f"{right} of {len(few)} right, {classes} classes"
    return [Finding("model and data", rule, seen, "a model that knows these classes", "note")]


def _chance(right: int, count: int, p: float) -> float:
    """The probability of at least so many hits in `count` guesses that are right with probability `p`."""
    return math.fsum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(right, count + 1))


def classes_of(model: ir.Model) -> int:
    """How many classes the model tells apart: the length of its only output of shape (batch, classes); else 0."""
    flat = [value.shape for value in model.graph.outputs if value.shape is not None and len(value.shape) == 2]
    return int(flat[0][1]) if len(flat) == 1 and isinstance(flat[0][1], int) else 0


def _declared(recipe: Recipe, shape: tuple[int, ...]) -> Preprocessing | None:
    """The recipe's preprocessing where its arrays must have gone through it already."""
    path = recipe.data_path("calibration")
    are_arrays = path is not None and path.suffix.lower() == ".npz" and path.is_file()
    says = {"mean", "std"} & recipe.input.model_fields_set
    return recipe.preprocessing(shape) if are_arrays and says and len(shape) == 4 else None
