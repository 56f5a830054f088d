"""Returns whether a model a stage made still computes what the exported one did, on the inputs recorded at export.

The loop runs this check after every stage that makes a model and before the stage's folder takes its place. It tells a
broken model from a good one; how good, is for parity, accuracy and the gates to say.

- Float models (export, simplify, a target's fp32 artifact): the largest error is at most `FLOAT_TOLERANCE` of the
  largest magnitude of the recorded output.
- Quantized ONNX models: at least `QUANTIZED_DB` of SQNR against the recorded float outputs. A model that says always
  the same scores 0 dB, one with unrelated outputs of the right size -3 dB; sound 8-bit models score 10 to 40 dB. Where
  the recorded output is one number throughout, there is no signal: the largest error is held against that number.
- Quantized artifacts of a target: at least `CONVERTED_DB` against the quantized ONNX model they were made from, run on
  the same inputs: a rounding difference of one step in each layer stays above 15 dB.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeship.calibration.errors import EdgeshipError, StageError
from edgeship.calibration.types import Array, Session
from edgeship.pipeline.compare import Comparison, Difference

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.stage import ModelOutput

FLOAT_TOLERANCE = 1e-3
QUANTIZED_DB = 1.0
CONVERTED_DB = 6.0


@dataclass(frozen=True, eq=False)
class Golden:
    """Recorded inputs and outputs: one mapping by name for each sample, every array with a batch of its own."""

    feeds: Sequence[Mapping[str, Array]]
    outputs: Sequence[Mapping[str, Array]]

    def replaced_by(self, session: Session) -> Golden:
        """The same inputs with the outputs of another model."""
        return Golden(self.feeds, [session.run(feeds) for feeds in self.feeds])


def read_golden(path: Path) -> Golden:
    """The samples in a golden.npz with the keys "input:NAME" and "output:NAME", stacked along the first axis.

    Raises StageError for a file that is damaged or holds no samples.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            columns = {key: arrays[key] for key in arrays.files}
        inputs = {key.removeprefix("input:"): values for key, values in columns.items() if key.startswith("input:")}
        outputs = {key.removeprefix("output:"): values for key, values in columns.items() if key.startswith("output:")}
        counts = {len(values) for values in inputs.values()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StageError(f"the golden samples in {path} cannot be read: {error}") from error
    if not inputs or not outputs or len(counts) != 1 or counts == {0}:
        raise StageError(f"{path} holds no usable golden samples: inputs {sorted(inputs)}, outputs {sorted(outputs)}")
    count = counts.pop()
    return Golden(_rows(inputs, count), _rows(outputs, count))


def _rows(columns: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    rows: list[dict[str, Array]] = [{} for _ in range(count)]
    for name, values in columns.items():
        size, rest = divmod(len(values), count)
        if rest or not size:
            raise StageError(f"golden {name!r} has {len(values)} rows for {count} samples")
        for index in range(count):
            rows[index][name] = values[index * size : (index + 1) * size]
    return rows


def check_models(
    stage: str,
    models: Sequence[ModelOutput],
    folder: Path,
    recipe: Recipe,
    inputs: Mapping[str, Path],
) -> None:
    """Compares every model in `folder` with the golden samples; `inputs` are the finished folders of earlier stages.

    Raises StageError naming the stage, the model, the output and how far off it is.
    """
    golden = read_golden((folder if stage == "export" else inputs["export"]) / "golden.npz")
    for model in models:
        try:
            _check_model(model, golden, folder, recipe, inputs)
        except EdgeshipError as error:
            raise StageError(f"{stage}: {model.path} fails the golden check: {error}") from error


def _check_model(model: ModelOutput, golden: Golden, folder: Path, recipe: Recipe, inputs: Mapping[str, Path]) -> None:
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_reference

    path = folder / model.path
    session = load(model.target).open(path) if model.target else open_reference(path, 1)
    floor = QUANTIZED_DB
    if model.steps and model.target:
        quantized = inputs["quantize"] / f"{recipe.quantized_model(model.target)}.onnx"
        golden = golden.replaced_by(open_reference(quantized, 1))
        floor = CONVERTED_DB
    differences = difference_from(golden, session)
    for name, difference in differences.items():
        largest = max(float(np.abs(outputs[name]).max(initial=0.0)) for outputs in golden.outputs)
        problem = _too_noisy(difference, floor, largest) if model.steps else _too_far(difference, largest)
        if problem:
            raise StageError(f"output {name!r} {problem}")


def difference_from(golden: Golden, session: Session) -> dict[str, Difference]:
    """How far a model's outputs are from the recorded ones, by output name."""
    comparison = Comparison()
    for feeds, outputs in zip(golden.feeds, golden.outputs, strict=True):
        comparison.update(outputs, session.run(feeds))
    return comparison.differences()


def _too_far(difference: Difference, largest: float) -> str | None:
    allowed = FLOAT_TOLERANCE * largest + 1e-6
    if difference.max_abs <= allowed:
        return None
    return (
        f"is off by up to {difference.max_abs:.3g} (largest recorded value {largest:.3g}, "
        f"cosine {difference.cosine:.4f}); accepted: {allowed:.3g}, float rounding"
    )


def _too_noisy(difference: Difference, floor: float, largest: float) -> str | None:
    if difference.sqnr_db >= floor:
        return None
    if difference.sqnr_db == -math.inf:
        allowed = largest * 10 ** (-floor / 20)
        if difference.max_abs <= allowed:
            return None
        return (
            f"is off by up to {difference.max_abs:.3g} where {largest:.3g} was recorded throughout; "
            f"accepted: {allowed:.3g}"
        )
    return (
        f"has {difference.sqnr_db:.1f} dB SQNR (up to {difference.max_steps:.0f} steps off, "
        f"cosine {difference.cosine:.4f}); accepted: at least {floor:.0f} dB"
    )
