"""Formulas where they could fail, broadcasting beyond the kernels' axes, and the element types that kernels lack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Convert = Callable[..., Path]
Judge = Callable[[Path], TFLiteSession]


def _model(nodes: list[onnx.NodeProto], feeds: Mapping[str, Array], opset: int = 24) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
        for name, values in feeds.items()
    ]
    output = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(nodes, "test", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


def _of_each(function: Callable[[float], float]) -> Callable[[Array], Array]:
    return lambda x: np.array([function(float(v)) for v in x], np.float32)


WIDE = np.array([-1e4, -30, -3, -0.5, -1e-3, -1e-6, 0, 1e-6, 1e-3, 0.5, 3, 30, 1e4], np.float32)
UNIT = np.array([-1, -0.999, -0.5, -1e-4, 0, 1e-4, 0.5, 0.999, 1], np.float32)
FORMULAS: dict[str, tuple[Array, Callable[[Array], Array]]] = {
    "Erf": (np.append(WIDE, np.float32([np.inf, -np.inf])), _of_each(math.erf)),
    "Softplus": (WIDE, lambda x: np.logaddexp(0, x)),
    "Mish": (WIDE, lambda x: x * np.tanh(np.logaddexp(0, x))),
    "Asinh": (WIDE, np.arcsinh),
    "Sinh": (WIDE[1:-1], np.sinh),
    "Cosh": (WIDE[1:-1], np.cosh),
    "Acosh": (np.array([1, 1.001, 2, 1e4, 1e30], np.float32), np.arccosh),
    "Acos": (UNIT, np.arccos),
    "Asin": (UNIT, np.arcsin),
    "Atan": (np.append(WIDE, np.float32([np.inf, -np.inf])), np.arctan),
    "Atanh": (UNIT[1:-1], np.arctanh),
    "Softsign": (WIDE, lambda x: x / (1 + np.abs(x))),
}


@pytest.mark.parametrize("op", sorted(FORMULAS))
def test_formula_holds_at_zero_in_the_tails_and_at_the_ends(op: str, convert: Convert, judge: Judge) -> None:
    x, function = FORMULAS[op]
    path = convert(_model([helper.make_node(op, ["x"], ["y"])], {"x": x}))
    np.testing.assert_allclose(judge(path).run({"x": x})["y"], function(x.astype(np.float64)), rtol=1e-4, atol=1e-5)


BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Less": np.less,
    "Max": np.maximum,
    "Mod": np.mod,
    "Pow": np.power,
}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 1, 3, 1, 2, 1, 2), (1, 2, 1, 2, 1, 2, 1)),
        ((2, 3, 1, 1, 2, 2), (2, 3, 4, 2, 1, 1)),
        ((2, 1, 2, 3, 2), (1,)),
    ],
)
@pytest.mark.parametrize("op", sorted(BINARY))
def test_operands_broadcast_over_any_number_of_axes(
    op: str, a: tuple[int, ...], b: tuple[int, ...], convert: Convert, judge: Judge
) -> None:
    rng = np.random.default_rng(5)
    feeds = {"a": rng.uniform(1, 3, a).astype(np.float32), "b": rng.uniform(1, 3, b).astype(np.float32)}
    path = convert(_model([helper.make_node(op, ["a", "b"], ["y"])], feeds))
    np.testing.assert_allclose(judge(path).run(feeds)["y"], BINARY[op](feeds["a"], feeds["b"]), rtol=1e-5)


def test_three_operands_of_a_choice_broadcast_over_any_number_of_axes(convert: Convert, judge: Judge) -> None:
    rng = np.random.default_rng(5)
    feeds = {
        "c": rng.integers(0, 2, (2, 1, 3, 1, 2, 1)).astype(np.bool_),
        "a": rng.normal(size=(1, 2, 1, 2, 1, 2)).astype(np.float32),
        "b": rng.normal(size=(2, 1)).astype(np.float32),
    }
    path = convert(_model([helper.make_node("Where", ["c", "a", "b"], ["y"])], feeds))
    np.testing.assert_array_equal(judge(path).run(feeds)["y"], np.where(feeds["c"], feeds["a"], feeds["b"]))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_chain_in_another_float_type_is_cast_at_its_ends_only(
    dtype: str, convert: Convert, operators: Callable[[Path], Counter[str]], judge: Judge
) -> None:
    x = np.linspace(-2, 2, 12).astype(dtype).reshape(1, 3, 4)
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Exp", ["b"], ["y"]),
    ]
    path = convert(_model(nodes, {"x": x}))
    y = judge(path).run({"x": x})["y"]
    assert operators(path)["CAST"] == 2
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, np.exp(np.maximum(x, 0)).transpose(0, 2, 1), rtol=1e-3)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_wrap_in_their_own_width(op: str, dtype: str, convert: Convert, judge: Judge) -> None:
    limits = np.iinfo(dtype)
    a = np.array([limits.max, limits.min, 7, limits.max], dtype)
    b = np.array([1, 1, 3, limits.max], dtype)
    path = convert(_model([helper.make_node(op, ["a", "b"], ["y"])], {"a": a, "b": b}))
    functions = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}
    seen = judge(path).run({"a": a, "b": b})["y"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(seen, functions[op](a, b))
    assert seen.dtype == a.dtype


def test_unsigned_integers_of_64_bits_keep_their_order(convert: Convert, judge: Judge) -> None:
    a = np.array([0, 1, 2**63, 2**64 - 1, 5], np.uint64)
    b = np.array([1, 2**63, 2**63 - 1, 2**63, 5], np.uint64)
    for op, function in {"Less": np.less, "Max": np.maximum, "Min": np.minimum, "Equal": np.equal}.items():
        path = convert(_model([helper.make_node(op, ["a", "b"], ["y"])], {"a": a, "b": b}))
        np.testing.assert_array_equal(judge(path).run({"a": a, "b": b})["y"], function(a, b))


def test_int8_choice_moves_integers(  # noqa: PLR0917 - fixtures
    model_of: Callable[..., onnx.ModelProto],
    quantize: Callable[..., onnx.ModelProto],
    convert: Convert,
    reference: Callable[..., dict[str, Array]],
    operators: Callable[[Path], Counter[str]],
    judge: Judge,
) -> None:
    rng = np.random.default_rng(3)
    node = helper.make_node("Where", ["c", "a", "b"], ["y"], name="node")
    constants = {"c": rng.integers(0, 2, (1, 8, 1, 10)).astype(np.bool_)}
    shape = (1, 8, 9, 10)
    model = quantize(model_of([node], {"a": shape, "b": shape}, ["y"], constants), dict.fromkeys("aby", (0.05, 3)), {})
    feeds = {name: (rng.integers(-100, 100, shape) * np.float32(0.05)).astype(np.float32) for name in "ab"}
    path = convert(model)
    assert operators(path) == {"QUANTIZE": 2, "SELECT_V2": 1, "DEQUANTIZE": 1}
    np.testing.assert_allclose(judge(path).run(feeds)["y"], reference(model, feeds)["y"], atol=1e-6)
