"""Returns the samples that ranges are chosen on, once nothing is wrong with them."""

from __future__ import annotations

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
    return samples, checked(samples, expected, "data.calibration")


def checked(samples: Samples, expected: Expected, where: str) -> list[Finding]:
    """The notes on `samples`. Raises InputError with the errors."""
    from edgeship.calibration.samples.checks import check_calibration

    findings = check_calibration(samples, expected)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise InputError(f"{where} cannot be used: {'; '.join(errors)}")
    return findings


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
