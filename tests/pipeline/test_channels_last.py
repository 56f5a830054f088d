"""A model that itself takes images with channels last: fed from image files, and shipped as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.tflite.reader import read_model
from projects import run

RECIPE = """
name = "last"
[model]
source = "model.onnx"
[input]
mean = [10, 20, 30]
std = [100]
[data]
calibration = "images"
evaluation = "images"
[targets.onnxruntime]
[targets.tflite]
[gates]
"parity.max_steps" = 1
"""


@pytest.fixture
def project(tmp_path: Path, tiny_models: dict[str, bytes]) -> Path:
    """A recipe for a network behind a Transpose, as exporters of frameworks with channels last write it."""
    model = onnx.load_from_string(tiny_models["plain"])
    for node in model.graph.node:
        node.input[:] = ["first_image" if name == "image" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Transpose", ["image"], ["first_image"], perm=[0, 3, 1, 2]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 12, 12, 3]))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    for label in range(5):
        for number in range(2):
            path = tmp_path / "images" / f"{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return recipe


@pytest.mark.parametrize("layout", [None, "nhwc"])
def test_its_artifacts_take_images_as_it_does(project: Path, tmp_path: Path, layout: str | None) -> None:
    more = (
        [] if layout is None else [f'--set=targets.{name}.io_layout="{layout}"' for name in ("onnxruntime", "tflite")]
    )
    result = run("deploy", project, "--out", tmp_path / "run", "--to", "accuracy", *more)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "run" / "5-convert"
    (graph,) = read_model((folder / "tflite" / "model.tflite").read_bytes(), "model").subgraphs
    assert list(graph.tensors[graph.inputs[0]].shape) == [1, 12, 12, 3]
    shape = load_onnx(folder / "onnxruntime" / "model.onnx").graph.inputs[0].shape
    assert shape is not None
    assert list(shape.dims) == [1, 12, 12, 3]
    alone = [run("evaluate", path, "--data", tmp_path / "images", "--json") for path in folder.glob("*/model.*")]
    assert [each.exit_code for each in alone] == [0, 0]  # the preprocessing in the artifacts makes such inputs


def test_channels_first_are_refused_for_it(project: Path, tmp_path: Path) -> None:
    result = run("deploy", project, "--out", tmp_path / "run", "--set", 'targets.tflite.io_layout="nchw"')
    assert result.exit_code == 2
    assert "the model itself takes images with channels last [1, 12, 12, 3]" in result.stderr


def test_images_for_a_model_of_two_inputs_are_refused_with_what_to_do(project: Path, tmp_path: Path) -> None:
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 5]))
    model.graph.node.append(helper.make_node("Add", [model.graph.output[0].name, "other"], ["sum"]))
    model.graph.output[0].name = "sum"
    onnx.save(model, tmp_path / "model.onnx")
    result = run("deploy", project, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "the model has several: image, other; accepted: arrays as .npz, with a key for each input" in result.stderr
