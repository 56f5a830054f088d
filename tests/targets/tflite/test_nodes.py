"""Every operator entry against the vectors that come with the ONNX standard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeship.calibration.errors import UnsupportedError
from edgeship.targets.tflite.ops import REGISTRY
from edgeship.targets.tflite.session import TFLiteSession

ALL_COMPUTED = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Concat", "MatMul", "PRelu"})
"""Operators whose every input is data; the others get all but the first as constants, as models have them."""

REFUSED = {
    **dict.fromkeys(("cast*FLOAT8*", "cast*FLOAT4*", "cast*INT4*", "cast*INT2*"), "types that TFLite does not store"),
    "cast*BFLOAT16*": "a type that NumPy has not",
    "cast*STRING*": "strings",
    "equal_string*": "strings",
    "*bfloat16*": "a type that NumPy has not",
    "training_dropout*": "training",
    "*linear_e*m*": "float8 quantization",
    "*linear_*int4": "4-bit quantization",
    "*linear_*int2": "2-bit quantization",
    "*linear_float4*": "float4 quantization",
    "loop11": "the values of passes whose number is an input",
    "range_float16_*_expanded": "the values of passes whose number is an input",
    "reduce_l2_*_expanded": "a shape that depends on axes computed at run time",
}

CONVERTED = {"training_dropout_zero_ratio", "training_dropout_zero_ratio_mask"}
"""Cases that a pattern above names by accident."""

AS_ONNX_RUNTIME = {"resize_downsample_scales_linear_align_corners", "resize_downsample_scales_cubic_align_corners"}
"""The standard's reference spreads corners over a length that is not rounded; PyTorch and ONNX Runtime round it."""


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in cases:
        domains = {opset.domain for opset in case.model.opset_import}
        if domains <= {"", "ai.onnx"} and {node.op_type for node in case.model.graph.node} <= set(REGISTRY):
            yield pytest.param(case, id=case.name.removeprefix("test_"))


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


@pytest.mark.parametrize("case", list(_cases()))
def test_operator_computes_what_onnx_says_or_refuses_for_a_known_reason(
    case: Any, convert: Callable[..., Path], reference: Callable[..., dict[str, Any]]
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    given, wanted = case.data_sets[0]
    if any(not isinstance(value, np.ndarray | np.generic | onnx.TensorProto) for value in (*given, *wanted)):
        pytest.skip("the case holds sequences or optional values, which TFLite has not")
    feeds = {}
    for place, (value, data) in enumerate(zip(list(model.graph.input), given, strict=True)):
        if place == 0 or model.graph.node[0].op_type in ALL_COMPUTED:
            feeds[value.name] = _array(data)
        else:
            model.graph.initializer.append(numpy_helper.from_array(_array(data), value.name))
            model.graph.input.remove(value)
    name = case.name.removeprefix("test_")
    reasons = [reason for pattern, reason in REFUSED.items() if fnmatch(name, pattern)]
    if reasons and name not in CONVERTED:
        with pytest.raises(UnsupportedError):
            convert(model)
        return
    path = convert(model)
    outputs = TFLiteSession(path).run(feeds)
    if name in AS_ONNX_RUNTIME:
        wanted = [reference(model, feeds)[value.name] for value in model.graph.output]
    for value, data in zip(model.graph.output, wanted, strict=True):
        expected = _array(data)
        assert outputs[value.name].shape == expected.shape
        assert outputs[value.name].dtype == expected.dtype
        np.testing.assert_allclose(outputs[value.name], expected, rtol=1e-3, atol=1e-4)
