"""Returns the order that numbers the class folders of a recipe's sets, so that a class has one number in all of them.

By itself a set numbers its folders by their sorted names: where it lacks a class, all that come behind it would have
another number than in a set that has them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.recipe_sections import DataField


def class_order(recipe: Recipe, field: DataField) -> tuple[str, ...]:
    """The names that the class folders of `data.<field>` are numbered by; none where their own, sorted, say it.

    They are those of `data.classes`, or else the folders of the set that has them all: `data.training` where the recipe
    trains on it, without it the larger one of `data.calibration` and `data.evaluation`. Raises InputError where neither
    of two sets has all and labels are learnt from them; else folders need not be classes.
    """
    if recipe.data.classes is not None:
        return recipe.class_names
    own, other = set(recipe.class_folders(field)), _other(recipe, field)
    names = recipe.class_folders(other)
    if field == "training" or own <= set(names):
        return names if own and field != "training" else ()
    if set(names) <= own and other != "training":
        return ()
    if names and _is_taught(recipe, field, other):
        raise InputError(_difference(recipe, field, other))
    return ()


def check_class_order(recipe: Recipe) -> None:
    """Raises InputError where calibration samples are in other class folders than those that have all: for classifiers.

    Folders that have no name in common need not be classes.
    """
    own, other = set(recipe.class_folders("calibration")), _other(recipe, "calibration")
    names = set(recipe.class_folders(other))
    nested = own <= names or (names <= own and other != "training")
    if recipe.data.classes is None and own & names and not nested:
        raise InputError(_difference(recipe, "calibration", other))


def _other(recipe: Recipe, field: DataField) -> DataField:
    """The set that the classes of `data.<field>` are looked up in."""
    qat = recipe.quantize.qat
    trains = recipe.compress is not None or (qat is not None and qat.data == "training")
    if trains and recipe.class_folders("training"):
        return "training"
    return "evaluation" if field == "calibration" else "calibration"


def _is_taught(recipe: Recipe, field: DataField, other: DataField) -> bool:
    """Whether classes are learnt that the folders of `data.<field>` and `data.<other>` number in different ways.

    Calibration samples whose labels nobody learns may lie in folders that are no classes, with other names altogether.
    """
    learns_training = other == "training" and _learns_labels(recipe, "training")
    if field == "evaluation":
        return learns_training or (other == "calibration" and _learns_labels(recipe, "calibration"))
    alike = set(recipe.class_folders(field)) & set(recipe.class_folders(other))
    return _learns_labels(recipe, "calibration") or (learns_training and bool(alike))


def _learns_labels(recipe: Recipe, field: DataField) -> bool:
    compress, qat = recipe.compress, recipe.quantize.qat
    if field == "training" and compress is not None and (compress.distill is None or compress.distill.weight < 1):
        return True
    return qat is not None and qat.data == field and qat.objective != "distill"


def _difference(recipe: Recipe, field: DataField, other: DataField) -> str:
    """What is wrong, which folders only one of the sets has, and what is accepted."""
    from edgeship.calibration.samples.checks import few

    own, names = set(recipe.class_folders(field)), set(recipe.class_folders(other))
    alone = [
        f"{few(sorted(found))} in data.{where} alone"
        for found, where in ((own - names, field), (names - own, other))
        if found
    ]
    among = f"folders of data.{field} that data.{other} has too"
    if other != "training":
        among = "the folders of one of them among those of the other"
    return (
        f"{recipe.path.name}: data.{field} and data.{other} have other class folders: {', '.join(alone)}; a class "
        f"would have two numbers, the places of its folder; accepted: {among}, data.classes (a file with all names in "
        "the order of the model's outputs), or lists with labels (CSV)"
    )
