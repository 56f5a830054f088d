"""Returns the results of the stages, run in order by the one loop there is; what is up to date is not run again.

A stage's key is SHA-256 over: its name, edgeship's own source files, the versions of the libraries it is built on, the
stage's settings, the files outside the run folder it reads, and the digests of the outputs of the stages it needs. A
stage is up to date when its record has this key and its folder holds exactly what was recorded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgeship.calibration.errors import EdgeshipError, GateError, InputError, StageError
from edgeship.pipeline.stage import ORDER, Stage, StageContext
from edgeship.pipeline.workspace import Artifact, StageRecord, Workspace, sha256_of, stage_folder_name

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

STAGES = ORDER
"""The stages there are, in order; a recipe without [compress] has no compress stage."""

LIBRARIES = (
    *("accelerate", "ai-edge-litert", "flatbuffers", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript"),
    *("onnxsim", "pillow", "safetensors", "tensorflow", "torch", "torch-pruning"),
)
"""The libraries whose version can change what a stage makes."""


@dataclass(frozen=True)
class StageResult:
    """A finished stage: whether its kept result was used, the seconds it took when it ran, and its files."""

    name: str
    cached: bool
    seconds: float
    outputs: tuple[Artifact, ...]

    @property
    def folder(self) -> str:
        """The stage's folder, relative to the run folder."""
        return stage_folder_name(self.name)


class Events(Protocol):
    """Who wants to know how the flow goes."""

    def started(self, stage: str) -> None:
        """A stage begins to run."""

    def progress(self, done: int, total: int, what: str = "") -> None:
        """The running stage has finished `done` of `total` steps of `what`."""

    def finished(self, result: StageResult) -> None:
        """A stage is done, or was up to date."""


class Silent:
    """Events that nobody looks at."""

    def started(self, stage: str) -> None:
        """Does nothing."""

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Does nothing."""

    def finished(self, result: StageResult) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class Span:
    """Which stages to run: up to and including `stop`; from `start` on again, even where they are up to date."""

    start: str | None = None
    stop: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for option, name in (("--from", self.start), ("--to", self.stop)):
            if name is not None and name not in STAGES:
                raise InputError(f"{option} {name}: no such stage; there are: {', '.join(STAGES)}")
        if self.start and self.stop and ORDER.index(self.start) > ORDER.index(self.stop):
            raise InputError(f"--from {self.start} comes after --to {self.stop}; the order is: {', '.join(STAGES)}")

    def includes(self, stage: str) -> bool:
        """Whether the stage is to be done."""
        return self.stop is None or ORDER.index(stage) <= ORDER.index(self.stop)

    def repeats(self, stage: str) -> bool:
        """Whether the stage runs even when it is up to date."""
        return self.force or (self.start is not None and ORDER.index(stage) >= ORDER.index(self.start))


WHOLE = Span()


def load_stages() -> tuple[Stage, ...]:
    """The stages, imported from their modules, in order."""
    return tuple(cast(Stage, importlib.import_module(f"edgeship.pipeline.stages.{name}").STAGE) for name in STAGES)


@dataclass
class Flow:
    """One run: the recipe's stages for some targets in a held workspace."""

    recipe: Recipe
    workspace: Workspace
    targets: Sequence[str]
    span: Span = WHOLE
    events: Events = field(default_factory=Silent)
    stages: Sequence[Stage] = field(default_factory=load_stages)
    records: dict[str, StageRecord] = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)

    @property
    def running(self) -> str | None:
        """The stage that is being done now, or that failed; None when all are done."""
        done = {result.name for result in self.results}
        return next((stage.name for stage in self._included() if stage.name not in done), None)

    def run(self) -> list[StageResult]:
        """What each stage made, in order; also in `results`, for those that finished before one failed.

        Raises StageError naming the stage that failed, or the stage's own EdgeshipError: GateError from release.
        """
        for stage in self._included():
            self.results.append(self._up_to_date(stage))
        return self.results

    def check(self) -> None:
        """Looks at everything outside the run folder that the stages of this run read, before the first one runs.

        Raises InputError for what is missing or cannot be read.
        """
        for option, name in (("--from", self.span.start), ("--to", self.span.stop)):
            if any(stage.name == name and not stage.applies(self.recipe) for stage in self.stages):
                raise InputError(f"{option} {name}: {self.recipe.path.name} has no [{name}] table")
        for stage in self._included():
            stage.settings(self.recipe, self.targets)
            for path in stage.files(self.recipe):
                _readable(stage.name, path)

    def _included(self) -> list[Stage]:
        return [stage for stage in self.stages if self.span.includes(stage.name) and stage.applies(self.recipe)]

    def _up_to_date(self, stage: Stage) -> StageResult:
        needed = {name: self.records[name].digests for name in stage.needs if name in self.records}
        key = stage_key(stage, self.recipe, self.targets, needed)
        record = self.workspace.record(stage.name)
        cached = (
            record is not None
            and record.key == key
            and not self.span.repeats(stage.name)
            and self.workspace.is_intact(record)
        )
        if record is None or not cached:
            record = self._run_stage(stage, key)
        self.records[stage.name] = record
        result = StageResult(stage.name, cached, record.seconds, record.outputs)
        self.events.finished(result)
        return result

    def _run_stage(self, stage: Stage, key: str) -> StageRecord:
        self.events.started(stage.name)
        begun = time.perf_counter()
        try:  # an interrupt may come as soon as the folder is there
            context = StageContext(
                recipe=self.recipe,
                targets=tuple(self.targets),
                inputs={name: self.workspace.path(name) for name in self.records},
                folder=self.workspace.begin(stage.name),
                progress=self.events.progress,
                cache=self.workspace.cache,
                kept=self.workspace.kept(stage.name, key),
            )
            _make(stage, context)
            return self.workspace.commit(stage.name, key, round(time.perf_counter() - begun, 3))
        except GateError:
            self.workspace.remove(stage.name)  # an older release must not be taken for this run's
            raise
        finally:
            self.workspace.abandon(stage.name)


def _make(stage: Stage, context: StageContext) -> None:
    """Runs the stage and checks its models; anything unforeseen becomes one StageError."""
    from edgeship.pipeline.golden import check_models

    try:
        stage.run(context)
        models = stage.models(context.recipe, context.targets)
        if models:
            check_models(stage.name, models, context.folder, context.recipe, context.inputs)
    except EdgeshipError:
        raise
    except MemoryError as error:
        raise StageError(f"{stage.name}: not enough memory") from error
    except OSError as error:
        where = error.filename or context.folder
        raise StageError(f"{stage.name} failed: {where}: {error.strerror or error}") from error
    except Exception as error:
        cause = str(error).strip().splitlines()
        text = cause[0] if cause else "no message"
        raise StageError(f"{stage.name} failed: {type(error).__name__}: {text}") from error


def stage_key(stage: Stage, recipe: Recipe, targets: Sequence[str], needed: Mapping[str, Mapping[str, str]]) -> str:
    """SHA-256 over everything the stage's outputs depend on; `needed`: output digests by path by stage."""
    facts = {
        "stage": stage.name,
        "code": code_digest(),
        "versions": library_versions(),
        "settings": stage.settings(recipe, targets),
        "files": [_digest_outside(stage.name, path) for path in stage.files(recipe)],
        "needs": needed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest_outside(stage: str, path: Path) -> str:
    _readable(stage, path)
    return sha256_of(path)


def _readable(stage: str, path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise InputError(f"{stage}: there is no file {path}") from None
    except OSError as error:
        raise InputError(f"{stage}: cannot read {path}: {error.strerror}") from None


@functools.cache
def code_digest() -> str:
    """SHA-256 over edgeship's own source files."""
    sha = hashlib.sha256()
    for package in ("calibration", "targets", "pipeline"):
        for place in importlib.import_module(f"edgeship.{package}").__path__:
            for path in sorted(Path(place).rglob("*.py")):
                sha.update(f"{package}/{path.relative_to(place).as_posix()}\0".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


@functools.cache
def library_versions() -> Mapping[str, str]:
    """The versions of edgeship, Python and the libraries that are installed, and of other distributions' targets."""
    from edgeship.targets.base import ENTRY_POINTS

    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("edgeship", *LIBRARIES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.dist:
            versions[point.dist.name] = point.dist.version
    return versions


def default_folder(recipe: Recipe) -> Path:
    """`build/<recipe name>` in the current folder."""
    return Path(os.path.curdir) / "build" / recipe.name
