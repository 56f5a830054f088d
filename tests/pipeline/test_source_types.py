"""Models that others exported in float16, or that take pixels as uint8, go through as float32 models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.types import Array
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.simplification.simplifier import simplify_model
from edgeship.pipeline.stages.export import Export, export_model
from edgeship.targets.onnxruntime import open_reference
from projects import run

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(0, 0.3, (4, 3, 3, 3))


def recipe_for(folder: Path, more: str = "") -> Recipe:
    (folder / "recipe.toml").write_text(
        f'name = "test"\n[model]\nsource = "model.onnx"\n{more}\n[targets.onnxruntime]\n'
    )
    return load_recipe(folder / "recipe.toml")


def save(path: Path, nodes: Sequence[Any], of: int, shape: Sequence[int], out: int, *constants: TensorProto) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", of, shape)],
        [helper.make_tensor_value_info("y", out, None)],
        constants,
    )
    for value in graph.output:
        value.type.tensor_type.shape.SetInParent()
        for side in ("n", "c", "h", "w"):
            value.type.tensor_type.shape.dim.add(dim_param=side)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def half_file(path: Path, io: int) -> Path:
    """Conv and an addition in float16; with float32 for `io`, between two Casts, as converters write it."""
    inside = io == TensorProto.FLOAT
    half = TensorProto.FLOAT16
    nodes = [helper.make_node("Cast", ["image"], ["x"], to=half)] if inside else []
    nodes += [
        helper.make_node("Conv", ["x" if inside else "image", "w"], ["c"]),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones((1,), np.float16))),
        helper.make_node("Add", ["c", "one"], ["s" if inside else "y"]),
    ]
    nodes += [helper.make_node("Cast", ["s"], ["y"], to=TensorProto.FLOAT)] if inside else []
    save(path, nodes, io, [1, 3, 6, 6], io, numpy_helper.from_array(WEIGHTS.astype(np.float16), "w"))
    return path


def pixel_file(path: Path, nodes: Sequence[Any], shape: Sequence[int] = (1, 6, 6, 3)) -> Path:
    """`nodes` make x of the input of uint8; its convolution is y."""
    last = [
        helper.make_node("Div", ["x", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "w"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(WEIGHTS.astype(np.float32), "w"),
        numpy_helper.from_array(np.float32(255), "scale"),
    ]
    save(path, [*nodes, *last], TensorProto.UINT8, shape, TensorProto.FLOAT, *constants)
    return path


FIRST = [
    helper.make_node("Transpose", ["image"], ["t"], perm=[0, 3, 1, 2]),
    helper.make_node("Cast", ["t"], ["x"], to=TensorProto.FLOAT),
]


def types_of(result: Export) -> set[str]:
    """The types of everything that is no number of a shape."""
    model = onnx.load_model_from_string(to_bytes(simplify_model(result.model).model))
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    kinds = [value.type.tensor_type.elem_type for value in values] + [
        each.data_type for each in model.graph.initializer
    ]
    return {TensorProto.DataType.Name(kind) for kind in kinds} - {"INT64"}


def computed(path: Path, feeds: dict[str, Array]) -> Array:
    return open_reference(path).run(feeds)["y"]


@pytest.mark.parametrize("io", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_float16_model_becomes_float32_throughout_and_computes_the_same(tmp_path: Path, io: int) -> None:
    path = half_file(tmp_path / "model.onnx", io)
    result = export_model(recipe_for(tmp_path))
    assert types_of(result) == {"FLOAT"}
    for feeds, outputs in zip(result.feeds, result.outputs, strict=True):
        np.testing.assert_allclose(outputs["y"], computed(path, dict(feeds)), atol=0.01)
        exact = open_reference(to_bytes(result.model)).run(feeds)["y"]
        np.testing.assert_allclose(outputs["y"], exact, atol=1e-5)
    (note,) = result.facts["findings"]
    assert "float16" in note["rule"]
    assert float(note["seen"].split("up to ")[1].split(" %")[0]) < 0.5


def test_pixels_of_uint8_become_the_same_numbers_as_float32(tmp_path: Path) -> None:
    path = pixel_file(tmp_path / "model.onnx", FIRST)
    result = export_model(recipe_for(tmp_path))
    assert types_of(result) == {"FLOAT"}
    session = open_reference(to_bytes(result.model))
    for feeds, outputs in zip(result.feeds, result.outputs, strict=True):
        assert set(np.unique(feeds["image"] % 1)) == {0.0}
        assert 0 <= feeds["image"].min() <= 50
        assert 200 <= feeds["image"].max() <= 255
        np.testing.assert_array_equal(outputs["y"], computed(path, dict(feeds)))
        np.testing.assert_allclose(session.run(feeds)["y"], outputs["y"], atol=1e-5)
    assert [note["where"] for note in result.facts["findings"]] == ["input image"]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [
                helper.make_node("MaxPool", ["image"], ["p"], "pool", kernel_shape=[1, 1]),
                helper.make_node("Cast", ["p"], ["x"], to=TensorProto.FLOAT),
            ],
            "MaxPool 'pool' computes with these integers",
        ),
        (
            [
                helper.make_node("Cast", ["image"], ["i"], "narrow", to=TensorProto.INT8),
                helper.make_node("Cast", ["i"], ["x"], to=TensorProto.FLOAT),
            ],
            "Cast 'narrow' computes with these integers",
        ),
    ],
)
def test_a_model_that_computes_with_uint8_is_refused(tmp_path: Path, nodes: Sequence[Any], message: str) -> None:
    pixel_file(tmp_path / "model.onnx", nodes, (1, 3, 6, 6))
    with pytest.raises(InputError, match=message):
        export_model(recipe_for(tmp_path))


def test_mean_and_std_are_refused_where_the_model_scales_pixels_itself(tmp_path: Path) -> None:
    pixel_file(tmp_path / "model.onnx", FIRST)
    with pytest.raises(InputError, match=r"input\.mean and input\.std: .*scales them itself; accepted: neither"):
        export_model(recipe_for(tmp_path, "[input]\nmean = [127.5]\nstd = [127.5]"))


@pytest.mark.parametrize(
    "values", [RNG.random((5, 6, 6, 3)), np.full((5, 6, 6, 3), 256.0), np.full((5, 6, 6, 3), -1.0)]
)
def test_samples_that_are_no_pixels_are_refused(tmp_path: Path, values: Array) -> None:
    pixel_file(tmp_path / "model.onnx", FIRST)
    np.savez(tmp_path / "data.npz", image=values)
    with pytest.raises(InputError, match=r"takes pixels \(uint8\), and samples hold .*whole numbers, 0\.\.255"):
        export_model(recipe_for(tmp_path, '[data]\ncalibration = "data.npz"'))


def test_the_command_says_what_became_of_the_types(tmp_path: Path) -> None:
    pixel_file(tmp_path / "model.onnx", FIRST)
    recipe_for(tmp_path)
    done = run("export", tmp_path / "recipe.toml", "-o", tmp_path / "out.onnx")
    assert done.exit_code == 0
    assert "note: input image: pixels of uint8" in done.stderr


def test_quantize_takes_pixels_as_the_same_numbers_in_float32(tmp_path: Path) -> None:
    path = pixel_file(tmp_path / "model.onnx", FIRST)
    values = RNG.integers(0, 256, (5, 6, 6, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=values)
    done = run("quantize", path, "-o", tmp_path / "out.onnx", "--data", tmp_path / "data.npz")
    assert done.exit_code == 0, done.stderr
    assert "takes pixels of uint8, and the same numbers as float32 here" in done.stderr
    assert onnx.load(tmp_path / "out.onnx").graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    expected = computed(path, {"image": values[:1]})
    np.testing.assert_allclose(computed(tmp_path / "out.onnx", {"image": values[:1]}), expected, atol=0.1)


@pytest.mark.parametrize("command", [["quantize", "-o", "out.onnx"], ["sensitivity"]])
def test_scaled_pixels_are_refused_for_a_model_that_scales_them_itself(tmp_path: Path, command: list[str]) -> None:
    path = pixel_file(tmp_path / "model.onnx", FIRST)
    np.savez(tmp_path / "data.npz", image=RNG.integers(0, 256, (5, 6, 6, 3)) / 127.5 - 1)
    given = [tmp_path / each if each.endswith(".onnx") else each for each in command]
    done = run(*given, path, "--data", tmp_path / "data.npz")
    assert done.exit_code == 2
    assert "takes pixels (uint8), which the model scales itself" in done.stderr
    assert "accepted: whole numbers, 0 .. 255" in done.stderr
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_quantize_takes_a_float16_model(tmp_path: Path, mode: str) -> None:
    path = half_file(tmp_path / "model.onnx", TensorProto.FLOAT16)
    values = RNG.normal(size=(5, 3, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=values)
    data = ["--data", tmp_path / "data.npz"] if mode == "static" else []
    done = run("quantize", path, "-o", tmp_path / "out.onnx", "--mode", mode, *data)
    assert done.exit_code == 0, done.stderr
    assert "is float16" in done.stderr
    x = values[:1]  # others may lie beyond the ranges that were seen
    np.testing.assert_allclose(computed(tmp_path / "out.onnx", {"image": x}), computed(path, {"image": x}), atol=0.2)
