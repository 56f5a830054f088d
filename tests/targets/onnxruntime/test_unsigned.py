"""The artifact holds the same integers as the signed graph, written unsigned."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET, open_reference
from edgeship.targets.onnxruntime.unsigned import make_unsigned

Array = np.ndarray[Any, np.dtype[Any]]


def _qdq(nodes: list[Any], constants: dict[str, Array], shape: list[int]) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model)


SCALES = {"s": np.float32(0.05), "z": np.int8(-3)}


def test_every_quantized_tensor_is_the_signed_one_plus_128(signed: ir.Model, tiny_images: Array, integers: Any) -> None:
    unsigned = signed.clone()
    make_unsigned(unsigned)
    for image in tiny_images[:4]:
        before, after = integers(signed, {"image": image[None]}), integers(unsigned, {"image": image[None]})
        assert before.keys() == after.keys()
        for name, values in before.items():
            assert values.dtype == np.int8
            assert after[name].dtype == np.uint8
            np.testing.assert_array_equal(after[name].astype(int), values.astype(int) + 128, err_msg=name)


def test_the_reference_of_the_artifact_gives_the_same_floats(signed: ir.Model, tiny_images: Array) -> None:
    artifact = TARGET.convert(signed, ConvertOptions())
    for image in tiny_images[:4]:
        expected = open_reference(to_bytes(signed)).run({"image": image[None]})
        seen = open_reference(artifact).run({"image": image[None]})
        np.testing.assert_array_equal(seen["logits"], expected["logits"])


def test_weights_stay_int8_and_biases_int32(signed: ir.Model) -> None:
    artifact = onnx.load_from_string(TARGET.convert(signed, ConvertOptions()))
    types = {tensor.name: tensor.data_type for tensor in artifact.graph.initializer}
    before = {name: value.const_value for name, value in signed.graph.initializers.items()}
    dequantized = [node.input for node in artifact.graph.node if node.op_type == "DequantizeLinear"]
    constants = [inputs[0] for inputs in dequantized if inputs[0] in types]
    assert {types[name] for name in constants} == {TensorProto.INT8, TensorProto.INT32}
    for tensor in artifact.graph.initializer:
        if tensor.name in constants:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), before[tensor.name].numpy())


def test_converting_leaves_the_model_as_it_was(signed: ir.Model) -> None:
    before = to_bytes(signed)
    for layout in ("nchw", "nhwc"):
        TARGET.convert(signed, ConvertOptions(io_layout=layout, io_dtype="uint8"))
    assert to_bytes(signed) == before


def test_converting_twice_gives_the_same_bytes(signed: ir.Model) -> None:
    options = ConvertOptions(metadata={"edgeship.b": "2", "edgeship.a": "1"})
    assert TARGET.convert(signed, options) == TARGET.convert(signed.clone(), options)


def test_metadata_is_written_in_order(signed: ir.Model) -> None:
    content = TARGET.convert(signed, ConvertOptions(metadata={"edgeship.b": "2", "edgeship.a": "1"}))
    written = [(entry.key, entry.value) for entry in onnx.load_from_string(content).metadata_props]
    assert written == sorted(written)
    assert written[:2] == [("edgeship.a", "1"), ("edgeship.b", "2")]


def test_a_float_model_passes_through(tiny_model: ir.Model, tiny_images: Array) -> None:
    content = TARGET.convert(tiny_model, ConvertOptions(metadata={"edgeship.a": "1"}))
    written = onnx.load_from_string(content)
    assert {node.op_type for node in written.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear"})
    feeds = {"image": tiny_images[:1]}
    np.testing.assert_array_equal(
        open_reference(content).run(feeds)["logits"], open_reference(to_bytes(tiny_model)).run(feeds)["logits"]
    )


def test_a_constant_operand_of_an_activation_becomes_unsigned() -> None:
    constants = {**SCALES, "c": np.arange(-4, 4, dtype=np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    model = _qdq(nodes, constants, [2, 8])
    make_unsigned(model)
    constant = model.graph.initializers["c"].const_value
    assert constant is not None
    np.testing.assert_array_equal(constant.numpy(), np.arange(124, 132, dtype=np.uint8))


def test_tensors_that_are_moved_as_integers_change_together() -> None:
    constants = {**SCALES, "shape": np.array([3, 4])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Reshape", ["q", "shape"], ["moved"]),
        helper.make_node("DequantizeLinear", ["moved", "s", "z"], ["y"]),
    ]
    model = _qdq(nodes, constants, [2, 6])
    before = to_bytes(model)
    make_unsigned(model)
    feeds = {"x": np.linspace(-9, 9, 12, dtype=np.float32).reshape(2, 6)}
    np.testing.assert_array_equal(
        open_reference(to_bytes(model)).run(feeds)["y"], open_reference(before).run(feeds)["y"]
    )
    zero_points = {node.inputs[2].dtype for node in model.graph if node.op_type.endswith("Linear")}
    assert zero_points == {ir.DataType.UINT8}


def test_integers_that_an_integer_operator_computes_stay_signed() -> None:
    constants = {**SCALES, "low": np.int8(-20), "high": np.int8(20)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["clipped"]),
        helper.make_node("DequantizeLinear", ["clipped", "s", "z"], ["y"]),
    ]
    model = _qdq(nodes, constants, [2, 6])
    make_unsigned(model)
    assert {node.inputs[2].dtype for node in model.graph if node.op_type.endswith("Linear")} == {ir.DataType.INT8}
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "QuantizeLinear"} == {ir.DataType.INT8}


@pytest.mark.parametrize("zero_point", [None, 5])
def test_weights_that_the_graph_quantizes_itself_stay_signed(zero_point: int | None) -> None:
    names = ["ws", "wz"]
    constants = {**SCALES, "w": np.ones((4, 6), np.float32), "ws": np.float32(0.01), "wz": np.int8(zero_point or 0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("QuantizeLinear", ["w", *names], ["wq"]),
        helper.make_node("DequantizeLinear", ["wq", *names], ["wd"]),
        helper.make_node("Gemm", ["a", "wd"], ["y"], transB=1),
    ]
    model = _qdq(nodes, constants, [2, 6])
    make_unsigned(model)
    types = [node.inputs[2].dtype for node in model.graph if node.op_type.endswith("Linear")]
    assert types == [ir.DataType.UINT8, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT8]
