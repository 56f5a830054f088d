from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.quantization as ortq
import pytest
from normalized import normalized
from random_calibration import RandomImages

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.samples.data import Sample
from edgeship.calibration.types import strictest
from edgeship.pipeline.layers import LayerComparison, LayerDifference, OnnxLayers, describe, open_layers
from edgeship.targets.base import ConvertOptions, load
from edgeship.targets.onnxruntime import open_float


def _quantized(model: ir.Model, images: np.ndarray) -> ir.Model:
    rules = strictest([load(name).rules for name in ("onnxruntime", "tflite")])
    _, qdq = quantize_model(
        model, [Sample(str(i), {"image": image[np.newaxis]}, None) for i, image in enumerate(images)], rules, open_float
    )
    return qdq


def _compared(a: Path, b: Path, images: np.ndarray) -> list[LayerDifference]:
    comparison = LayerComparison(open_layers(a, as_reference=True), open_layers(b, as_reference=False))
    for image in images:
        comparison.update({"image": image[np.newaxis]})
    return comparison.result()


@pytest.mark.parametrize("target", ["onnxruntime", "tflite"])
def test_every_int8_layer_of_an_artifact_is_found_and_within_a_step_by_itself(
    tiny_model: ir.Model, tiny_images: np.ndarray, tmp_path: Path, target: str
) -> None:
    layers_of_the_model = {n.op_type for n in tiny_model.graph} & {"Conv", "Gemm"}
    qdq = _quantized(tiny_model, tiny_images[:8])
    reference, artifact = tmp_path / "qdq.onnx", tmp_path / f"model{load(target).suffix}"
    reference.write_bytes(to_bytes(qdq))
    artifact.write_bytes(load(target).convert(qdq, ConvertOptions()))
    found = _compared(reference, artifact, tiny_images[8:16])
    assert layers_of_the_model <= {layer.operator for layer in found}
    assert sum(layer.operator == "Conv" for layer in found) == sum(n.op_type == "Conv" for n in tiny_model.graph)
    for layer in found:
        assert layer.own is not None
        assert layer.own.max_steps <= 1
        assert layer.own.max_steps <= layer.difference.max_steps or layer.difference.max_steps <= 2
    assert "no layer is off by more than 2 steps by itself" in describe(found)


def test_layers_of_operators_that_take_scales_themselves_are_compared_as_real_numbers(
    tiny_model: ir.Model, tiny_images: np.ndarray, tmp_path: Path
) -> None:
    given, integers, artifact = (tmp_path / name for name in ("float.onnx", "qoperator.onnx", "model.tflite"))
    given.write_bytes(to_bytes(tiny_model))
    form = ortq.QuantFormat.QOperator
    ortq.quantize_static(
        given, integers, RandomImages(tiny_images[:1].shape, "image"), quant_format=form, per_channel=True
    )
    artifact.write_bytes(load("tflite").convert(load_onnx(integers), ConvertOptions()))
    found = _compared(integers, artifact, tiny_images[8:12])
    assert {"Conv", "Gemm"} <= {layer.operator for layer in found}
    assert all(layer.own is not None and layer.own.max_steps <= 2 for layer in found)


def test_a_normalization_computed_from_integers_is_one_layer_that_is_fed_as_the_others_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    model = normalized(rng, 6, 8, "image")
    images = rng.normal(size=(12, 6, 8)).astype(np.float32)
    qdq = _quantized(model, images[:8])
    reference, artifact = tmp_path / "qdq.onnx", tmp_path / "model.tflite"
    reference.write_bytes(to_bytes(qdq))
    artifact.write_bytes(load("tflite").convert(qdq, ConvertOptions()))
    found = {layer.name: layer for layer in _compared(reference, artifact, images[8:])}
    assert {name: layer.operator for name, layer in found.items()} == {
        "h": "MatMul",
        "n": "LayerNormalization",
        "y": "MatMul",
    }
    session, quantized = open_layers(artifact, as_reference=False), open_layers(reference, as_reference=True)
    assert isinstance(quantized, OnnxLayers)
    fed = quantized.fed({"h": 3, "n": 3})
    assert fed is not None
    tensors = session.run({"image": images[9][np.newaxis]})
    moved = {"h__fed": tensors["h"][:, ::-1].copy(), "n__fed": tensors["n"]}
    results = fed.run({info.name: moved.get(info.name, images[9][np.newaxis]) for info in fed.inputs})
    np.testing.assert_array_equal(results["n"], tensors["n"][:, ::-1])


def test_layers_of_a_model_that_onnxruntime_quantized_are_found_from_the_float_model(
    tiny_models: dict[str, bytes], tiny_images: np.ndarray, tmp_path: Path
) -> None:
    """It keeps the name of a quantized tensor for what is before the pair; ours has it behind."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._left = list(tiny_images[:8])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {"image": self._left.pop()[None]} if self._left else None

    plain, theirs = tmp_path / "plain.onnx", tmp_path / "theirs.onnx"
    plain.write_bytes(tiny_models["residual"])
    quantize_static(
        plain, theirs, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    model = onnx.load(plain)
    layers = [node for node in model.graph.node if node.op_type in {"Conv", "Gemm"}]
    followed = {reader.input[0]: reader.output[0] for reader in model.graph.node if reader.op_type in {"Relu", "Clip"}}
    found = {layer.name: layer for layer in _compared(plain, theirs, tiny_images[8:16])}
    for layer in layers:
        seen = found[followed.get(layer.output[0], layer.output[0])]
        assert seen.difference.sqnr_db > 15
        assert seen.use is not None


def test_a_wrong_layer_is_named_and_the_layers_after_it_are_not_blamed(
    tiny_models: dict[str, bytes], tiny_images: np.ndarray, tmp_path: Path
) -> None:
    qdq = _quantized(ir.serde.deserialize_model(onnx.load_from_string(tiny_models["residual"])), tiny_images[:8])
    reference, artifact = tmp_path / "qdq.onnx", tmp_path / "model.tflite"
    reference.write_bytes(to_bytes(qdq))
    weights = qdq.graph.initializers["inner_1_weight__q"]
    wrong = weights.const_value.numpy().copy()
    wrong[0] = -wrong[0]
    weights.const_value = ir.Tensor(wrong, name=weights.name)
    artifact.write_bytes(load("tflite").convert(qdq, ConvertOptions()))
    found = {layer.name: layer for layer in _compared(reference, artifact, tiny_images[8:12])}
    blamed = [name for name, layer in found.items() if layer.own is not None and layer.own.max_steps > 2]
    assert blamed == ["inner_1_relu"]
    assert found["logits"].difference.max_steps > 2
    assert "off by more than 2 steps by themselves: inner_1_relu (" in describe(list(found.values()))


def test_a_file_that_does_not_tell_the_shapes_between_layers_is_compared_just_the_same(
    tiny_models: dict[str, bytes], tiny_images: np.ndarray, tmp_path: Path
) -> None:
    qdq = _quantized(ir.serde.deserialize_model(onnx.load_from_string(tiny_models["residual"])), tiny_images[:8])
    whole, bare, artifact = tmp_path / "whole.onnx", tmp_path / "bare.onnx", tmp_path / "model.tflite"
    whole.write_bytes(to_bytes(qdq))
    artifact.write_bytes(load("tflite").convert(qdq, ConvertOptions()))
    proto = onnx.load(whole)
    assert proto.graph.value_info
    del proto.graph.value_info[:]
    onnx.save(proto, bare)
    found = _compared(bare, artifact, tiny_images[8:12])
    assert found == _compared(whole, artifact, tiny_images[8:12])
    assert all(layer.own is not None for layer in found)


def test_float_models_are_compared_by_the_tensors_they_share(
    tiny_models: dict[str, bytes], tiny_images: np.ndarray, tmp_path: Path
) -> None:
    reference, artifact = tmp_path / "float.onnx", tmp_path / "float.tflite"
    reference.write_bytes(tiny_models["plain"])
    model = ir.load(reference)
    artifact.write_bytes(load("tflite").convert(model, ConvertOptions()))
    found = _compared(reference, artifact, tiny_images[:2])
    assert {"first_relu", "smaller", "logits"} <= {layer.name for layer in found}
    assert all(layer.own is None and layer.difference.max_abs < 1e-4 for layer in found)


def test_a_file_without_named_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--layers compares \.onnx and \.tflite"):
        open_layers(tmp_path / "recipe.toml", as_reference=True)
