"""A model is judged against an earlier one, and a release against an earlier release, as CI does at an upgrade."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgeship.calibration.samples.preprocessing import Preprocessing
from projects import run, write_project

Array = np.ndarray[Any, np.dtype[Any]]
MORE = (
    "[targets.onnxruntime]\n[targets.tflite]\n[benchmark]\nruns = 4\n[parity]\nsamples = 4\n[quantize]\nsamples = 8\n"
)


@pytest.fixture
def data(tmp_path: Path, tiny_models: dict[str, bytes], tiny_images: Array) -> Path:
    """Samples whose classes are what the plain model decides: it is right on all of them."""
    from edgeship.targets.onnxruntime import open_reference

    session = open_reference(tiny_models["plain"])
    labels = [int(session.run({"image": image[np.newaxis]})["logits"].argmax()) for image in tiny_images]
    np.savez(tmp_path / "data.npz", image=tiny_images, label=np.array(labels))
    return tmp_path / "data.npz"


def save(path: Path, content: bytes, scale: float = 1.0) -> Path:
    """The model with the scores of class 0 multiplied, which changes what it decides."""
    model = onnx.load_model_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.name == "fc_weight":
            values = numpy_helper.to_array(tensor).copy()
            values[0] *= scale
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def models(tmp_path: Path, tiny_models: dict[str, bytes]) -> tuple[Path, Path]:
    """The plain model, and one that decides otherwise."""
    return save(tmp_path / "old.onnx", tiny_models["plain"]), save(tmp_path / "new.onnx", tiny_models["plain"], -30.0)


def test_what_a_model_loses_is_counted_on_the_same_samples(models: tuple[Path, Path], data: Path) -> None:
    old, new = models
    facts = json.loads(run("compare", old, new, "--data", data, "--samples", "32", "--json").stdout)
    found = facts["accuracy"]
    assert found["a"]["top1"] == 100.0
    assert found["drop"] == pytest.approx(100.0 - found["b"]["top1"])
    assert (found["lost"], found["won"]) == (round(found["drop"] * 32 / 100), 0)
    assert facts["agreement"] == pytest.approx(found["b"]["top1"] / 100)
    assert facts["bytes"] == {"a": old.stat().st_size, "b": new.stat().st_size}
    assert json.loads(run("evaluate", new, "--data", data, "--json").stdout)["top1"] == found["b"]["top1"]
    shown = run("compare", old, new, "--data", data).stdout
    assert "20 samples" in shown
    assert "top-1 100.00 % -> " in shown


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (("--max-drop", "1"), "max-drop is "),
        (("--min-agreement", "0.99"), "min-agreement is "),
        (("--min-sqnr", "30"), "min-sqnr is "),
        (("--max-steps", "2"), "max-steps is "),
    ],
)
def test_a_limit_that_is_not_met_fails_and_one_that_is_met_does_not(
    models: tuple[Path, Path], data: Path, limit: tuple[str, str], said: str
) -> None:
    old, new = models
    missed = run("compare", old, new, "--data", data, *limit)
    assert missed.exit_code == 3
    assert "on 32 samples" in missed.stdout
    assert f"NOT MET: {said}" in missed.stdout
    assert missed.stderr.splitlines()[-1].startswith(f"edgeship: a limit is not met: {said}")
    met = run("compare", old, old, "--data", data, *limit, "--json")
    assert met.exit_code == 0, met.stderr
    assert [each["met"] for each in json.loads(met.stdout)["limits"]] == [True]


def test_a_file_that_grows_beyond_the_limit_fails(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    model = onnx.load(models[0])
    model.metadata_props.add(key="ballast", value="x" * models[0].stat().st_size)
    onnx.save(model, tmp_path / "large.onnx")
    words = ("--data", data, "--max-growth")
    assert run("compare", models[0], tmp_path / "large.onnx", *words, "50").exit_code == 3
    assert run("compare", models[0], tmp_path / "large.onnx", *words, "150").exit_code == 0
    assert run("compare", tmp_path / "large.onnx", models[0], *words, "-20").exit_code == 0


def test_a_limit_on_right_answers_needs_classes(models: tuple[Path, Path], tiny_images: Array, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", image=tiny_images)
    result = run("compare", *models, "--data", tmp_path / "bare.npz", "--max-drop", "1")
    assert result.exit_code == 2
    assert "--max-drop: right answers cannot be counted; accepted: samples with classes" in result.stderr
    facts = json.loads(run("compare", *models, "--data", tmp_path / "bare.npz", "--json").stdout)
    assert facts["accuracy"] is None


# ---- models that make inputs of images otherwise -----------------------------------------------------------------


def photographic(path: Path, mean: float, std: float) -> Path:
    """Per-channel means of the pixels, 0..1, by a model that takes (pixel - mean) / std."""
    weight = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1) * (std / 255)
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["scores"]),
    ]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.full(3, mean / 255, np.float32), "b")]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])]
    graph = helper.make_graph(nodes, "means", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for key, value in Preprocessing((1, 3, 8, 8), (mean,), (std,)).to_metadata().items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


def test_each_model_gets_images_as_its_own_metadata_says(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    old, new = photographic(tmp_path / "old.onnx", 127.5, 127.5), photographic(tmp_path / "new.onnx", 0.0, 255.0)
    result = run("compare", old, new, "--data", tmp_path / "images", "--json")
    assert "make inputs otherwise (mean, std): each gets its own" in result.stderr
    assert json.loads(result.stdout)["outputs"]["scores"]["max_abs"] < 1e-5
    layers = run("compare", old, new, "--data", tmp_path / "images", "--layers")
    assert layers.exit_code == 2
    assert "make inputs of images in other ways; accepted: --recipe, or .npz" in layers.stderr


# ---- releases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, bytes], tiny_data: Path
) -> Mapping[str, Path]:
    """Three runs: one, the same with another model and another setting, and one for one target only."""
    folder = tmp_path_factory.mktemp("upgrade")
    made = {}
    for name, net, more in (
        ("old", "plain", MORE),
        ("new", "residual", MORE.replace("samples = 8", 'samples = 9\nweights = "full"')),
        ("one", "plain", MORE.replace("[targets.onnxruntime]", "")),
    ):
        recipe = write_project(folder / name, tiny_models[net], tiny_data, MORE if name == "old" else more)
        result = run("deploy", recipe, "--out", folder / f"{name}-run")
        assert result.exit_code == 0, result.output
        made[name] = folder / f"{name}-run"
    return made


def test_two_releases_are_compared_target_by_target(runs: Mapping[str, Path], tiny_data: Path) -> None:
    result = run("compare", runs["old"], runs["new"] / "9-release", "--data", tiny_data, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert sorted(facts["targets"]) == ["onnxruntime", "tflite"]
    assert all(found["samples"] == 32 for found in facts["targets"].values())
    assert facts["targets"]["tflite"]["a"] == str(runs["old"] / "9-release" / "model.tflite")
    assert "model: another one" in facts["changes"]
    assert facts["changes"][-2:] == ["quantize.samples: 8 -> 9", 'quantize.weights: "auto" -> "full"']


def test_a_release_that_decides_otherwise_fails_with_every_target_named(
    runs: Mapping[str, Path], tiny_data: Path
) -> None:
    result = run("compare", runs["old"], runs["new"], "--data", tiny_data, "--min-agreement", "1")
    assert result.exit_code == 3
    assert "changed: model: another one" in result.stdout
    *details, sentence = result.stderr.strip().splitlines()
    assert sentence.startswith("edgeship: 2 limits are not met: onnxruntime: min-agreement is ")
    assert details[-1].strip().startswith("- tflite: min-agreement is ")
    same = run("compare", runs["old"], runs["old"], "--data", tiny_data, "--min-agreement", "1")
    assert same.exit_code == 0
    assert "changed: nothing that the manifests tell" in same.stdout


def test_targets_that_one_release_has_are_noted(runs: Mapping[str, Path], tiny_data: Path) -> None:
    result = run("compare", runs["old"], runs["one"], "--data", tiny_data, "--json")
    assert list(json.loads(result.stdout)["targets"]) == ["tflite"]
    assert f"note: onnxruntime is in {runs['old']} only" in result.stderr


def test_what_is_no_release_is_told(runs: Mapping[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    def refused(a: Path, b: Path) -> str:
        result = run("compare", a, b, "--data", tiny_data)
        assert result.exit_code == 2
        return result.stderr.strip().splitlines()[-1]

    assert "is none; accepted: two models, or two releases" in refused(runs["old"], tiny_data)
    (tmp_path / "empty").mkdir()
    assert "holds no release (no manifest.json)" in refused(tmp_path / "empty", runs["old"])
    torn = Path(shutil.copytree(runs["old"] / "9-release", tmp_path / "torn"))
    (torn / "model.tflite").unlink()
    assert "model.tflite is missing, and manifest.json lists it" in refused(runs["old"], torn)
    (torn / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in refused(torn, runs["old"])
    (torn / "manifest.json").write_text("{}")
    assert "lists no artifacts" in refused(torn, runs["old"])


def test_images_of_a_recipe_go_into_a_model_whose_input_has_another_name(
    tmp_path: Path, tiny_models: dict[str, bytes]
) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "images").mkdir()
    for place in range(3):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / "images" / f"{place}.png")
    old = save(tmp_path / "old.onnx", tiny_models["plain"])
    model = onnx.load(old)
    model.graph.input[0].name = "picture"
    for node in model.graph.node:
        node.input[:] = ["picture" if name == "image" else name for name in node.input]
    onnx.save(model, tmp_path / "renamed.onnx")
    (tmp_path / "recipe.toml").write_text(
        'name = "old"\n[model]\nsource = "old.onnx"\n[input]\nname = "image"\nmean = [100.0]\nstd = [50.0]\n'
        '[data]\ncalibration = "images"\n[targets.onnxruntime]\n'
    )
    for a, b in ((old, "renamed.onnx"), ("renamed.onnx", "renamed.onnx")):
        found = run("compare", tmp_path / a, tmp_path / b, "--data", tmp_path / "recipe.toml", "--json")
        assert found.exit_code == 0, found.stderr
        facts = json.loads(found.stdout)
        assert (facts["samples"], facts["outputs"]["logits"]["max_abs"]) == (3, 0.0)
