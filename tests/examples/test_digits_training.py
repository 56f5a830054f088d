"""The committed digits are what train.py writes, and the recipe prepares them as training does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from edgeship.calibration.samples.data import open_samples
from edgeship.pipeline.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """examples/digits/train.py, imported as its user runs it: from its folder."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("train")
    sys.path.remove(str(EXAMPLE))
    for name in ("train", "model"):
        sys.modules.pop(name, None)


def committed(part: str) -> dict[str, bytes]:
    """The pixels of each image in a data folder by `<class>/<number>`."""
    files = sorted((EXAMPLE / "data" / part).rglob("*.png"))
    return {f"{path.parent.name}/{path.stem}": np.asarray(Image.open(path)).tobytes() for path in files}


def test_the_committed_images_are_the_held_out_splits(train: ModuleType) -> None:
    _, calibration, evaluation = train.split(seed=0)
    for part, digits in (("calibration", calibration), ("evaluation", evaluation)):
        expected = {
            f"{label}/{number:03d}": image.tobytes()
            for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True))
        }
        assert committed(part) == expected


def test_no_held_out_image_is_a_training_image(train: ModuleType) -> None:
    training, calibration, evaluation = train.split(seed=0)
    parts = [{image.tobytes() for image in digits.images} for digits in (training, calibration, evaluation)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_the_recipe_prepares_images_as_training_does(train: ModuleType) -> None:
    recipe = load_recipe(EXAMPLE / "recipe.toml")
    path = EXAMPLE / "data" / "evaluation"
    samples = open_samples(path, input_name="image", preprocessing=recipe.preprocessing())
    prepared = np.concatenate([sample.feeds["image"] for sample in samples])
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(path.rglob("*.png"))])
    np.testing.assert_allclose(prepared, train.prepare(images).numpy(), rtol=0, atol=1e-6)


def test_mean_and_std_are_those_of_the_training_digits(train: ModuleType) -> None:
    training, _, _ = train.split(seed=0)
    assert round(float(training.images.mean()), 1) == train.MEAN
    assert round(float(training.images.std()), 1) == train.STD


def test_the_committed_weights_are_as_good_as_the_readme_says(train: ModuleType) -> None:
    from safetensors.torch import load_file

    model = train.build()
    model.load_state_dict(load_file(EXAMPLE / "weights.safetensors"))
    _, calibration, evaluation = train.split(seed=0)
    readme = (EXAMPLE / "README.md").read_text()
    assert f"{train.accuracy(model, calibration):g} % on the calibration digits" in readme
    assert f"{train.accuracy(model, evaluation):g} %\non the evaluation digits" in readme
    assert f"{sum(p.numel() for p in model.parameters()) / 1000:.0f} thousand parameters" in readme
