"""Returns the files outside the run folder that a user's model or function depends on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def source_files(recipe: Recipe) -> Sequence[Path]:
    """The model's file, its weights, and the Python files it may import."""
    files = list(factory_files(recipe, recipe.model.source, "model.source"))
    weights = recipe.weights_path
    return files if weights is None else [*files[:1], weights, *files[1:]]


def factory_files(recipe: Recipe, source: str, field: str) -> Sequence[Path]:
    """The file that `source` names, and those it may import: the ones beside a `.py`, all of a package."""
    place, colon, factory = source.rpartition(":")
    if not (colon and factory.isidentifier()):
        place = source
    if place.endswith((".py", ".onnx", ".pt2")) or "/" in place:
        path = recipe.resolve(place, field)
        beside = sorted(each for each in path.parent.glob("*.py") if each != path) if path.suffix == ".py" else []
        return [path, *beside]
    package = place.split(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [each for folder in spec.submodule_search_locations for each in sorted(Path(folder).rglob("*.py"))]
    return [Path(spec.origin)] if spec.origin and spec.has_location else []
