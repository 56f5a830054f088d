"""Two models are compared whatever their one input and one output are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from projects import run


def save(path: Path, inputs: list[str], outputs: list[str]) -> Path:
    """Each output is the sum of all inputs."""
    total = helper.make_node("Sum", inputs, ["total"])
    nodes = [total, *(helper.make_node("Identity", ["total"], [name]) for name in outputs)]

    def ports(names: list[str]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in names]

    graph = helper.make_graph(nodes, "net", ports(inputs), ports(outputs))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_only_input_and_output_are_the_same_by_whatever_name(tmp_path: Path) -> None:
    ours, theirs = save(tmp_path / "a.onnx", ["image"], ["logits"]), save(tmp_path / "b.onnx", ["x"], ["y"])
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).normal(size=(4, 3)))
    done = run("compare", ours, theirs, "--data", tmp_path / "data.npz", "--json")
    assert done.exit_code == 0, done.stderr
    layers = run("compare", ours, theirs, "--data", tmp_path / "data.npz", "--layers", "--json")
    assert [layer["name"] for layer in json.loads(layers.stdout)["layers"]] == ["total"]
    facts = json.loads(done.stdout)
    assert (facts["agreement"], list(facts["outputs"]), facts["outputs"]["logits"]["max_abs"]) == (1.0, ["logits"], 0.0)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["a", "c"], ["y"], "other inputs: a, b, and a, c"),
        (["x"], ["y"], "other inputs: a, b, and x"),
        (["a", "b"], ["z", "y"], "other outputs: y, and z, y"),
    ],
)
def test_several_of_other_names_are_refused(
    tmp_path: Path, inputs: list[str], outputs: list[str], message: str
) -> None:
    ours, theirs = save(tmp_path / "a.onnx", ["a", "b"], ["y"]), save(tmp_path / "b.onnx", inputs, outputs)
    np.savez(tmp_path / "data.npz", **{name: np.ones((4, 3)) for name in "abcx"})
    done = run("compare", ours, theirs, "--data", tmp_path / "data.npz")
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr, done.stderr
