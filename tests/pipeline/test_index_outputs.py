"""An index counts as right where it points at an equal value, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.golden import check_models, read_golden
from edgeship.pipeline.index_outputs import IndexOutputs
from edgeship.pipeline.recipe import load_recipe
from edgeship.pipeline.stage import StageContext
from edgeship.pipeline.stages.export import STAGE

VALUES = np.array([[[0.0, 3.0, 0.0, 3.0, 1.0, 0.0]]], np.float32)


def chooser(kind: str) -> ir.Model:
    """Relu, then the two largest (TopK), the largest (ArgMax) or the smallest (ArgMin) along the last axis."""
    nodes = [helper.make_node("Relu", ["x"], ["r"])]
    constants = []
    if kind == "TopK":
        nodes.append(helper.make_node("TopK", ["r", "k"], ["values", "places"], axis=-1))
        constants.append(numpy_helper.from_array(np.array([2], np.int64), "k"))
        shape = [1, 1, 2]
    else:
        nodes.append(helper.make_node(kind, ["r"], ["places"], axis=2, keepdims=0))
        shape = [1, 1]
    nodes.append(helper.make_node("Cast", ["places"], ["index"], to=TensorProto.INT32))
    graph = helper.make_graph(
        nodes,
        "chooser",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 6])],
        [helper.make_tensor_value_info("index", TensorProto.INT32, shape)],
        constants,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def index(*values: int, like: Array) -> dict[str, Array]:
    return {"index": np.array(values, np.int32).reshape(like.shape)}


@pytest.mark.parametrize(
    ("kind", "own", "equal", "wrong"),
    [
        ("TopK", (1, 3), (3, 1), (3, 4)),
        ("ArgMax", (1,), (3,), (4,)),
        ("ArgMin", (0,), (5,), (4,)),
    ],
)
def test_an_index_of_an_equal_value_is_right_and_any_other_is_told(
    kind: str, own: tuple[int, ...], equal: tuple[int, ...], wrong: tuple[int, ...]
) -> None:
    outputs = IndexOutputs(chooser(kind))
    assert outputs.names == ("index",)
    plain = outputs.run({"x": VALUES}, {})
    assert plain["index"].ravel().tolist() == list(own)
    tied = index(*equal, like=plain["index"])
    settled = outputs.run({"x": VALUES}, tied)
    assert np.array_equal(settled["index"], tied["index"])
    assert settled["index"].dtype == np.int32
    outputs.check(tied, settled, "the step")
    other = index(*wrong, like=plain["index"])
    message = f"the step changed output 'index', an index: {wrong[-1]} at .* became {own[-1]}.*accepted: the same index"
    with pytest.raises(StageError, match=message):
        outputs.check(other, outputs.run({"x": VALUES}, other), "the step")


@pytest.mark.parametrize("place", [-1, 6, 2**31 - 1])
def test_an_index_outside_the_values_is_wrong(place: int) -> None:
    outputs = IndexOutputs(chooser("ArgMax"))
    other = index(place, like=np.zeros((1, 1)))
    with pytest.raises(StageError, match="points at another value"):
        outputs.check(other, outputs.run({"x": VALUES}, other), "the step")


SOURCE = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, which):
        super().__init__()
        torch.manual_seed(0)
        self.which, self.features = which, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, picture):
        y = self.features(picture)
        if self.which == "ties":
            return (y * 0.0 + (y > 0.8)).flatten(2).topk(30, 2)
        if self.which == "scalar":
            return y.mean()
        if self.which == "empty":
            return y, y[:, :0]
        return torch.nonzero(y > 0.8)
"""


def context(folder: Path, which: str) -> StageContext:
    (folder / "model.py").write_text(SOURCE)
    (folder / "recipe.toml").write_text(
        f'name = "test"\n[model]\nsource = "model.py:Network"\nargs = {{ which = "{which}" }}\n'
        "[input]\nshape = [1, 3, 12, 12]\n[targets.onnxruntime]\n"
    )
    out = folder / "out"
    out.mkdir()
    return StageContext(load_recipe(folder / "recipe.toml"), ("onnxruntime",), {}, out, lambda *_: None)


def test_a_network_whose_indices_are_ties_is_exported_and_passes_the_golden_check(tmp_path: Path) -> None:
    given = context(tmp_path, "ties")
    STAGE.run(given)
    check_models("export", STAGE.models(given.recipe, ()), given.folder, given.recipe, {})
    assert read_golden(given.folder / "golden.npz").outputs[0]["output_1"].shape == (1, 4, 30)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "scalar",
            r"output 'output' of the model has the shape \[\], one number .*accepted: .*first axis",
        ),
        ("empty", r"output 'output_1' of the model has the shape \[1, 0, 10, 10\], which holds no values; accepted"),
        ("rows", r"output 'output' .* on golden sample 0 and \[\d+, 4\] on sample 1; accepted: the same shape"),
    ],
)
def test_outputs_that_have_no_place_in_a_batch_are_told_by_name(tmp_path: Path, which: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        STAGE.run(context(tmp_path, which))
