"""What a stage is: a function from files to files, with everything its result depends on declared beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

ORDER = ("compress", "export", "simplify", "quantize", "convert", "parity", "accuracy", "latency", "release")
"""The names of all stages in order; a stage's folder in the run folder is `<place, from 1>-<name>`."""


class Progress(Protocol):
    """Tells the user how far a stage is; does nothing where nobody looks."""

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` steps of `what` are finished."""


@dataclass(frozen=True)
class StageContext:
    """What a running stage sees: the recipe, the finished folders it needs, and the folder it may write to.

    `folder` is temporary and becomes the stage's own in one rename when `run` returns; a stage writes nowhere else,
    but to `cache`: what is found there again is only time saved, since its keys say all that it depends on; and to
    `kept`, which outlives a killed run: the stage finds it again under the same key, until it has finished.
    """

    recipe: Recipe
    targets: tuple[str, ...]
    inputs: Mapping[str, Path]
    folder: Path
    progress: Progress
    cache: Path | None = None
    kept: Path = Path()


@dataclass(frozen=True)
class ModelOutput:
    """A model file that a stage made, for the loop to compare with the golden outputs recorded by export.

    `path` is relative to the stage's folder. `steps`: compare in quantization steps (quantized models) instead of
    within float rounding. `target`: the target whose runtime opens it; None for an ONNX file that the reference
    session opens.
    """

    path: str
    steps: bool = False
    target: str | None = None


@dataclass(frozen=True)
class Stage:
    """One step of the flow.

    `settings` returns the JSON-serializable part of the recipe that the outputs depend on; `files` the files outside
    the run folder that they depend on; together with the digests of the needed stages' outputs and the code version
    they are the key under which the result is kept. `models` lists the model files made, for the golden check.
    A stage that does not apply to a recipe is no part of its flow.
    """

    name: str
    needs: tuple[str, ...]
    settings: Callable[[Recipe, Sequence[str]], Any]
    run: Callable[[StageContext], None]
    files: Callable[[Recipe], Sequence[Path]] = lambda _: ()
    models: Callable[[Recipe, Sequence[str]], Sequence[ModelOutput]] = lambda _recipe, _targets: ()
    applies: Callable[[Recipe], bool] = lambda _: True
