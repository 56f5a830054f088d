"""Returns which artifacts of two releases belong together, and what the releases were made from otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.releasing.verify import MANIFEST
from edgeship.pipeline.workspace import stage_folder_name

DESCRIBED = ("inputs", "settings", "versions")
"""The parts of a manifest that say what a release was made from."""


@dataclass(frozen=True)
class Pairs:
    """The artifacts (of A, of B) by target, targets that only one of them has, and what changed, in words."""

    artifacts: Mapping[str, tuple[Path, Path]]
    alone: tuple[str, ...]
    changes: tuple[str, ...]


def pair_releases(a: Path, b: Path) -> Pairs:
    """The artifacts of the releases in two folders: a release's own, or a run folder, whose release is taken.

    Raises InputError for a folder without release, releases without a target in common, or a file beside a folder.
    """
    for path, other in ((a, b), (b, a)):
        if not path.is_dir():
            raise InputError(f"{other} is a folder, and {path} is none; accepted: two models, or two releases")
    (one, first), (other, second) = (_release(folder) for folder in (a, b))
    ours, theirs = _artifacts(one, first), _artifacts(other, second)
    common = [target for target in ours if target in theirs]
    if not common:
        raise InputError(
            f"{a} has artifacts for {', '.join(ours)}, {b} for {', '.join(theirs)}; accepted: releases with a target "
            "in common"
        )
    changes = [line for part in DESCRIBED for line in _changes(part, first.get(part), second.get(part))]
    alone = [f"{target} is in {a} only" for target in ours if target not in theirs]
    alone += [f"{target} is in {b} only" for target in theirs if target not in ours]
    return Pairs({target: (ours[target], theirs[target]) for target in common}, tuple(alone), tuple(changes))


def _release(folder: Path) -> tuple[Path, dict[str, Any]]:
    inner = folder / stage_folder_name("release")
    place = inner if inner.is_dir() else folder
    path = place / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no release (no {MANIFEST}); accepted: a release, or the folder of a run that made one"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("artifacts"), dict) or not manifest["artifacts"]:
        raise InputError(f"{path} lists no artifacts; accepted: the manifest.json that edgeship wrote")
    return place, manifest


def _artifacts(place: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    found = {}
    for name, facts in manifest["artifacts"].items():
        path = place / name
        if not path.is_file():
            raise InputError(f"{path} is missing, and {MANIFEST} lists it; `edgeship verify {place}` says what else is")
        found[str(facts["target"])] = path
    return found


def _changes(where: str, before: Any, after: Any) -> Iterator[str]:
    """What differs of two JSON values, a line for each key; of digests only that they do.

    A key that one of them has not is one that says nothing.
    """
    if before == after or not (before or after):
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            yield from _changes(f"{where}.{key}", before.get(key), after.get(key))
    elif where.startswith("inputs."):
        yield f"{where.removeprefix('inputs.')}: another one"
    else:
        yield f"{where.partition('.')[2]}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
