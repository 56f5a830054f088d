"""A fix that the recipe accepts is made, and what was not accepted stays a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper

from projects import run

RECIPE = """
name = "tiny"
[model]
source = "model.onnx"
[data]
calibration = "tiny.npz"
[quantize]
fixes = [{fixes}]
[targets.onnxruntime]
"""


@pytest.fixture
def silu(tmp_path: Path) -> Path:
    """A folder with a net of two convolutions and a SiLU between them, and data for it."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(3, 3, 3, 3)).astype(np.float32), name) for name in ("w", "v")]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["h"], name="first", pads=[1] * 4),
        helper.make_node("Sigmoid", ["h"], ["s"], name="gate"),
        helper.make_node("Mul", ["h", "s"], ["g"], name="product"),
        helper.make_node("Conv", ["g", "v"], ["y"], name="second", pads=[1] * 4),
    ]
    shape = [1, 3, 8, 8]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("image", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)], weights
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    np.savez(tmp_path / "tiny.npz", image=rng.normal(size=(8, 3, 8, 8)).astype(np.float32))
    return tmp_path


def deploy(folder: Path, fixes: str) -> tuple[Result, Any]:
    (folder / "recipe.toml").write_text(RECIPE.format(fixes=fixes))
    arguments = ["deploy", str(folder / "recipe.toml"), "--out", str(folder / "run"), "--to", "quantize"]
    result = run(*arguments)
    path = folder / "run/4-quantize/plan.json"
    return result, json.loads(path.read_text()) if path.is_file() else None


def test_what_is_not_accepted_is_a_note_with_its_fix(silu: Path) -> None:
    result, plan = deploy(silu, "")
    assert result.exit_code == 0, result.output
    (finding,) = plan["structure"]["findings"]
    assert finding["severity"] == "note"
    assert 'accepted: quantize.fixes = ["wide_activations"]' in result.output
    assert plan["int16_nodes"] == []


def test_what_is_accepted_is_done(silu: Path) -> None:
    result, plan = deploy(silu, '"wide_activations"')
    assert result.exit_code == 0, result.output
    assert plan["structure"] == {"findings": [], "fixed": [{"fix": "wide_activations", "nodes": ["gate", "product"]}]}
    assert plan["int16_nodes"] == ["gate", "product"]


def test_an_accepted_fix_of_what_the_model_does_not_have_is_said_to_be_idle(silu: Path) -> None:
    result, plan = deploy(silu, '"float_concats", "wide_activations"')
    assert result.exit_code == 0, result.output
    assert [finding["rule"] for finding in plan["structure"]["findings"]] == ['"float_concats" changes nothing']
    assert 'quantize.fixes: "float_concats" changes nothing' in " ".join(result.output.split())


def test_an_unknown_fix_lists_those_there_are(silu: Path) -> None:
    result, _ = deploy(silu, '"wide"')
    assert result.exit_code == 2
    assert (
        "quantize.fixes.0: seen \"wide\"; accepted: 'float_outputs', 'float_concats', 'wide_activations' or "
        "'wide_outputs'" in " ".join(result.output.split())
    )


@pytest.mark.parametrize("mode", ["static", "int16"])
@pytest.mark.parametrize("kind", ["constant", "bool"])
def test_a_further_output_that_is_no_activation_goes_through_all_stages(silu: Path, kind: str, mode: str) -> None:
    model = onnx.load(silu / "model.onnx")
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    anchors = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(1, 12), "more")
    model.graph.initializer.append(anchors if kind == "constant" else zero)
    if kind == "bool":
        model.graph.node.append(helper.make_node("Greater", ["y", "zero"], ["more"], name="above"))
    output = ("more", TensorProto.FLOAT, [1, 12]) if kind == "constant" else ("more", TensorProto.BOOL, [1, 3, 8, 8])
    model.graph.output.append(helper.make_tensor_value_info(*output))
    onnx.save(model, silu / "model.onnx")
    (silu / "recipe.toml").write_text(RECIPE.format(fixes="") + "[targets.tflite]\n")
    arguments = ["--out", silu / "run", "--to", "accuracy", "--set", f"quantize.mode={mode}"]
    result = run("deploy", silu / "recipe.toml", *arguments)
    assert result.exit_code == 0, result.output
    parity = json.loads((silu / "run/6-parity/parity.json").read_text())
    for target in ("onnxruntime", "tflite"):
        assert set(parity["targets"][target]["outputs"]) == {"y", "more"}
        assert parity["targets"][target]["outputs"]["more"]["max_abs"] == 0
