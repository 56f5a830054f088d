"""Returns what commands are given as files: models in their runtime, and samples with their preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import InputError

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Preprocessing, Samples
    from edgeship.calibration.types import Session
    from edgeship.pipeline.devices.base import Device
    from edgeship.pipeline.recipe import Recipe


class FilePath(click.Path):
    """A path that is not empty: `--out "$UNSET"` means a mistake, not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as a Path."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


FILE = FilePath(path_type=Path)
DEVICE = click.option(
    "--device",
    default="host",
    show_default=True,
    metavar="WHERE",
    help="Where to run: host, ssh://[user@]host[:port], adb:SERIAL, or a [devices.NAME] of the recipe.",
)


def runtime_of(model: Path) -> str:
    """The name of the target whose runtime opens the file, by its suffix. Raises InputError when none does."""
    if not model.exists():
        raise InputError(f"there is no file {model}")
    known = suffixes()
    if model.suffix not in known:
        raise InputError(f"{model}: no target opens {model.suffix or 'a file without suffix'}; known: {_list(known)}")
    return known[model.suffix]


def suffixes() -> dict[str, str]:
    """The suffixes of the files that targets' runtimes open, each with the target's name."""
    from edgeship.targets.base import load, names

    return {load(name).suffix: name for name in reversed(names())}


def device_of(address: str, recipe: Path | None) -> Device:
    """The device that `--device` means, not yet connected; `recipe` may give it a name."""
    from edgeship.pipeline.devices.base import open_device
    from edgeship.pipeline.recipe import load_recipe

    return open_device(address, load_recipe(recipe).devices if recipe else None)


def open_model(model: Path, threads: int = 1) -> Session:
    """The model in its runtime; a recipe (.toml) stands for its float model as exported from its source."""
    from edgeship.targets.base import load

    if model.suffix == ".toml":
        return open_source(model)
    return load(runtime_of(model)).open(model, threads)


def open_model_on(device: Device, model: Path) -> AbstractContextManager[Session]:
    """The model in its runtime on a connected device, to be entered. Raises InputError for a recipe elsewhere."""
    from edgeship.pipeline.devices.session import open_on

    if model.suffix != ".toml":
        return open_on(device, runtime_of(model), model)
    if device.address != "host":
        raise InputError(f"{model}: a recipe's float model runs here only; accepted for --device: .onnx, .tflite")
    return nullcontext(open_source(model))


def open_source(recipe: Path) -> Session:
    """The recipe's model as its framework runs it."""
    from edgeship.pipeline.models import open_source_session
    from edgeship.pipeline.recipe import load_recipe

    return open_source_session(load_recipe(recipe))


def input_shapes_of(session: Session) -> dict[str, tuple[int, ...]]:
    """The session's inputs by name: their shapes, -1 where dynamic."""
    return {info.name: info.shape for info in session.inputs}


def open_data(
    data: Path,
    inputs: Mapping[str, Sequence[int]],
    *,
    recipe: Path | None = None,
    labels: Path | None = None,
    models: Sequence[Path] = (),
    calibration: bool = False,
) -> Samples:
    """The samples at `data`: a folder or CSV of images, an .npz, or a recipe, whose data and preprocessing are taken.

    Images are preprocessed as `recipe` says, or as the metadata of one of `models` does. Raises InputError when nothing
    says it.
    """
    from edgeship.calibration.samples.data import open_samples
    from edgeship.pipeline.recipe import load_recipe

    if not inputs:
        raise InputError("the model has no inputs; accepted: a model with an image input")
    if data.suffix == ".toml":
        if labels is not None:
            raise InputError(f"--labels {labels}: {data.name} says itself where its labels are; set data.labels there")
        return _recipe_samples(load_recipe(data), inputs, calibration=calibration)
    name = next(iter(inputs))
    if data.suffix == ".npz":
        return open_samples(data, input_name=name, labels=labels, shapes=inputs)
    loaded = load_recipe(recipe) if recipe else None
    preprocessing = preprocessing_of(loaded, models, inputs[name])
    if preprocessing is None:
        raise InputError(f"{data} holds images, and no model says how to preprocess them; give --recipe, or an .npz")
    class_names = loaded.class_names if loaded else ()
    return open_samples(
        data, input_name=name, preprocessing=preprocessing, labels=labels, shapes=inputs, class_names=class_names
    )


def _recipe_samples(recipe: Recipe, inputs: Mapping[str, Sequence[int]], *, calibration: bool) -> Samples:
    """The recipe's samples; images go into the model's one input, whatever the recipe's own model calls it."""
    given = recipe.data_path("calibration" if calibration or recipe.data.evaluation is None else "evaluation")
    is_arrays = given is not None and given.suffix.lower() == ".npz"
    if len(inputs) == 1 and not is_arrays:
        recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update={"name": next(iter(inputs))})})
    if calibration:
        return recipe.calibration_samples(inputs)
    return recipe.evaluation_samples(inputs) or recipe.calibration_samples(inputs)


def preprocessing_of(recipe: Recipe | None, models: Sequence[Path], shape: Sequence[int]) -> Preprocessing | None:
    """What the recipe says, or the metadata of the first model that says anything."""
    from edgeship.calibration.samples.data import Preprocessing
    from edgeship.pipeline.inspection import inspect_model

    if recipe:
        return recipe.preprocessing(shape)
    for model in models:
        if model.suffix != ".toml":
            found = Preprocessing.from_metadata(inspect_model(model).metadata)
            if found:
                return found
    return None


def _list(names: Mapping[str, str]) -> str:
    return ", ".join(sorted(names))
