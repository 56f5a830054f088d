"""Random graphs of shapes, layouts, broadcasting and branches, whose TFLite form computes what ONNX Runtime does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_graphs import MAKERS, Gene, grown

from edgeship.calibration.errors import EdgeshipError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.writing.qdq import output_steps
from edgeship.targets.base import ConvertOptions, IoLayout
from edgeship.targets.onnxruntime import open_float, open_reference
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
SEEDS = st.integers(0, 2**32 - 1)
GENES = st.lists(st.tuples(st.sampled_from(sorted(MAKERS)), SEEDS), min_size=1, max_size=9)


def expected(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime computes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("io_layout", [None, "nchw"])
@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, genes=GENES)
def test_random_graphs_compute_what_onnx_runtime_does(seed: int, genes: list[Gene], io_layout: IoLayout | None) -> None:
    model = grown(seed, genes)
    rng = np.random.default_rng(seed)
    feeds = {
        value.name: rng.normal(size=[d.dim_value for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(TARGET.convert(ir.from_proto(model), ConvertOptions(io_layout=io_layout)))
        seen = TFLiteSession(path).run(feeds)
    for name, values in expected(model, feeds).items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


@dataclass(frozen=True)
class Sample:
    """What the quantizer sees of the inputs."""

    name: str
    feeds: dict[str, Array]


def quantized(model: onnx.ModelProto) -> ir.Model:
    """The QDQ form of a float model, calibrated on noise; the example is left when nothing in it can be int8."""
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    samples = [
        Sample(str(i), {n: np.random.default_rng(i).normal(size=s).astype(np.float32) for n, s in shapes.items()})
        for i in range(3)
    ]
    try:
        _, qdq = quantize_model(ir.from_proto(model), samples, TARGET.rules, open_float, refinements=())
    except EdgeshipError:
        reject()
    return qdq


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=SEEDS, genes=st.lists(st.tuples(st.sampled_from(sorted(MAKERS)), SEEDS), min_size=1, max_size=3))
def test_random_int8_graphs_are_within_four_steps_of_their_reference(seed: int, genes: list[Gene]) -> None:
    qdq = quantized(grown(seed, genes))
    steps = output_steps(qdq)
    rng = np.random.default_rng(seed)
    feeds = {v.name: rng.normal(size=tuple(v.shape)).astype(np.float32) for v in qdq.graph.inputs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(TARGET.convert(qdq, ConvertOptions()))
        seen = TFLiteSession(path).run(feeds)
    for name, values in open_reference(to_bytes(qdq)).run(feeds).items():
        # An output behind a float operator has no step of its own: a twentieth of its span stands for it.
        most = 4 * steps[name] if steps[name] else 0.05 * max(1e-3, float(np.abs(values).max(initial=0.0)))
        assert np.abs(seen[name] - values).max(initial=0.0) <= most * 1.001, name
