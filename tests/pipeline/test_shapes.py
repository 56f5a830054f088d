"""`--shape` gives sizes to what a model leaves open: of the command that it was given to, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.pipeline.artifacts import shapes_of
from edgeship.targets.onnxruntime import open_reference
from projects import run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A convolution and twice its height and width, of images of any size."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], "double", mode="linear"),
    ]
    constants = [
        numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, "H2", "W2"])],
        constants,
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_target_that_needs_sizes_gets_them(model: Path, tmp_path: Path) -> None:
    refused = run("convert", model, "-o", tmp_path / "out.tflite", "--target", "tflite")
    assert refused.exit_code == 1
    assert "note: the model leaves sizes open (image: ? x 3 x ? x ?); --shape gives it some" in refused.stderr
    done = run("convert", model, "-o", tmp_path / "out.tflite", "--target", "tflite", "--shape", "1x3x8x6")
    assert done.exit_code == 0, done.stderr
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "data.npz", image=rng.normal(size=(4, 3, 8, 6)))
    compared = run("compare", model, tmp_path / "out.tflite", "--data", tmp_path / "data.npz")
    assert "cosine 1.000000" in compared.stdout


@pytest.mark.parametrize("shape", ["1x3x8x6", "1,3,8,6", "image=1x3x8x6"])
def test_every_shape_behind_the_input_follows(model: Path, tmp_path: Path, shape: str) -> None:
    assert run("simplify", model, "-o", tmp_path / "out.onnx", "--shape", shape).exit_code == 0
    made = load_onnx(tmp_path / "out.onnx")
    assert shapes_of(made) == {"image": (1, 3, 8, 6)}
    assert [list(value.shape or ()) for value in made.graph.outputs] == [[1, 4, 16, 12]]


def test_quantize_checks_the_data_against_the_sizes(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(1).normal(size=(4, 3, 8, 6)))
    arguments = ("quantize", model, "-o", tmp_path / "out.onnx", "--data", tmp_path / "data.npz", "--shape")
    wrong = run(*arguments, "1x3x8x8")
    assert (wrong.exit_code, "accepted: ['samples', 3, 8, 8]" in wrong.stderr) == (2, True)
    assert run(*arguments, "1x3x8x6").exit_code == 0
    image = np.random.default_rng(2).normal(size=(1, 3, 8, 6)).astype(np.float32)
    expected = open_reference(model).run({"image": image})["y"]
    found = open_reference(tmp_path / "out.onnx").run({"image": image})["y"]
    assert np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


def test_bench_times_the_sizes_and_says_where_it_has_none(model: Path) -> None:
    few = ("--runs", "2", "--warmup", "0", "--launches", "1")
    assert "leaves sizes open (image: ? x 3 x ? x ?), timed with 1 each" in run("bench", model, *few).stderr
    done = run("bench", model, *few, "--shape", "1x3x8x6")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("1x3x8", "has the shape [N,3,H,W]; seen: [1, 3, 8]"),
        ("1x4x8x8", "has the shape [N,3,H,W]; seen: [1, 4, 8, 8]"),
        ("picture=1x3x8x8", "has no such input; there are: image"),
        ("1x3x0x8", "accepted: sizes, batch first"),
        ("1x3xHxW", "accepted: sizes, batch first"),
    ],
)
def test_sizes_that_do_not_fit_are_told(model: Path, tmp_path: Path, shape: str, message: str) -> None:
    done = run("simplify", model, "-o", tmp_path / "out.onnx", "--shape", shape)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("command", ["quantize", "sensitivity"])
def test_a_file_without_shapes_between_its_nodes_is_quantized_all_the_same(
    tmp_path: Path, tiny_models: dict[str, bytes], tiny_data: Path, command: str
) -> None:
    model = onnx.load_model_from_string(tiny_models["depthwise"])
    onnx.save(model, tmp_path / "whole.onnx")
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "bare.onnx")
    said = []
    for name in ("whole", "bare"):
        more = ["-o", tmp_path / f"{name}-int8.onnx"] if command == "quantize" else []
        done = run(command, tmp_path / f"{name}.onnx", "--data", tiny_data, "--samples", "4", *more)
        assert done.exit_code == 0, done.stderr
        said.append(done.stdout.replace(name, "it"))
    assert said[0] == said[1]
    assert command == "sensitivity" or "in integers: 4 of 4 layers" in said[0]
