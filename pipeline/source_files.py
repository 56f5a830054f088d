"""Returns the files outside the run folder that a user's model or function depends on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    from edgeship.pipeline.compress_sections import Teacher
    from edgeship.pipeline.recipe import Recipe


def source_files(recipe: Recipe) -> Sequence[Path]:
    """The model's file, its weights, the files of its external data, and the Python files it may import."""
    files = list(factory_files(recipe, recipe.model.source, "model.source"))
    weights = recipe.weights_path
    return files if weights is None else [*files[:1], weights, *files[1:]]


def loader_files(recipe: Recipe) -> Sequence[Path]:
    """What `data.loaders` names, with its neighbours, and what `data.loader_files` says that it reads."""
    if recipe.data.loaders is None:
        return []
    return [*factory_files(recipe, recipe.data.loaders, "data.loaders"), *_read_by_loaders(recipe).values()]


def loader_names(recipe: Recipe) -> Sequence[str]:
    """The function of `data.loaders` and what the files that it reads are called: class folders say classes, too."""
    return [] if recipe.data.loaders is None else [recipe.data.loaders, *_read_by_loaders(recipe)]


def _read_by_loaders(recipe: Recipe) -> Mapping[str, Path]:
    """The files of `data.loader_files` by name, beside the recipe or else below `data.root`.

    Raises InputError for what is not there.
    """
    from edgeship.calibration.samples.file_tree import DiskTree

    found: dict[str, Path] = {}
    for text in recipe.data.loader_files:
        places = (recipe.resolve(text, "data.loader_files"), recipe.data_root / text)
        path = next((place for place in places if place.exists()), None)
        if path is None:
            looked = " and ".join(str(place) for place in dict.fromkeys(places))
            raise InputError(
                f"{recipe.path.name}: data.loader_files: {text!r} does not exist; looked for {looked}; accepted: "
                "files, and folders of files"
            )
        inside = DiskTree(path).files() if path.is_dir() else None
        found |= {text: path} if inside is None else {f"{text}/{name}": path / name for name in inside}
    return found


def teacher_files(recipe: Recipe, where: str, teacher: Teacher) -> Sequence[Path]:
    """The code and the weights of the teacher of the table `where`."""
    files = factory_files(recipe, teacher.source, f"{where}.teacher.source")
    weights = teacher.weights
    return [*files, *([] if weights is None else [recipe.resolve(weights, f"{where}.teacher.weights")])]


def factory_files(recipe: Recipe, source: str, field: str) -> Sequence[Path]:
    """The file that `source` names and those read with it: an ONNX file's external data, the code a `.py` may import.

    Raises InputError for an ONNX file that is none.
    """
    place, colon, factory = source.rpartition(":")
    if not (colon and factory.isidentifier()):
        place = source
    if place.endswith((".py", ".onnx", ".pt2")) or "/" in place:
        path = recipe.resolve(place, field)
        if path.suffix == ".py":
            return [path, *sorted(each for each in _importable(path.parent) if each != path)]
        return [path, *external_data(path)]
    package = place.split(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [each for folder in spec.submodule_search_locations for each in sorted(Path(folder).rglob("*.py"))]
    return [Path(spec.origin)] if spec.origin and spec.has_location else []


def _importable(folder: Path) -> Iterator[Path]:
    """The Python files that `import` finds from a folder: those in it, and those of packages below it.

    A folder without Python files of its own is not looked into: it holds data, or an environment.
    """
    for place, below, names in os.walk(folder):
        modules = [name for name in names if name.endswith(".py")]
        inside = place == str(folder) or (modules and "pyvenv.cfg" not in names)
        below[:] = [name for name in below if name.isidentifier() and name != "__pycache__"] if inside else []
        if inside:
            yield from (Path(place) / name for name in modules)


def external_data(path: Path) -> Sequence[Path]:
    """The files beside an ONNX model that hold its weights; none for any other file."""
    from edgeship.calibration.graph.onnx_file import external_files

    return external_files(path) if path.suffix == ".onnx" and path.is_file() else []


def model_bytes(path: Path) -> int:
    """The size of a model: its file, and those beside it that hold its weights."""
    return sum(each.stat().st_size for each in (path, *external_data(path)))
