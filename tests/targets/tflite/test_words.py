"""Integers of 64 bits, which TFLite divides, shifts and raises in no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeship.calibration.errors import UnsupportedError
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Convert = Callable[..., Path]
Judge = Callable[[Path], TFLiteSession]
COUNT = 400


def node_model(op: str, a: Array, b: Array, *, constants: tuple[str, ...] = (), **attributes: Any) -> onnx.ModelProto:
    """A model of one operator on two tensors."""
    given = {"a": a, "b": b}
    types = {name: helper.np_dtype_to_tensor_dtype(values.dtype) for name, values in given.items()}
    ports = [
        helper.make_tensor_value_info(name, types[name], given[name].shape) for name in given if name not in constants
    ]
    result = helper.make_tensor_value_info("y", types["a"], np.broadcast_shapes(a.shape, b.shape))
    stored = [numpy_helper.from_array(given[name], name) for name in constants]
    node = helper.make_node(op, ["a", "b"], ["y"], "node", **attributes)
    graph = helper.make_graph([node], "test", ports, [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def integers(dtype: str, seed: int) -> Array:
    """Numbers of every length, the extreme ones first, without 0."""
    limits, rng = np.iinfo(dtype), np.random.default_rng(seed)
    lengths = rng.integers(1, limits.bits, COUNT)
    values = [int(rng.integers(0, 1 << 62)) >> max(62 - int(n), 0) | 1 for n in lengths]
    values[:4] = [limits.max, limits.max - 1, 1, 3]
    if limits.min < 0:
        values = [-v if i % 2 and v != limits.max else v for i, v in enumerate(values)]
        values[4] = limits.min
    else:
        values[4:40] = [limits.max - v for v in values[4:40]]
    return np.array(rng.permutation(np.array(values, dtype)))


def toward_zero(a: Array, b: Array) -> Array:
    """The quotients as the standard has them."""
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    found = [abs(x) // abs(y) * (-1 if (x < 0) != (y < 0) else 1) for x, y in pairs]
    limits = np.iinfo(a.dtype)
    return np.array([q if q <= limits.max else q - (1 << limits.bits) for q in found], a.dtype)


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
def test_wide_integers_are_divided_exactly(dtype: str, convert: Convert, judge: Judge) -> None:
    a, b = integers(dtype, 1), integers(dtype, 2)
    path = convert(node_model("Div", a, b))
    np.testing.assert_array_equal(judge(path).run({"a": a, "b": b})["y"], toward_zero(a, b))


def test_numbers_without_a_sign_leave_exact_remainders(convert: Convert, judge: Judge) -> None:
    a, b = integers("uint64", 1), integers("uint64", 2)
    for fmod in (0, 1):
        path = convert(node_model("Mod", a, b, fmod=fmod))
        np.testing.assert_array_equal(judge(path).run({"a": a, "b": b})["y"], np.mod(a, b))


def test_64_bits_without_a_sign_are_shifted_to_the_right(convert: Convert, judge: Judge) -> None:
    a = integers("uint64", 3)
    shift = (np.arange(COUNT) % 66).astype(np.uint64)
    path = convert(node_model("BitShift", a, shift, direction="RIGHT"))
    expected = [x >> n for x, n in zip(a.tolist(), shift.tolist(), strict=True)]
    np.testing.assert_array_equal(judge(path).run({"a": a, "b": shift})["y"], np.array(expected, np.uint64))


@pytest.mark.parametrize("constants", [(), ("b",)])
def test_powers_of_64_bits_wrap(constants: tuple[str, ...], convert: Convert, judge: Judge) -> None:
    a = integers("int64", 5)
    exponent = np.random.default_rng(6).integers(0, 90, COUNT)
    exponent[:3] = 0, 1, 2
    path = convert(node_model("Pow", a, exponent, constants=constants))
    expected = [pow(x, n, 1 << 64) for x, n in zip(a.tolist(), exponent.tolist(), strict=True)]
    feeds = {name: values for name, values in {"a": a, "b": exponent}.items() if name not in constants}
    np.testing.assert_array_equal(judge(path).run(feeds)["y"], np.array(expected, np.uint64).astype(np.int64))


def test_a_real_base_takes_exponents_without_a_sign(convert: Convert, judge: Judge) -> None:
    a = np.array([1.0, 1.5, 0.5, 2.0], np.float32)
    exponent = np.array([2**64 - 1, 4, 2**63, 10], np.uint64)
    seen = judge(convert(node_model("Pow", a, exponent))).run({"a": a, "b": exponent})["y"]
    np.testing.assert_allclose(seen, [1.0, 5.0625, 0.0, 1024.0], rtol=1e-5)


def test_what_no_integer_is_raised_to_is_named(convert: Convert) -> None:
    base = np.array([3, 4], np.int64)
    with pytest.raises(UnsupportedError, match="it raises int64 to -1; accepted: no negative exponent"):
        convert(node_model("Pow", base, np.array([2, -1], np.int64), constants=("b",)))
    with pytest.raises(UnsupportedError, match="it raises int64 to uint64; accepted: up to 63 bits"):
        convert(node_model("Pow", base, np.array([2, 1], np.uint64)))
