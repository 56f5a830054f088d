"""Returns what a folder of `compress` or `train` was made from, which its `made.json` says:

- `key`: SHA-256 over all that the result depends on, edgeship's own code and its libraries' versions included;
- `settings` and `files`: the part of the recipe, and the digests of the files that it reads, which are the same on
  another machine;
- `outputs`: the files that were made, with SHA-256 and size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.flow import stage_key
from edgeship.pipeline.recipe_reader import shown
from edgeship.pipeline.stages.compress import STAGE
from edgeship.pipeline.workspace import Artifact, Workspace, sha256_of, write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

FILE, RECORD = "made.json", "compress.json"


@dataclass(frozen=True)
class Origin:
    """What a result is made from."""

    key: str
    settings: Mapping[str, Any]
    files: Sequence[str]


def origin_of(recipe: Recipe, targets: Sequence[str]) -> Origin:
    """What the recipe's compression would be made from now. Raises InputError for files that cannot be read."""
    key = stage_key(STAGE, recipe, targets, {})
    settings = json.loads(json.dumps(STAGE.settings(recipe, targets)))
    return Origin(key, settings, [sha256_of(path) for path in STAGE.files(recipe)])


def write_made(folder: Path, origin: Origin, names: Sequence[str]) -> None:
    """Says in the folder what the files of these names were made from."""
    outputs = [Artifact(name, sha256_of(folder / name), (folder / name).stat().st_size) for name in sorted(names)]
    write_json(folder / FILE, {**asdict(origin), "outputs": [asdict(each) for each in outputs]})


def is_up_to_date(folder: Path, origin: Origin) -> bool:
    """Whether the folder holds what would be made, whole."""
    try:
        found, outputs = _read(folder)
    except InputError:
        return False
    return found.key == origin.key and not list(_damaged(folder, outputs))


def read_facts(folder: Path) -> dict[str, Any]:
    """The record of what compression gained and lost."""
    return dict(json.loads((folder / RECORD).read_text("utf-8")))


def adopt(recipe: Recipe, targets: Sequence[str], folder: Path, workspace: Workspace) -> None:
    """Puts what `folder` holds in the place of the compress stage's result, which is then up to date.

    It may have been made on another machine, by other versions. Raises InputError where there is no such result, or it
    was made from another recipe or other files.
    """
    found, outputs = _read(folder)
    asked = origin_of(recipe, targets)
    for reason in (*_damaged(folder, outputs), *_differences(found, asked)):
        raise InputError(
            f"--compressed {folder}: {reason}; accepted: a folder as `edgeship compress {recipe.path.name}` writes it, "
            "with the same --set and for the same targets"
        )
    place = workspace.begin(STAGE.name)
    for each in outputs:
        shutil.copyfile(folder / each.path, place / each.path)
    workspace.commit(STAGE.name, asked.key, 0.0)


def _read(folder: Path) -> tuple[Origin, list[Artifact]]:
    try:
        values = json.loads((folder / FILE).read_text("utf-8"))
        outputs = [Artifact(**each) for each in values["outputs"]]
        found = Origin(str(values["key"]), dict(values["settings"]), list(values["files"]))
        named = all(Path(each.path).name == each.path for each in outputs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--compressed {folder}: {FILE} cannot be read: {type(error).__name__}: {error}; accepted: a folder that "
            "`edgeship compress` wrote"
        ) from error
    if not named:
        raise InputError(f"--compressed {folder}: {FILE} names files that are not in the folder; accepted: names alone")
    return found, outputs


def _damaged(folder: Path, outputs: Sequence[Artifact]) -> Iterator[str]:
    for each in outputs:
        path = folder / each.path
        if not path.is_file() or sha256_of(path) != each.sha256:
            yield f"{each.path} is {'damaged' if path.is_file() else 'missing'}"


def _differences(found: Origin, asked: Origin) -> Iterator[str]:
    there, here = (dict(_leaves(each.settings)) for each in (found, asked))
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            values = (shown(each.get(name)) for each in (there, here))
            yield "it was made with {} = {}, the recipe has {}".format(name, *values)
    if found.files != asked.files:
        yield "the code or weights of the model, or what else it is trained with, are not those it was made from"


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from _leaves(each, f"{prefix}{name}.")
        else:
            yield prefix + name, each
