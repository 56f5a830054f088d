"""Arrays given to a command are held against the preprocessing that its recipe or the model's metadata declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeship.calibration.samples.preprocessing import Preprocessing
from projects import run

Array = np.ndarray[Any, np.dtype[Any]]
Said = dict[str, list[float]]
MEAN_AND_STD: Said = {"mean": [128.0], "std": [60.0]}
RULE = "leaves the range of the declared preprocessing"
COMMANDS = pytest.mark.parametrize("command", ["quantize", "sensitivity"])


@pytest.fixture(scope="module")
def pixels() -> Array:
    """Smooth images of whole numbers, 0..255: (n, 3, 12, 12)."""
    smooth = np.cumsum(np.random.default_rng(3).normal(size=(6, 3, 12, 12)), axis=3)
    smooth -= smooth.min()
    return np.rint(255 * smooth / smooth.max()).astype(np.float32)


def write_model(folder: Path, content: bytes, said: Said | None) -> Path:
    model = onnx.load_model_from_string(content)
    if said is not None:
        facts = Preprocessing((1, 3, 12, 12), **{name: tuple(values) for name, values in said.items()}).to_metadata()
        onnx.helper.set_model_props(model, facts)
    onnx.save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def write_recipe(folder: Path, said: Said, shape: str = "[1, 3, 12, 12]") -> Path:
    lines = [f"{name} = {values}" for name, values in said.items()]
    head = ['name = "tiny"', "[model]", 'source = "model.onnx"', "[input]", 'name = "image"', f"shape = {shape}"]
    tail = ["[data]", 'calibration = "samples.npz"', "[targets.onnxruntime]"]
    (folder / "recipe.toml").write_text("\n".join([*head, *lines, *tail, ""]))
    return folder / "recipe.toml"


def outcome(command: str, model: Path, *args: str | Path) -> tuple[int, str]:
    out = ["-o", model.parent / "out.onnx"] if command == "quantize" else []
    result = run(command, model, *out, *args)
    return result.exit_code, result.output


@COMMANDS
@pytest.mark.parametrize("where", ["metadata", "--recipe", "--data"])
def test_pixels_are_refused_where_mean_and_std_are_declared(
    tmp_path: Path, tiny_models: dict[str, bytes], pixels: Array, command: str, where: str
) -> None:
    model = write_model(tmp_path, tiny_models["plain"], MEAN_AND_STD if where == "metadata" else None)
    recipe, samples = write_recipe(tmp_path, MEAN_AND_STD), tmp_path / "samples.npz"
    args: list[str | Path] = ["--data", recipe if where == "--data" else samples]
    args += ["--recipe", recipe] if where == "--recipe" else []
    np.savez(samples, image=pixels)
    code, output = outcome(command, model, *args)
    assert (code, RULE in output) == (2, True), output
    np.savez(samples, image=(pixels - np.float32(128)) / np.float32(60))
    code, output = outcome(command, model, *args)
    assert (code, RULE in output) == (0, False), output


@pytest.mark.parametrize(
    ("metadata", "recipe", "shape"),
    [
        (None, None, ""),
        ({}, None, ""),
        (None, {}, "[1, 3, 12, 12]"),
        (None, MEAN_AND_STD, "[1, 9, 12, 12]"),
    ],
    ids=["nothing", "metadata of images as they are", "a recipe without them", "a recipe of another kind of input"],
)
def test_where_neither_mean_nor_std_is_declared_arrays_lie_anywhere(  # noqa: PLR0917 - fixtures and one case's parts
    tmp_path: Path,
    tiny_models: dict[str, bytes],
    pixels: Array,
    metadata: Said | None,
    recipe: Said | None,
    shape: str,
) -> None:
    model, samples = write_model(tmp_path, tiny_models["plain"], metadata), tmp_path / "samples.npz"
    np.savez(samples, image=pixels - np.float32(1000))
    args = [] if recipe is None else ["--recipe", write_recipe(tmp_path, recipe, shape)]
    code, output = outcome("quantize", model, "--data", samples, *args)
    assert code == 0, output
