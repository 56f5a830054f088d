"""Models of users become ONNX that computes the same: PyTorch modules, exported programs, and ONNX files of any age."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import EdgeshipError, InputError, StageError
from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
from edgeship.pipeline import torch_export
from edgeship.pipeline.golden import read_golden
from edgeship.pipeline.models import open_source_session
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.simplification.simplifier import simplify_model
from edgeship.pipeline.stage import StageContext
from edgeship.pipeline.stages.export import STAGE, export_model, export_recipe
from edgeship.targets.onnxruntime import open_reference

SOURCE = '''
import torch
from torch import nn


class Classifier(nn.Module):
    """Padded maximum, hard swish, normalization after a fully connected layer."""

    def __init__(self, width=8):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, 2), nn.BatchNorm2d(width), nn.Hardswish(),
        )
        self.head = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU6(), nn.Linear(6, 5))

    def forward(self, picture):
        return self.head(self.features(picture).mean((2, 3)))


class Detector(Classifier):
    def forward(self, picture):
        features = self.features(picture)
        return {"scores": self.head(features.mean((2, 3))).softmax(1), "boxes": (features * torch.sigmoid(features),)}


class OnlyTraced(Classifier):
    """Its code depends on the value of a buffer, which torch.export refuses and a trace keeps rightly."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, picture):
        if float(self.gain) > 1:
            picture = picture * 2
        return super().forward(picture)


class Neither(nn.Module):
    def forward(self, picture):
        return torch.linalg.svd(picture)[1]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.scales = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, picture, state, gain=None, bias=None):
        scale = torch.sigmoid(self.scales(state))[:, :, None, None]
        mixed = (self.features(picture) * scale).mean((2, 3))
        mixed = mixed if gain is None else mixed * gain
        return mixed if bias is None else mixed + bias


def _seeded(kind):
    torch.manual_seed(0)
    module = kind()
    for each in module.modules():
        if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    return module


def classifier(): return _seeded(Classifier)
def detector(): return _seeded(Detector)
def only_traced(): return _seeded(OnlyTraced)
def neither(): return Neither()
def two_inputs(): return _seeded(TwoInputs)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(SOURCE)
    return tmp_path


def write_recipe(  # noqa: PLR0917 - most tests give the first three
    folder: Path,
    source: str,
    shape: Sequence[int | str] | None = (1, 3, 24, 24),
    more: str = "",
    name: str | None = None,
    others: str = "",
) -> Recipe:
    lines = [f"others = {{ {others} }}"] if others else []
    lines += [f"shape = {json.dumps(list(shape))}"] if shape is not None else []
    lines += [f'name = "{name}"'] if name is not None else []
    text = (
        f'name = "test"\n[model]\nsource = "{source}"\n[input]\n'
        + "\n".join(lines)
        + f"\n[targets.onnxruntime]\n{more}"
    )
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")


def images(*shape: int) -> np.ndarray[Any, np.dtype[Any]]:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_a_module_is_exported_as_it_computes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(folder, "model.py:classifier")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = export_model(recipe)
    assert not [each for each in heard if issubclass(each.category, UserWarning)]
    assert capfd.readouterr() == ("", "")
    assert result.facts["exporter"] == "dynamo"
    assert result.facts["inputs"] == {"picture": [1, 3, 24, 24]}
    assert result.facts["outputs"] == {"output": [1, 5]}
    data = {"picture": images(1, 3, 24, 24)}
    expected = open_source_session(recipe).run(data)["output"]
    np.testing.assert_allclose(open_reference(to_bytes(result.model)).run(data)["output"], expected, atol=1e-5)


def test_an_exported_module_simplifies_to_what_the_quantizer_wants(folder: Path) -> None:
    model = export_model(write_recipe(folder, "model.py:classifier")).model
    for onnxsim in (False, True):
        after = simplify_model(model, onnxsim=onnxsim).after
        assert set(after) == {"Conv", "Relu", "MaxPool", "HardSwish", "GlobalAveragePool", "Reshape", "Gemm", "Clip"}
        assert after["Gemm"] == 2


def test_the_bytes_are_the_same_each_time_and_tell_no_paths(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:classifier")
    first, second = (to_bytes(export_model(recipe).model) for _ in range(2))
    assert first == second
    for secret in (str(folder), "site-packages", "stack_trace", "namespace", "model.py"):
        assert secret.encode() not in first


def test_outputs_in_dictionaries_and_tuples_have_names(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:detector", name="image")
    model = export_model(recipe).model
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert [value.name for value in model.graph.outputs] == ["scores", "boxes"]
    assert [info.name for info in open_source_session(recipe).outputs] == ["scores", "boxes"]


def test_a_dynamic_batch_takes_any_number(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:classifier", ("dynamic", 3, 24, 24))
    model = simplify_model(export_model(recipe).model).model
    session, original = open_reference(to_bytes(model)), open_source_session(recipe)
    assert session.inputs[0].shape == (-1, 3, 24, 24)
    for batch in (1, 3):
        data = {"picture": images(batch, 3, 24, 24)}
        np.testing.assert_allclose(session.run(data)["output"], original.run(data)["output"], atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_the_first_exporter_fails_the_second_one_is_used_and_the_reason_kept(folder: Path) -> None:
    result = export_model(write_recipe(folder, "model.py:only_traced"))
    assert result.facts["exporter"] == "torchscript"
    assert result.facts["fallback_reason"].startswith("dynamo: ")
    assert result.facts["outputs"] == {"output": [1, 5]}
    (note,) = result.facts["findings"]
    assert note["severity"] == "note"
    assert "torchscript" in note["rule"]
    assert note["seen"] == result.facts["fallback_reason"]


def test_where_both_exporters_fail_both_reasons_are_told(folder: Path) -> None:
    with pytest.raises(StageError, match=r"cannot be exported to ONNX: dynamo: .*; torchscript: "):
        export_model(write_recipe(folder, "model.py:neither"))


def test_an_export_that_computes_something_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(session: torch_export.TorchSession) -> bytes:
        model = helper.make_model(
            helper.make_graph(
                [
                    helper.make_node("Constant", [], ["y"], value_float=1.0),
                    helper.make_node("Expand", ["y", "s"], ["out"]),
                ],
                "wrong",
                [helper.make_tensor_value_info("picture", TensorProto.FLOAT, session.inputs[0].shape)],
                [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 5])],
                [numpy_helper.from_array(np.array([1, 5]), "s")],
            ),
            opset_imports=[helper.make_opsetid("", 18)],
        )
        return bytes(model.SerializeToString())

    monkeypatch.setattr(torch_export, "_dynamo", wrong)
    monkeypatch.setattr(torch_export, "_torchscript", wrong)
    with pytest.raises(
        StageError, match=r"the dynamo exporter changed output 'output' by up to .* accepted: .*rounding"
    ):
        export_model(write_recipe(folder, "model.py:classifier"))


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        (
            "model.py:two_inputs",
            (1, 3, 24, 24),
            r"TwoInputs.forward takes 2 inputs \(picture, state\).* such as others = \{ state = \[1, ...\] \}",
        ),
        ("model.py:classifier", None, "input.shape is not set"),
        ("model.py:classifier", (1, 4, 24, 24), r"does not take an input of shape \[1, 4, 24, 24\]"),
        ("model.py", (1, 3, 24, 24), "names no factory"),
        ("other.py:classifier", (1, 3, 24, 24), "is not a file"),
    ],
)
def test_a_recipe_that_names_the_model_wrongly_is_told(
    folder: Path, source: str, shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_model(write_recipe(folder, source, shape))


@pytest.mark.parametrize("shape", [(1, 3, 24, 24), None])
def test_an_exported_program_is_exported(folder: Path, shape: tuple[int, ...] | None) -> None:
    recipe = write_recipe(folder, "model.py:classifier")
    module = open_source_session(recipe).module  # type: ignore[attr-defined]  # a TorchSession
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 24, 24),)), folder / "model.pt2")
    result = export_model(write_recipe(folder, "model.pt2", shape))
    assert result.facts["inputs"] == {"picture": [1, 3, 24, 24]}
    data = {"picture": images(1, 3, 24, 24)}
    expected = open_source_session(recipe).run(data)["output"]
    np.testing.assert_allclose(open_reference(to_bytes(result.model)).run(data)["output"], expected, atol=1e-5)


STATE = "state = [1, 5]"


@pytest.mark.parametrize("source", ["model.py:two_inputs", "model.pt2"])
@pytest.mark.parametrize("name", [None, "image"])
def test_a_network_with_several_inputs_is_exported(folder: Path, source: str, name: str | None) -> None:
    asked = write_recipe(folder, "model.py:two_inputs", others=STATE)
    module = open_source_session(asked).module  # type: ignore[attr-defined]  # a TorchSession
    picture, state = images(1, 3, 24, 24), images(1, 5)
    torch.export.save(torch.export.export(module, (torch.tensor(picture), torch.tensor(state))), folder / "model.pt2")
    shape, others = (None, "") if source == "model.pt2" else ((1, 3, 24, 24), STATE)
    result = export_model(write_recipe(folder, source, shape, name=name, others=others))
    main = name or "picture"
    assert result.facts["inputs"] == {main: [1, 3, 24, 24], "state": [1, 5]}
    found = open_reference(to_bytes(result.model)).run({main: picture, "state": state})["output"]
    with torch.no_grad():
        expected = module(torch.tensor(picture), torch.tensor(state)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_arguments_with_defaults_are_inputs_where_they_are_named(folder: Path) -> None:
    result = export_model(write_recipe(folder, "model.py:two_inputs", others=f"gain = [1, 4], {STATE}"))
    assert list(result.facts["inputs"]) == ["picture", "state", "gain"]


def test_several_inputs_have_one_dynamic_batch(folder: Path) -> None:
    others = 'state = ["dynamic", 5]'
    recipe = write_recipe(folder, "model.py:two_inputs", ("dynamic", 3, 24, 24), others=others)
    session = open_reference(to_bytes(export_model(recipe).model))
    feeds = {"picture": images(3, 3, 24, 24), "state": images(3, 5)}
    np.testing.assert_allclose(
        session.run(feeds)["output"], open_source_session(recipe).run(feeds)["output"], atol=1e-5
    )


@pytest.mark.parametrize(
    ("others", "name", "message"),
    [
        ("stat = [1, 5]", None, r"TwoInputs.forward has no input 'stat'.*did you mean 'state'"),
        (f"bias = [1, 4], {STATE}", None, "takes gain before bias, and nothing is given for it.*gain in input.others"),
        (f"picture = [1, 3, 24, 24], {STATE}", None, "names every input of TwoInputs.forward"),
        (STATE, "state", "input.name = 'state' is the name of another input; accepted: 'picture'"),
        ("state = [1, 4]", None, r"does not take inputs of the shapes \[1, 3, 24, 24\] and \[1, 4\]"),
        ("state = [2, 5]", None, "input 'state' has a batch of 2"),
    ],
)
def test_other_inputs_that_do_not_fit_are_told(folder: Path, others: str, name: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_model(write_recipe(folder, "model.py:two_inputs", name=name, others=others))


@pytest.mark.parametrize("table", ["compress.training", "quantize.qat"])
def test_networks_with_several_inputs_are_not_trained(folder: Path, table: str) -> None:
    message = r"input.others: seen state; \[.*\] trains networks with one input; accepted: none"
    with pytest.raises(InputError, match=message):
        write_recipe(folder, "model.py:two_inputs", more=f'[{table}]\n[data]\ntraining = "x"\n', others=STATE)


# ---- ONNX files ----------------------------------------------------------------------------------------------------


def old_file(path: Path, opset: int = 9, batch: int | str = "N", dtype: int = TensorProto.FLOAT) -> Path:
    """A model as exporters wrote it in 2019: weights among the inputs, a symbolic batch, computed shapes."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)), "b": rng.normal(size=4), "s": np.abs(rng.normal(size=4)) + 0.1}
    constants = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
    constants += [
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in {"zero": 0, "rest": [-1]}.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "b", "s"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Shape", ["r"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["size"]),
        helper.make_node("Unsqueeze", ["size"], ["first"], axes=[0]),
        helper.make_node("Concat", ["first", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["r", "target"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["scores"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("image", dtype, [batch, 3, 6, 6])]
    inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in constants]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 144])]
    graph = helper.make_graph(nodes, "old", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3), path)
    return path


@pytest.mark.parametrize("opset", [7, 8, 9, 11])
def test_an_old_file_is_brought_to_the_form_of_today(tmp_path: Path, opset: int) -> None:
    path = old_file(tmp_path / "model.onnx", opset)
    result = export_model(write_recipe(tmp_path, "model.onnx", None))
    assert result.facts["original_opset"] == opset
    assert result.facts["inputs"] == {"image": [1, 3, 6, 6]}
    assert result.model.opset_imports[""] >= 17
    after = simplify_model(result.model)
    assert after.after == {"Conv": 1, "Relu": 1, "Reshape": 1, "Softmax": 1}
    data = {"image": images(1, 3, 6, 6)}
    expected = open_reference(path).run(
        {
            **data,
        }
    )["scores"]
    np.testing.assert_allclose(open_reference(to_bytes(after.model)).run(data)["scores"], expected, atol=1e-5)


def test_the_recipe_fixes_or_keeps_a_dynamic_batch(tmp_path: Path) -> None:
    old_file(tmp_path / "model.onnx")
    fixed = export_model(write_recipe(tmp_path, "model.onnx", (1, 3, 6, 6)))
    assert fixed.facts["outputs"] == {"scores": [1, 144]}
    kept = export_model(write_recipe(tmp_path, "model.onnx", ("dynamic", 3, 6, 6)))
    session = open_reference(to_bytes(simplify_model(kept.model).model))
    assert session.run({"image": images(3, 3, 6, 6)})["scores"].shape == (3, 144)


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((1, 3, 8, 8), None, r"the recipe's is \[1, 3, 8, 8\]; accepted: 6 at place 2"),
        ((1, 3, 6), None, r"has the shape \[N, 3, 6, 6\]; the recipe's is \[1, 3, 6\]"),
        ((4, 3, 6, 6), None, r"input 'image' has a batch of 4; accepted: 1"),
        (None, "picture", "has no input 'picture' .*there are: image"),
    ],
)
def test_a_recipe_that_does_not_fit_the_file_is_told(
    tmp_path: Path, shape: tuple[int, ...] | None, name: str | None, message: str
) -> None:
    old_file(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=message):
        export_model(write_recipe(tmp_path, "model.onnx", shape, name=name))


def two_input_file(path: Path) -> None:
    nodes = [helper.make_node("Add", ["image", "mask"], ["sum"]), helper.make_node("Relu", ["sum"], ["y"])]
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 6, 6])]
    inputs += [helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N", 1, "H", "W"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 6, 6])]
    graph = helper.make_graph(nodes, "two", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_the_recipe_says_what_a_further_input_leaves_open(tmp_path: Path) -> None:
    two_input_file(tmp_path / "model.onnx")
    result = export_model(write_recipe(tmp_path, "model.onnx", None, others="mask = [1, 1, 6, 6]"))
    assert result.facts["inputs"] == {"image": [1, 3, 6, 6], "mask": [1, 1, 6, 6]}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("", r"input 'mask' has the shape \[N, 1, H, W\]; set input.others.mask to .* such as \[1, 1, 224, 224\]"),
        ("mask = [1, 3, 6, 6]", r"the recipe's is \[1, 3, 6, 6\]; accepted: 1 at place 1"),
        ("image = [1, 3, 6, 6]", r"no further input 'image' \(input.others\); there are: mask"),
    ],
)
def test_a_further_input_that_does_not_fit_is_told(tmp_path: Path, others: str, message: str) -> None:
    two_input_file(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=message):
        export_model(write_recipe(tmp_path, "model.onnx", None, others=others))


@pytest.mark.parametrize("content", [b"", b"not onnx at all", bytes(range(256)) * 8])
def test_a_damaged_file_is_told_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(EdgeshipError, match=r"model\.onnx"):
        export_model(write_recipe(tmp_path, "model.onnx", None))


# ---- the stage -----------------------------------------------------------------------------------------------------


def test_the_stage_writes_the_model_golden_samples_and_facts(folder: Path, tmp_path: Path) -> None:
    data = images(6, 3, 24, 24)
    np.savez(folder / "data.npz", picture=data)
    recipe = write_recipe(
        folder, "model.py:classifier", more='[data]\ncalibration = "data.npz"\n[golden]\nsamples = 3\n'
    )
    out = tmp_path / "out"
    out.mkdir()
    STAGE.run(StageContext(recipe, ("onnxruntime",), {}, out, lambda *_: None))
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "golden.npz", "model.onnx"]
    golden = read_golden(out / "golden.npz")
    assert len(golden.feeds) == 3
    session = open_reference(out / "model.onnx")
    for feeds, outputs in zip(golden.feeds, golden.outputs, strict=True):
        assert any(np.array_equal(feeds["picture"][0], each) for each in data)
        np.testing.assert_allclose(session.run(feeds)["output"], outputs["output"], atol=1e-5)
    assert json.loads((out / "export.json").read_text())["golden_samples"] == 3
    assert [model.path for model in STAGE.models(recipe, ("onnxruntime",))] == ["model.onnx"]


def test_a_model_whose_outputs_are_not_numbers_is_refused(folder: Path) -> None:
    (folder / "nan.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return torch.log(-x * x)\n"
    )
    with pytest.raises(StageError, match=r"output 'output' has .* NaN or infinite on golden sample 0"):
        export_model(write_recipe(folder, "nan.py:M"))


def test_preprocessing_is_written_into_the_model(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:classifier").model_copy()
    (folder / "recipe.toml").write_text(
        (folder / "recipe.toml").read_text().replace("[input]", "[input]\nmean = [1, 2, 3]\nresize = 30")
    )
    recipe = load_recipe(folder / "recipe.toml")
    facts = export_model(recipe).model.metadata_props
    assert facts["edgeship.preprocessing.mean"] == "[1.0, 2.0, 3.0]"
    assert facts["edgeship.preprocessing.resize"] == "30"


def test_the_export_command_writes_a_complete_file_or_none(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:classifier")
    export_recipe(recipe, folder / "out.onnx")
    assert load_onnx(folder / "out.onnx").graph.outputs[0].name == "output"
    with pytest.raises(InputError, match="cannot write"):
        export_recipe(recipe, folder / "model.py" / "out.onnx")
    assert not list(folder.glob(".out.onnx*"))


def test_what_the_result_depends_on_is_declared(folder: Path) -> None:
    recipe = write_recipe(folder, "model.py:classifier")
    (folder / "layers.py").write_text("")
    assert [path.name for path in STAGE.files(recipe)] == ["model.py", "layers.py"]
    other = write_recipe(folder, "model.py:detector")
    assert STAGE.settings(recipe, ()) != STAGE.settings(other, ())


@pytest.mark.parametrize(
    ("recipe", "operators"),
    [
        ("mobilenet_v1/recipe.toml", {"Conv": 27, "Clip": 27, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1}),
        (
            "cifar_resnet/resnet20.toml",
            {"Conv": 19, "Relu": 19, "Add": 9, "Slice": 2, "Pad": 2, "GlobalAveragePool": 1, "Reshape": 1, "Gemm": 1},
        ),
    ],
)
def test_real_models_export_and_simplify(
    edgeship_data: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, operators: dict[str, int]
) -> None:
    monkeypatch.setenv("EDGESHIP_DATA", str(edgeship_data))
    result = export_model(load_recipe(Path(__file__).parents[2] / "examples" / recipe))
    assert simplify_model(result.model, feeds=result.feeds).after == operators
