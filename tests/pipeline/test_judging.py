"""Whether a model's outputs are scores of classes is read from its graph, or said by the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.pipeline.judging import decides_on_classes
from edgeship.pipeline.recipe import load_recipe
from projects import run

RECIPE = """
name = "vectors"
[model]
source = "model.onnx"
[data]
calibration = "data.npz"
evaluation = "data.npz"
[benchmark]
runs = 1
launches = 1
[targets.onnxruntime]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A network whose output is a vector of length 1, by a division through it, and labelled samples."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["v"]),
        helper.make_node("ReduceL2", ["v"], ["length"], axes=[1], keepdims=1),
        helper.make_node("Clip", ["length", "least"], ["clipped"]),
        helper.make_node("Shape", ["v"], ["shape"]),
        helper.make_node("Expand", ["clipped", "shape"], ["wide"]),
        helper.make_node("Div", ["v", "wide"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.normal(size=(6, 4)).astype(np.float32), "w"),
        numpy_helper.from_array(np.float32(1e-12), "least"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        constants,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx"
    )
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(40, 6)), label=np.arange(40) % 7)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def test_a_vector_of_length_1_has_neither_top_1_nor_decisions(project: Path) -> None:
    """Its classes would be out of range too: 7 of them, for 4 values."""
    out = project.parent / "run"
    result = run("deploy", project, "--out", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    facts = report["targets"]["onnxruntime"]
    assert "top1" not in facts["accuracy"]
    assert (facts["accuracy"]["fp32_agreement"], facts["parity"]["agreement"]) == (None, None)
    assert facts["accuracy"]["outputs"]["y"]["sqnr_db"] > 20


def test_the_recipe_says_what_the_graph_does_not(project: Path) -> None:
    out = project.parent / "run"
    assert run("deploy", project, "--out", out, "--to", "simplify").exit_code == 0
    model = load_onnx(out / "3-simplify" / "model.onnx")
    found = {
        each: decides_on_classes(load_recipe(project, [f'model.outputs="{each}"']), model)
        for each in ("auto", "classes", "values")
    }
    assert found == {"auto": False, "classes": True, "values": False}
    result = run("deploy", project, "--out", out, "--set", "model.outputs=classes")
    assert (result.exit_code, "is not among the model's 4 classes" in result.stderr) == (2, True)
