"""A model file that is damaged, hostile or cannot be used is refused by every command that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

COMMANDS = {
    "inspect": ["inspect", "model.onnx"],
    "simplify": ["simplify", "model.onnx", "-o", "out.onnx"],
    "quantize": ["quantize", "model.onnx", "-o", "out.onnx", "--data", "tiny.npz"],
    "convert": ["convert", "model.onnx", "-o", "out.tflite", "--target", "tflite"],
    "compare": ["compare", "model.onnx", "model.onnx", "--data", "tiny.npz"],
    "evaluate": ["evaluate", "model.onnx", "--data", "tiny.npz"],
}
Edit = Callable[[onnx.ModelProto], None]


def edit(project: Any, change: Edit) -> None:
    """Changes the project's model."""
    path = project.folder / "model.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def external(location: str) -> Edit:
    """Moves the first weight of a model to a file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize("command", [*COMMANDS, "deploy"])
@pytest.mark.parametrize("cut", [0, 100, -7])
def test_a_truncated_model_is_refused(project: Any, command: str, cut: int) -> None:
    path = project.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:cut])
    refusal = project.refuse(*COMMANDS[command]) if command in COMMANDS else project.refuse_deploy()
    assert refusal.code == 2
    assert "model.onnx" in refusal.sentence


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "..\\secret.bin", "link.bin", "images", "none.bin", ""]
)
def test_weights_outside_the_models_folder_are_not_read(
    project: Any, tmp_path_factory: pytest.TempPathFactory, command: str, location: str
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.bin"
    secret.write_bytes(bytes(4096))
    (project.folder / "link.bin").symlink_to(secret)
    (project.folder / "images").mkdir()
    edit(project, external(location))
    refusal = project.refuse(*COMMANDS[command])
    assert refusal.code == 2
    assert "external data" in refusal.sentence


def test_weights_that_are_not_finite_are_named(project: Any) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        values = numpy_helper.to_array(weight).copy()
        values.flat[3] = np.nan
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    edit(project, change)
    assert "'first_weight' (used by Conv Conv_first) holds 1 NaN" in project.refuse_deploy().sentence


def make_model(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 12, 12])]
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs]
    graph = helper.make_graph(nodes, "odd", inputs, declared)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    "args",
    [
        ["deploy", "recipe.toml", "--out", "run"],
        ["simplify", "model.onnx", "-o", "out.onnx"],
        ["convert", "model.onnx", "-o", "out.onnx", "--target", "onnxruntime"],
        ["convert", "model.onnx", "-o", "out.tflite", "--target", "tflite"],
    ],
)
def test_all_unknown_operators_are_listed_with_their_nodes(project: Any, args: list[str]) -> None:
    nodes = [
        helper.make_node("Fancy", ["image"], ["a"], name="fancy_1", domain="mine"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Fancier", ["b"], ["c"], name="fancier_2", domain="mine"),
    ]
    (project.folder / "model.onnx").write_bytes(make_model(nodes, ["c"]).SerializeToString())
    refusal = project.refuse(*args)
    assert refusal.code == 1
    assert "fancy_1" in refusal.sentence
    assert "fancier_2" in refusal.stderr
    assert "relu" not in refusal.stderr


def test_a_model_without_outputs_or_with_unknown_shapes_is_refused(project: Any) -> None:
    edit(project, lambda model: model.graph.ClearField("output"))
    assert "has no outputs" in project.refuse(*COMMANDS["simplify"]).sentence


def test_an_output_without_a_shape_is_named(project: Any) -> None:
    edit(project, lambda model: model.graph.output[0].type.tensor_type.ClearField("shape"))
    assert "output 'logits' declares no shape" in project.refuse(*COMMANDS["convert"]).sentence


def test_a_model_without_inputs_has_nothing_to_run_on(project: Any) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.ClearField("input")
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 12, 12), np.float32), "image"))

    edit(project, change)
    assert "no inputs" in project.refuse(*COMMANDS["quantize"]).sentence
    assert "no inputs" in project.refuse_deploy().sentence


def test_labels_beyond_the_classes_are_named_with_their_sample(project: Any, tiny_images: Any) -> None:
    np.savez(project.folder / "odd.npz", image=tiny_images, label=np.arange(len(tiny_images)))
    refusal = project.refuse("evaluate", "model.onnx", "--data", "odd.npz")
    assert refusal.sentence == "edgeship: sample odd.npz[5]: the label 5 is not among the model's 5 classes, 0..4"


def test_a_model_that_the_runtime_refuses_is_an_input_error_in_bench_as_well(project: Any) -> None:
    (project.folder / "model.onnx").write_bytes(b"not a model")
    refusal = project.refuse("bench", "model.onnx", "--runs", "1")
    assert refusal.code == 2
    assert "is not an ONNX model" in refusal.sentence


def test_a_source_file_is_data_unless_it_is_python(project: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("def build(): ...")
    project.set('"model.onnx"', '"tiny.txt"')
    assert "names no factory" in project.refuse_deploy().sentence
