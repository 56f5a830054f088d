"""Returns the samples that ranges are chosen on, once nothing is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError
from edgeship.pipeline.artifacts import input_shapes, shapes_of
from edgeship.pipeline.class_order import check_class_order
from edgeship.pipeline.judging import decides_on_classes
from edgeship.pipeline.scoring import label_problem

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.checks import Expected
    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.samples.preprocessing import Preprocessing
    from edgeship.calibration.types import Finding
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.recipe_sections import DataField, Input


def calibration_samples(recipe: Recipe, path: Path, model: ir.Model) -> tuple[Samples, list[Finding]]:
    """The recipe's samples for the model at `path`, and what is remarkable about them.

    Raises InputError when they are useless.
    """
    from edgeship.calibration.samples.checks import Expected
    from edgeship.pipeline.source_types import pixel_inputs

    shapes = input_shapes(path)
    decides = decides_on_classes(recipe, model)
    if decides and classes_of(model) > 1:
        check_class_order(recipe)
    samples = recipe.calibration_samples(shapes) if decides else recipe.calibration_samples(shapes).without_labels()
    evaluation = recipe.evaluation_samples(shapes)
    expected = Expected(
        _declared(recipe, next((shape for shape in shapes.values() if len(shape) == 4), ())),
        classes_of(model) if decides else 0,
        () if evaluation is None else evaluation.contents(),
        pixel_inputs(model),
    )
    findings = checked(samples, expected, "data.calibration")
    return samples, [*findings, *data_doubts(recipe, model, shapes)]


def data_doubts(recipe: Recipe, model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    """What speaks against model and data belonging together, by the evaluation samples or else the calibration's.

    Raises InputError for samples of a class that the model does not have.
    """
    from edgeship.pipeline.quantizing.plausibility import doubts, other_inputs
    from edgeship.pipeline.source_types import pixel_inputs

    field: DataField = "evaluation" if _has_labels(recipe.evaluation_samples(shapes)) else "calibration"
    if recipe.data_path(field) is None or not decides_on_classes(recipe, model):
        return []

    def opened(given: Input) -> Samples:
        under = recipe.model_copy(update={"input": given})
        evaluation = under.evaluation_samples(shapes)
        return evaluation if evaluation is not None and field == "evaluation" else under.calibration_samples(shapes)

    samples, classes = opened(recipe.input), classes_of(model)
    if classes > 1:
        check_labels(samples, classes)
    inputs = () if _are_arrays(recipe, field) else other_inputs(recipe.input, pixels=bool(pixel_inputs(model)))
    return doubts(model, classes, samples, ((text, opened(given)) for text, given in inputs))


def check_labels(samples: Samples, classes: int) -> None:
    """Raises InputError for the first sample whose class the model does not have."""
    for name, label in zip(samples.names, samples.labels or (), strict=False):
        if not 0 <= label < classes:
            raise InputError(f"sample {name}: {label_problem(label, classes)}")


def _has_labels(samples: Samples | None) -> bool:
    return samples is not None and samples.has_labels


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


def _are_arrays(recipe: Recipe, field: DataField) -> bool:
    path = recipe.data_path(field)
    return path is not None and path.suffix.lower() == ".npz" and path.is_file()


def _declared(recipe: Recipe, shape: tuple[int, ...]) -> Preprocessing | None:
    """The recipe's preprocessing where its arrays must have gone through it already."""
    are_arrays = _are_arrays(recipe, "calibration")
    return recipe.preprocessing(shape) if are_arrays and _declares(recipe) and shape else None


def declared_of(data: Path, model: ir.Model, recipe: Recipe | None) -> Preprocessing | None:
    """What the arrays at `data` for `model` must have gone through: as the recipe says, or else the model's metadata.

    `data` may be the recipe. None where neither says it, and for images, which are preprocessed here.
    """
    from edgeship.calibration.samples.preprocessing import Preprocessing, channels_of

    shape = next((shape for shape in shapes_of(model).values() if len(shape) == 4), ())
    if recipe is not None and data.suffix == ".toml":
        return _declared(recipe, shape)
    if data.suffix != ".npz" or not shape:
        return None
    if recipe is not None and _declares(recipe):
        sides = recipe.input.shape or shape
        fits = len(sides) == 4 and channels_of(recipe.input.color) in (sides[1], sides[3])
        return recipe.preprocessing(shape) if fits else None
    found = Preprocessing.from_metadata(model.metadata_props)
    says = found is not None and (found.mean, found.std) != (Preprocessing.mean, Preprocessing.std)
    return found if says else None


def _declares(recipe: Recipe) -> bool:
    return bool({"mean", "std"} & recipe.input.model_fields_set)
