"""Returns the recipe's training and held-out data as batches.

Images are decoded once, into one file of pixels beside the checkpoints (uint8, n x channels x height x width), and read
from there by every epoch: decoding again and again would take longer than training a small network. A user's own
`loaders()` is used as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compression.batches import ArrayBatches, Augmentation, Batches, LoaderBatches
from edgeship.pipeline.training_section import Training

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Samples
    from edgeship.pipeline.recipe import Recipe

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TrainingData:
    """Batches to train on and to judge by (None: there are no held-out samples), and what identifies the former."""

    training: Batches
    held_out: Batches | None
    digest: str


def open_training_data(
    recipe: Recipe, settings: Training, folder: Path, tell: Tell, *, evaluation: bool = True
) -> TrainingData:
    """The data of `data.training`, or what `data.loaders` returns; decoded pixels are kept in `folder`.

    Beside `data.training` the evaluation samples are held out, where `evaluation` asks for them and they have labels.
    Raises InputError where neither is set, or both are, and for data that does not fit.
    """
    shape = input_shape(recipe)
    if recipe.data.loaders is not None:
        return _from_loaders(recipe, shape)
    if recipe.data.training is None:
        raise InputError(
            f"{recipe.path.name}: training needs data.training (a folder of class folders, a CSV, an .npz) or "
            "data.loaders (PATH.py:function)"
        )
    training = _batches(recipe, "training", settings, folder, tell)
    judged = evaluation and recipe.data.evaluation is not None
    held_out = _batches(recipe, "evaluation", settings, folder, tell) if judged else None
    if held_out is not None and held_out.labels is None:
        held_out = None
    return TrainingData(training, held_out, recipe.data_digest("training") or "")


def input_shape(recipe: Recipe) -> tuple[int, ...]:
    """The shape of one sample with a batch of 1. Raises InputError where the recipe has none."""
    if recipe.input.shape is None:
        raise InputError(f"{recipe.path.name}: input.shape is not set, and training needs it; accepted: [1, C, H, W]")
    return (1, *(int(side) for side in recipe.input.shape[1:]))


def _batches(
    recipe: Recipe, field: Literal["training", "evaluation"], settings: Training, folder: Path, tell: Tell
) -> ArrayBatches:
    shape = input_shape(recipe)
    name = recipe.input.name or "input"
    path = recipe.data_path(field)
    is_arrays = path is not None and path.suffix.lower() == ".npz" and path.is_file()
    samples = recipe.pixel_samples(field, {name: (-1, *shape[1:])})
    kept = folder / f"{field}-{(recipe.data_digest(field) or '')[:16]}.npy"
    values = _decoded(samples, kept, np.dtype(np.float32 if is_arrays else np.uint8), tell)
    mean, std = ((0.0,), (1.0,)) if is_arrays else (recipe.input.mean, recipe.input.std)
    border = tuple(float(-each / by) for each, by in zip(*_same_length(mean, std), strict=True))
    varied = Augmentation(settings.flip, settings.shift, border)
    trained = field == "training"
    return ArrayBatches(
        values,
        samples.labels,
        settings.batch_size,
        mean,
        std,
        varied if trained else Augmentation(),
        settings.seed,
        shuffle=trained,
    )


def _same_length(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count = max(len(mean), len(std))
    return (mean * count)[:count], (std * count)[:count]


def _decoded(samples: Samples, path: Path, dtype: np.dtype[Any], tell: Tell) -> np.ndarray[Any, Any]:
    """All samples in one array mapped from the file, which is made unless it is there and whole."""
    kept = _whole(path, len(samples), dtype)
    if kept is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        array: np.memmap[Any, Any] | None = None
        for place, sample in enumerate(samples):
            values = next(iter(sample.feeds.values()))
            if array is None:
                size = (len(samples), *values.shape[1:])
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=size)
            array[place] = values[0]
            tell(place + 1, len(samples), "samples decoded")
        if array is None:
            raise InputError("the training data holds no samples")
        array.flush()
        temporary.replace(path)
        kept = np.load(path, mmap_mode="r")
    return kept


def _whole(path: Path, count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
    """The array in the file; None where there is none, or the file was cut short."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == dtype and found.shape[:1] == (count,) else None


def _from_loaders(recipe: Recipe, shape: tuple[int, ...]) -> TrainingData:
    from edgeship.pipeline.models import call_factory

    assert recipe.data.loaders is not None
    place, _, function = recipe.data.loaders.rpartition(":")
    if not place or not function.isidentifier():
        raise InputError(f"{recipe.path.name}: data.loaders = {recipe.data.loaders!r}; accepted: PATH.py:function")
    if recipe.data.training is not None:
        raise InputError(f"{recipe.path.name}: data.training and data.loaders are both set; accepted: one of them")
    source = recipe.resolve(place, "data.loaders") if place.endswith(".py") else place
    made = call_factory(source, function, {})
    if isinstance(made, Mapping):
        unknown = sorted(set(made) - {"training", "held_out"})
        if unknown or "training" not in made:
            raise InputError(f"{recipe.data.loaders} returns the keys {sorted(made)}; accepted: training, held_out")
        parts = [made["training"], *([made["held_out"]] if made.get("held_out") is not None else [])]
    else:
        parts = list(made) if isinstance(made, tuple) else [made]
    if len(parts) not in (1, 2):
        raise InputError(
            f"{recipe.data.loaders} returns {len(parts)} loaders; accepted: training, or (training, held_out)"
        )
    names = ("training", "held_out")
    training, *rest = (
        LoaderBatches(part, f"{recipe.data.loaders} ({name})", shape) for part, name in zip(parts, names, strict=False)
    )
    return TrainingData(training, rest[0] if rest else None, recipe.data.loaders)
