"""Multiply-accumulates, by formulas written out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.macs import count_macs


def _model(op: str, shape: list[int | str], weight: tuple[int, ...], **attributes: object) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(weight, np.float32), "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (_model("Conv", [1, 6, 9, 9], (8, 6, 3, 3)), 7 * 7 * 8 * 54),
        (_model("Conv", [1, 6, 9, 9], (8, 3, 3, 3), group=2, strides=[2, 2]), 4 * 4 * 8 * 27),
        (_model("Conv", [1, 6, 9, 9], (6, 1, 3, 3), group=6), 7 * 7 * 6 * 9),
        (_model("Conv", [1, 6, 9], (8, 6, 3)), 7 * 8 * 18),
        (_model("ConvTranspose", [1, 6, 9, 9], (6, 8, 3, 3), strides=[2, 2]), 81 * 6 * 8 * 9),
        (_model("Gemm", [4, 6], (6, 8)), 4 * 48),
        (_model("Gemm", [4, 6], (8, 6), transB=1), 4 * 48),
        (_model("Gemm", [6, 4], (8, 6), transA=1, transB=1), 4 * 48),
        (_model("MatMul", [2, 3, 4, 6], (6, 8)), 24 * 48),
        (_model("MatMul", [2, 3, 4, 6], (6,)), 24 * 6),
        (_model("Add", [4, 6], (6,)), 0),
    ],
)
def test_each_operator_counts_by_its_formula(model: ir.Model, macs: int) -> None:
    assert sum(count_macs(model).values()) == macs


def test_a_dynamic_batch_counts_one_sample() -> None:
    assert count_macs(_model("Conv", ["n", 6, 9, 9], (8, 6, 3, 3))) == {"layer": 7 * 7 * 8 * 54}


def test_an_unknown_shape_is_an_error_that_names_node_and_tensor() -> None:
    with pytest.raises(InputError, match=r"Conv layer: .* the shape of 'y' is unknown"):
        count_macs(_model("Conv", [1, 6, "h", "w"], (8, 6, 3, 3)))


def test_a_quantized_graph_does_the_work_of_its_float_graph() -> None:
    scales = {"s": np.float32(0.1), "z": np.int8(0), "wq": np.ones((8, 6, 3, 3), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["w"]),
        helper.make_node("Conv", ["a", "w"], ["y"], name="layer"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in scales.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert count_macs(ir.from_proto(model)) == {"layer": 7 * 7 * 8 * 54}


def test_counting_leaves_the_model_as_it_was(tiny_model: ir.Model) -> None:
    before = ir.to_proto(tiny_model).SerializeToString()
    assert len(count_macs(tiny_model)) == sum(node.op_type in ("Conv", "Gemm") for node in tiny_model.graph)
    assert ir.to_proto(tiny_model).SerializeToString() == before
    onnx.checker.check_model(ir.to_proto(tiny_model))
