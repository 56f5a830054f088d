"""Every torch operator against the vectors that come with the ONNX standard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from edgeship.calibration.errors import UnsupportedError
from edgeship.calibration.learned.graph import TorchGraph
from edgeship.calibration.learned.operators import OPERATORS

COMPUTED = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Concat", "MatMul", "PRelu"})
"""Operators whose every input is data; the others get all but the first as constants, as models have them."""

REFUSED = {
    "maxpool_with_argmax*": "the positions of maxima",
    "resize_tf_crop_and_resize*": "values from outside the image",
    "resize_*not_larger": "an output size that depends on the aspect ratio",
    "resize_*not_smaller": "an output size that depends on the aspect ratio",
    "batchnorm_*training_mode*": "training mode",
}
ELSEWHERE = ("*float8*", "*FLOAT8*", "*FLOAT4*", "*float4*", "*INT4*", "*int4*", "*int2*", "*INT2*", "*bfloat16*")
ELSEWHERE += ("*BFLOAT16*", "*STRING*", "*string*", "*linear_e*m*", "*uint32*", "*uint64*", "*blocked*", "*expanded*")
ELSEWHERE += ("training_dropout*", "*uint16", "maxpool_2d_uint8", "reduce_*empty_set*")
"""Types that no vision model computes with, training, nothing to reduce, and operators spelt out as functions."""
BY_RUNTIME = ("resize_downsample_scales_*_align_corners",)
"""The vectors divide by a size that is no integer; ONNX Runtime, which ships, divides by the real one."""


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in cases:
        name = case.name.removeprefix("test_")
        domains = {opset.domain for opset in case.model.opset_import}
        known = {node.op_type for node in case.model.graph.node} <= {*OPERATORS, "Constant"}
        if domains <= {"", "ai.onnx"} and known and not any(fnmatch(name, pattern) for pattern in ELSEWHERE):
            yield pytest.param(case, id=name)


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


@pytest.mark.parametrize("case", list(_cases()))
def test_operator_computes_what_onnx_says(case: Any) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    given, wanted = case.data_sets[0]
    feeds = {}
    for place, (value, data) in enumerate(zip(list(model.graph.input), given, strict=True)):
        if place == 0 or model.graph.node[0].op_type in COMPUTED:
            feeds[value.name] = torch.from_numpy(np.array(_array(data)))
        else:
            model.graph.initializer.append(numpy_helper.from_array(_array(data), value.name))
            model.graph.input.remove(value)
    name = case.name.removeprefix("test_")
    if any(fnmatch(name, pattern) for pattern in REFUSED):
        with pytest.raises(UnsupportedError, match="accepted"):
            TorchGraph(ir.from_proto(model))(feeds)
        return
    outputs = TorchGraph(ir.from_proto(model))(feeds)
    if any(fnmatch(name, pattern) for pattern in BY_RUNTIME):
        model.ir_version = 10
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        wanted = session.run(None, {key: value.numpy() for key, value in feeds.items()})
    for value, data in zip(model.graph.output, wanted, strict=True):
        expected = _array(data)
        result = outputs[value.name].numpy()
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
