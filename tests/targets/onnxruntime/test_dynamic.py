"""Weights alone in int8: the artifact's integer kernels compute what float arithmetic on the same integers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.writing.qdq import apply_plan
from edgeship.calibration.writing.weight_only import weight_only_plan
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET, OnnxSession, open_reference

Array = np.ndarray[Any, np.dtype[Any]]


def weight_only(model: ir.Model) -> ir.Model:
    return apply_plan(model, weight_only_plan(model, TARGET.rules, "pair_limited"))


def test_the_artifact_computes_what_its_reference_does(
    tiny_model: ir.Model, tiny_images: Array, tmp_path: Path
) -> None:
    quantized = weight_only(tiny_model)
    path = tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(quantized, ConvertOptions()))
    reference, artifact = open_reference(to_bytes(TARGET.reference(quantized))), OnnxSession(path)
    plain = open_reference(to_bytes(quantized))
    for image in tiny_images[:8]:
        feeds = {"image": image[np.newaxis]}
        expected, seen = reference.run(feeds)["logits"], artifact.run(feeds)["logits"]
        assert np.abs(seen - expected).max() <= 1e-2 * np.abs(expected).max()
        assert not np.array_equal(expected, plain.run(feeds)["logits"])  # the activations are rounded in both


def test_float_activations_beside_quantized_ones_stay_float(tiny_model: ir.Model, tiny_images: Array) -> None:
    """Whoever chose ranges for some activations and none for others did not ask for ranges at run time."""
    quantized = weight_only(tiny_model)
    graph, image = quantized.graph, quantized.graph.inputs[0]
    for name, number in (("image_step", np.float32(0.02)), ("image_zero", np.int8(0))):
        value = ir.Value(name=name, const_value=ir.tensor(number, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(number.dtype), ir.Shape(())
        graph.register_initializer(value)
    parameters = [graph.initializers[name] for name in ("image_step", "image_zero")]
    readers = list(image.uses())
    quantize = ir.node("QuantizeLinear", [image, *parameters])
    real = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters])
    for node, name, dtype in ((quantize, "image_q", ir.DataType.INT8), (real, "image_real", ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, image.shape
    graph.insert_before(graph[0], [quantize, real])
    for reader, place in readers:
        reader.replace_input_with(place, real.outputs[0])
    assert TARGET.reference(quantized) is quantized
    plain = open_reference(to_bytes(quantized))
    artifact = OnnxSession(TARGET.convert(quantized, ConvertOptions()))
    for image_values in tiny_images[:4]:
        feeds = {"image": image_values[np.newaxis]}
        assert artifact.run(feeds)["logits"] == pytest.approx(plain.run(feeds)["logits"], rel=1e-4, abs=1e-4)


def test_every_layer_runs_in_integers(tiny_model: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(weight_only(tiny_model), ConvertOptions()))
    share = TARGET.integer_share(path)
    assert share.share == 1.0
    assert share.float_layers == ()
    onnx.checker.check_model(str(path), full_check=True)
    names = {value.name for value in ir.load(path).graph.outputs}
    assert names == {"logits"}


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_either_layout_and_a_bias(transposed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 4) if transposed else (4, 6)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=transposed)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(rng.normal(size=6).astype(np.float32), "b")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    quantized = weight_only(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(quantized, ConvertOptions()))
    feeds = {"x": rng.normal(size=(1, 4)).astype(np.float32)}
    expected = open_reference(to_bytes(TARGET.reference(quantized))).run(feeds)["y"]
    assert OnnxSession(path).run(feeds)["y"] == pytest.approx(expected, abs=1e-4)


def test_a_static_model_is_its_own_reference(tiny_model: ir.Model) -> None:
    assert to_bytes(TARGET.reference(tiny_model)) == to_bytes(tiny_model)
    assert json.dumps(dict(TARGET.reference(tiny_model).metadata_props)) == json.dumps(dict(tiny_model.metadata_props))
