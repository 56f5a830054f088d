"""The QDQ model: valid, near the float one, the same every time, and fused completely by ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import QuantPlan
from edgeship.calibration.writing.qdq import PLAN_KEY, apply_plan, output_steps

Quantized = Callable[..., tuple[QuantPlan, ir.Model]]


def _shots(images: np.ndarray) -> list[Any]:
    from types import SimpleNamespace

    return [SimpleNamespace(name=str(i), feeds={"image": image[np.newaxis]}) for i, image in enumerate(images)]


@pytest.mark.parametrize("weights", ["full", "pair_limited"])
def test_outputs_are_near_the_float_model(
    tiny_model: ir.Model, tiny_images: np.ndarray, quantized: Quantized, run_exactly: Any, weights: str
) -> None:
    plan, qdq = quantized(tiny_model, shots=_shots(tiny_images), weights=weights)
    onnx.checker.check_model(ir.to_proto(qdq), full_check=True)
    error, signal = 0.0, 0.0
    for image in tiny_images:
        expected = run_exactly(tiny_model, {"image": image[np.newaxis]})["logits"]
        error += float(((run_exactly(qdq, {"image": image[np.newaxis]})["logits"] - expected) ** 2).sum())
        signal += float((expected**2).sum())
    assert 10 * np.log10(signal / error) > 28
    assert output_steps(qdq) == {"logits": float(plan.activations["logits"].scale)}


def test_the_model_given_is_not_changed(tiny_model: ir.Model, quantized: Quantized) -> None:
    before = ir.to_proto(tiny_model).SerializeToString(deterministic=True)
    quantized(tiny_model)
    assert ir.to_proto(tiny_model).SerializeToString(deterministic=True) == before


def test_the_same_samples_give_the_same_bytes(tiny_model: ir.Model, quantized: Quantized) -> None:
    first, second = (quantized(tiny_model, weights="pair_limited") for _ in range(2))
    assert first[0].digest() == second[0].digest()
    assert first[1].metadata_props[PLAN_KEY] == first[0].digest()
    serialized = [ir.to_proto(model).SerializeToString(deterministic=True) for _, model in (first, second)]
    assert serialized[0] == serialized[1]


def test_a_tensor_keeps_its_name_behind_the_dequantizer(tiny_model: ir.Model, quantized: Quantized) -> None:
    plan, qdq = quantized(tiny_model)
    inner = {value.name: node.op_type for node in qdq.graph for value in node.outputs}
    for name in plan.activations:
        assert inner[f"{name}__dq" if name == "image" else name] == "DequantizeLinear"


def test_a_plan_for_another_graph_is_refused(
    tiny_models: dict[str, bytes], quantized: Quantized, build: Callable[..., ir.Model]
) -> None:
    plan, _ = quantized(ir.from_proto(onnx.load_from_string(tiny_models["plain"])))
    with pytest.raises(StageError, match="the plan is for another graph"):
        apply_plan(build("(float[1] x) => (float[1] y) { y = Relu(x) }"), plan)


def test_a_float_reader_of_a_float_tensor_sees_it_unrounded(
    build: Callable[..., ir.Model], quantized: Quantized, run_exactly: Any, samples: Any
) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z) { e = Exp(x) y = Conv(e, w) z = Log(e) }",
        w=np.eye(2).reshape(2, 2, 1, 1),
    )
    _, qdq = quantized(model)
    feeds = samples(model)[0].feeds
    assert run_exactly(qdq, feeds)["z"] == pytest.approx(feeds["x"], abs=1e-6)


def test_a_dynamic_batch_stays_dynamic(build: Callable[..., ir.Model], quantized: Quantized, run_exactly: Any) -> None:
    model = build(
        "(float[N,2,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w) y = Relu(c) }", w=np.eye(2).reshape(2, 2, 1, 1)
    )
    _, qdq = quantized(model)
    values = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    together = run_exactly(qdq, {"x": values})["y"]
    assert np.array_equal(together[1], run_exactly(qdq, {"x": values[1:2]})["y"][0])


def test_two_inputs_and_two_outputs(
    build: Callable[..., ir.Model], quantized: Quantized, run_exactly: Any, samples: Any
) -> None:
    model = build(
        "(float[1,2,4,4] a, float[1,2,4,4] b) => (float[1,2,4,4] s, float[1,2,4,4] c) { s = Add(a, b) c = Conv(s, w) }",
        w=np.eye(2).reshape(2, 2, 1, 1),
    )
    _, qdq = quantized(model)
    steps = output_steps(qdq)
    feeds = samples(model)[0].feeds
    result = run_exactly(qdq, feeds)
    for name, expected in run_exactly(model, feeds).items():
        assert np.abs(result[name] - expected).max() <= 2 * steps[name]


def _unsigned(model: ir.Model) -> bytes:
    """The model with all activations uint8, as x86 kernels want them: the same numbers, 128 higher."""
    proto = ir.to_proto(model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    zero_points = {node.input[2] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    for name in zero_points:
        values = numpy_helper.to_array(tensors[name])
        tensors[name].CopyFrom(numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), name))
    for value in proto.graph.value_info:
        if value.name.endswith("__q"):
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    return proto.SerializeToString()


def test_onnxruntime_fuses_every_multiply_accumulate(
    tiny_model: ir.Model, quantized: Quantized, tmp_path: Path
) -> None:
    _, qdq = quantized(tiny_model, weights="pair_limited")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(_unsigned(qdq), options, providers=["CPUExecutionProvider"])
    executed = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    written = Counter(node.op_type for node in qdq.graph)
    assert executed["QLinearConv"] == written["Conv"]
    assert executed["QGemm"] == written["Gemm"]
    assert executed["QLinearAdd"] == written["Add"]
    assert not executed["Conv"] + executed["Gemm"] + executed["FusedConv"] + executed["Relu"] + executed["Clip"]
