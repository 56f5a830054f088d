"""The golden check tells a broken model from a good one and names the stage, the model and the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array
from edgeship.pipeline.golden import check_models, read_golden
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.stage import ModelOutput


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "tiny"\nmodel.source = "model.onnx"\n[targets.onnxruntime]\n')
    return load_recipe(path)


@pytest.fixture
def exported(tmp_path: Path, tiny_models: dict[str, bytes], tiny_images: Array) -> Path:
    """2-export of the plain model, with four golden samples computed by ONNX Runtime."""
    import onnxruntime

    folder = tmp_path / "2-export"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(tiny_models["plain"])
    session = onnxruntime.InferenceSession(tiny_models["plain"], providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"image": image[None]})[0] for image in tiny_images[:4]]
    np.savez(folder / "golden.npz", **{"input:image": tiny_images[:4], "output:logits": np.concatenate(outputs)})
    return folder


def changed(content: bytes, name: str, change: Callable[[Array], Array]) -> bytes:
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))
    return model.SerializeToString()


def test_golden_samples_are_read_one_by_one(exported: Path, tiny_images: Array) -> None:
    golden = read_golden(exported / "golden.npz")
    assert len(golden.feeds) == len(golden.outputs) == 4
    assert np.array_equal(golden.feeds[2]["image"], tiny_images[2:3])
    assert golden.outputs[0]["logits"].shape == (1, 5)


def test_an_unchanged_model_passes(exported: Path, recipe: Recipe) -> None:
    check_models("export", [ModelOutput("model.onnx")], exported, recipe, {})
    check_models("simplify", [ModelOutput("model.onnx")], exported, recipe, {"export": exported})


@pytest.mark.parametrize(
    "change", [lambda w: w * 1.01, lambda w: w[::-1], np.zeros_like], ids=["scaled", "reversed", "zero"]
)
def test_a_float_model_with_other_weights_is_named_with_its_stage_and_output(
    tmp_path: Path, exported: Path, recipe: Recipe, change: Callable[[Array], Array]
) -> None:
    folder = tmp_path / "3-simplify"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(changed((exported / "model.onnx").read_bytes(), "second_weight", change))
    with pytest.raises(StageError, match=r"^simplify: model.onnx fails the golden check: output 'logits' is off by"):
        check_models("simplify", [ModelOutput("model.onnx")], folder, recipe, {"export": exported})


@pytest.mark.parametrize(
    "change", [lambda w: w[::-1], np.zeros_like, lambda w: -w], ids=["reversed", "zero", "negated"]
)
def test_a_quantized_model_that_computes_something_else_is_caught(
    tmp_path: Path, exported: Path, recipe: Recipe, change: Callable[[Array], Array]
) -> None:
    folder = tmp_path / "4-quantize"
    folder.mkdir()
    (folder / "full.onnx").write_bytes(changed((exported / "model.onnx").read_bytes(), "fc_weight", change))
    with pytest.raises(StageError, match=r"^quantize: full.onnx fails the golden check: .* dB SQNR"):
        check_models("quantize", [ModelOutput("full.onnx", steps=True)], folder, recipe, {"export": exported})


def test_a_quantized_model_with_the_usual_error_passes(tmp_path: Path, exported: Path, recipe: Recipe) -> None:
    def rounded(weights: Array) -> Array:
        step = np.abs(weights).max() / 127
        return np.asarray(np.rint(weights / step) * step)

    folder = tmp_path / "4-quantize"
    folder.mkdir()
    (folder / "full.onnx").write_bytes(changed((exported / "model.onnx").read_bytes(), "second_weight", rounded))
    check_models("quantize", [ModelOutput("full.onnx", steps=True)], folder, recipe, {"export": exported})


@pytest.mark.parametrize(("off", "is_sound"), [(1.1, True), (-1.0, False)])
def test_an_output_that_never_moves_is_held_against_its_size(
    tmp_path: Path, exported: Path, recipe: Recipe, off: float, is_sound: bool
) -> None:
    constant = changed(
        changed((exported / "model.onnx").read_bytes(), "fc_weight", np.zeros_like), "fc_bias", np.ones_like
    )
    golden = dict(np.load(exported / "golden.npz"))
    golden["output:logits"] = np.ones_like(golden["output:logits"])
    np.savez(exported / "golden.npz", **golden)
    folder = tmp_path / "4-quantize"
    folder.mkdir()
    (folder / "full.onnx").write_bytes(changed(constant, "fc_bias", lambda bias: bias * off))
    models = [ModelOutput("full.onnx", steps=True)]
    if is_sound:
        check_models("quantize", models, folder, recipe, {"export": exported})
    else:
        with pytest.raises(StageError, match=r"is off by up to 2 where 1 was recorded throughout; accepted: 0\.891"):
            check_models("quantize", models, folder, recipe, {"export": exported})


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"input:x": np.zeros((2, 1))},
        {"input:x": np.zeros((2, 1)), "input:y": np.zeros((3, 1)), "output:z": np.zeros((2, 1))},
        {"input:x": np.zeros((2, 1)), "output:z": np.zeros((3, 1))},
        {"input:x": np.zeros((0, 1)), "output:z": np.zeros((0, 1))},
    ],
)
def test_golden_samples_that_make_no_sense_are_refused(tmp_path: Path, arrays: Mapping[str, Array]) -> None:
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)
    with pytest.raises(StageError, match="golden"):
        read_golden(path)


def test_a_damaged_golden_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(StageError, match="cannot be read"):
        read_golden(path)
