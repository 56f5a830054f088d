"""A model that is fed otherwise than in training, or whose classes have another order, is noticed before it ships."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from projects import run

RECIPE = """
name = "colors"
[model]
source = "model.onnx"
[input]
mean = [127.5]
std = [127.5]
[data]
calibration = "flat"
evaluation = "images"
[targets.onnxruntime]
"""
COLORS = {"red": 0, "green": 1, "blue": 2}
GUESS, INPUT, ORDER, FOLDERS = (
    "no better than guessing",
    "not as in training",
    "classes' order",
    "not as many as the model's classes",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A recipe for a network that tells which colour is strongest, for values within -1..1, and pictures of each."""
    nodes = [
        helper.make_node("Clip", ["image", "low", "high"], ["clipped"]),
        helper.make_node("Conv", ["clipped", "weight"], ["conv"], name="conv"),
        helper.make_node("GlobalAveragePool", ["conv"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    constants = {"low": np.array(-1.0), "high": np.array(1.0), "weight": np.eye(3).reshape(3, 3, 1, 1)}
    graph = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    write(tmp_path / "images", {f"{place}-{name}": name for name, place in COLORS.items()})
    write(tmp_path / "flat", {"": "red"})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return recipe


def write(folder: Path, colors: Mapping[str, str]) -> None:
    """Eight pictures in the folder of each name; of its color mostly."""
    rng = np.random.default_rng(0)
    for name, color in colors.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            pixels = rng.integers(0, 200, (8, 8, 3))
            pixels[..., COLORS[color]] += 50
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


def notes(recipe: Path, *more: str) -> list[dict[str, str]]:
    """What is said of model and data."""
    settings = [f"--set={each}" for each in more]
    result = run("deploy", recipe, "--out", recipe.parent / "run", "--to", "quantize", *settings)
    assert result.exit_code == 0, result.stderr
    plan: dict[str, Any] = json.loads((recipe.parent / "run" / "4-quantize" / "plan.json").read_text())
    return [each for each in plan["data"]["findings"] if each["where"] == "model and data"]


@pytest.mark.parametrize("mode", ["static", "dynamic", "float16", "none"])
def test_nothing_is_said_where_all_is_right(project: Path, mode: str) -> None:
    assert notes(project, f'quantize.mode="{mode}"') == []


@pytest.mark.parametrize("mode", ["static", "float16", "none"])
@pytest.mark.parametrize("wrong", [('input.color="bgr"', 'color = "rgb"'), ("input={}", "std = [255.0]")])
def test_another_preprocessing_that_fits_better_is_named(project: Path, wrong: tuple[str, str], mode: str) -> None:
    (note,) = notes(project, wrong[0], f'quantize.mode="{mode}"')
    assert INPUT in note["rule"]
    assert wrong[1] in note["rule"]
    assert note["seen"].startswith("24 of 24 right instead of ")


def test_class_folders_that_sort_otherwise_than_the_models_classes_are_named(project: Path) -> None:
    write(project.parent / "numbers", {"1": "red", "2": "green", "10": "blue"})
    (note,) = notes(project, 'data.evaluation="numbers"')
    assert ORDER in note["rule"]
    assert note["seen"] == "10 (class 1) for class 2: 8 of 8, 2 (class 2) for class 1: 8 of 8"
    (project.parent / "classes.txt").write_text("1\n2\n10\n")
    assert notes(project, 'data.evaluation="numbers"', 'data.classes="classes.txt"') == []


def test_a_class_without_folder_is_noted_for_it_moves_the_others(project: Path) -> None:
    write(project.parent / "two", {"0-red": "red", "1-green": "green"})
    (note,) = notes(project, 'data.evaluation="two"')
    assert FOLDERS in note["rule"]
    assert note["seen"] == "2 folders, 3 classes"


def test_a_list_may_say_classes_by_name(project: Path) -> None:
    rows = [f"{place}-{name}/{number}.png,{name}" for name, place in sorted(COLORS.items()) for number in range(8)]
    (project.parent / "list.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    (project.parent / "classes.txt").write_text("\n".join(COLORS) + "\n")
    settings = ('data.root="images"', 'data.calibration="../flat"', 'data.evaluation="list.csv"')
    assert notes(project, *settings, 'data.classes="classes.txt"') == []
    result = run("deploy", project, "--out", project.parent / "run", *(f"--set={each}" for each in settings))
    assert result.exit_code == 2
    assert "the label is 'blue'; accepted: a whole number" in result.stderr


def test_a_class_that_the_model_has_not_is_told_before_ranges_are_chosen(project: Path) -> None:
    (project.parent / "list.csv").write_text("file,label\n0-red/0.png,0\n1-green/0.png,3\n")
    settings = ('data.root="images"', 'data.calibration="../flat"', 'data.evaluation="../list.csv"')
    result = run("deploy", project, "--out", project.parent / "run", *(f"--set={each}" for each in settings))
    assert result.exit_code == 2
    assert "1-green/0.png: the label 3 is not among the model's 3 classes, 0..2" in result.stderr
    assert not (project.parent / "run" / "4-quantize").exists()


def test_the_classes_of_the_data_name_those_of_the_release(project: Path) -> None:
    (project.parent / "classes.txt").write_text("0-red\n1-green\n2-blue\n")
    settings = ('data.classes="classes.txt"', "benchmark.runs=1", "benchmark.launches=1")
    out = project.parent / "run"
    result = run("deploy", project, "--out", out, *(f"--set={each}" for each in settings))
    assert result.exit_code == 0, result.stderr
    assert "Classes (3): 0-red, 1-green, 2-blue" in (out / "9-release" / "MODEL_CARD.md").read_text()


def test_a_folder_that_is_no_class_is_an_error(project: Path) -> None:
    (project.parent / "classes.txt").write_text("0-red\n2-blue\n")
    result = run("deploy", project, "--out", project.parent / "run", "--set", 'data.classes="classes.txt"')
    assert result.exit_code == 2
    assert "has folders that are no class: 1-green; the classes are 0-red, 2-blue" in result.stderr


@pytest.mark.parametrize("content", ["", "a\n\nb\n", "a\nb\na\n"], ids=["empty", "gap", "twice"])
def test_a_file_of_classes_has_a_name_on_every_line(project: Path, content: str) -> None:
    (project.parent / "classes.txt").write_text(content)
    result = run("deploy", project, "--out", project.parent / "run", "--set", 'data.classes="classes.txt"')
    assert result.exit_code == 2
    assert "must have a name on every line" in result.stderr


def test_scores_that_tell_nothing_are_noted_as_guesses(project: Path) -> None:
    rng = np.random.default_rng(1)
    for path in (project.parent / "images").rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (note,) = notes(project)
    assert GUESS in note["rule"]


def test_evaluate_notes_the_number_of_class_folders_too(project: Path) -> None:
    write(project.parent / "two", {"0-red": "red", "1-green": "green"})
    result = run("evaluate", project.parent / "model.onnx", "--data", project.parent / "two", "--recipe", project)
    assert result.exit_code == 0, result.stderr
    assert "2 folders, 3 classes" in result.stderr


def test_mean_and_std_are_not_proposed_to_a_model_that_takes_pixels(project: Path) -> None:
    path = project.parent / "model.onnx"
    (settings,) = notes(project, "input={}")
    assert "std = [255.0]" in settings["rule"]
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node[0].input[0] = "floats"
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT))
    onnx.save(model, path)
    assert not any(INPUT in note["rule"] for note in notes(project, "input={}"))
