"""Fixtures for calibration: graphs from ONNX's text form, rules like the real ones, ONNX Runtime as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.types import FixedOutput, OperatorRule, QuantPlan, QuantRules, TensorInfo

Array = np.ndarray[Any, np.dtype[Any]]
UNIT = FixedOutput(1 / 256, -128)


@dataclass(frozen=True)
class Shot:
    """A calibration sample."""

    name: str
    feeds: Mapping[str, Array]


class Runtime:
    """ONNX Runtime behind `Session`."""

    def __init__(self, model: bytes, weights: Mapping[str, Array] | None = None, *, optimise: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(each) for name, each in (weights or {}).items()}
        options.add_external_initializers(list(held), list(held.values()))
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        return [TensorInfo(v.name, tuple(v.shape), np.dtype("f4")) for v in self._session.get_inputs()]

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        return [TensorInfo(v.name, tuple(v.shape), np.dtype("f4")) for v in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._session.run(None, dict(feeds)), strict=True))


def _build(text: str, opset: int = 20, **weights: Array | Sequence[Any] | float) -> ir.Model:
    graph = onnx.parser.parse_graph(f"g {text}")
    for name, values in weights.items():
        array = np.asarray(values)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        graph.initializer.append(numpy_helper.from_array(array, name))
    for node in graph.node:
        node.name = node.name or f"{node.op_type}_{node.output[0]}"
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


@pytest.fixture(scope="session")
def build() -> Callable[..., ir.Model]:
    """Makes a model of a graph in ONNX text form; keyword arguments are its initializers. Nodes are OP_output."""
    return _build


@pytest.fixture(scope="session")
def open_float() -> type[Runtime]:
    """Opens a float model for calibration."""
    return Runtime


@pytest.fixture(scope="session")
def run_exactly() -> Callable[[ir.Model, Mapping[str, Array]], dict[str, Array]]:
    """Outputs of a model with graph optimisations off: the reference arithmetic."""
    return lambda model, feeds: Runtime(ir.to_proto(model).SerializeToString(), optimise=False).run(feeds)


@pytest.fixture(scope="session")
def rules() -> QuantRules:
    """Rules like those of the real targets together: no int8 Exp or Div; moved tensors share a scale."""
    computed = ("Add", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "MatMul", "Mul")
    plain = [OperatorRule(name) for name in computed]
    moved = ("AveragePool", "Concat", "Flatten", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Transpose")
    shared = [OperatorRule(name, shares_scale=True) for name in moved]
    fixed = [OperatorRule("Sigmoid", fixed_output=UNIT), OperatorRule("Softmax", fixed_output=UNIT)]
    fixed.append(OperatorRule("Tanh", fixed_output=FixedOutput(1 / 128, 0)))
    return QuantRules("both", {rule.op_type: rule for rule in [*plain, *shared, *fixed]})


def _samples(model: ir.Model, count: int = 4, seed: int = 0) -> list[Shot]:
    rng = np.random.default_rng(seed)
    shots = []
    for i in range(count):
        feeds = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            assert value.name is not None
            shape = [side if isinstance(side, int) else 1 for side in value.shape]
            feeds[value.name] = rng.normal(size=shape).astype(np.float32)
        shots.append(Shot(f"sample {i}", feeds))
    return shots


@pytest.fixture(scope="session")
def samples() -> Callable[..., list[Shot]]:
    """Seeded normal samples for a model: (model, count=4, seed=0)."""
    return _samples


@pytest.fixture(scope="session")
def quantized(rules: QuantRules) -> Callable[..., tuple[QuantPlan, ir.Model]]:
    """Plan and QDQ model of a float model after seeded samples; keyword arguments as for quantize_model."""

    def make(model: ir.Model, **options: Any) -> tuple[QuantPlan, ir.Model]:
        shots = options.pop("shots", None) or _samples(model)
        return quantize_model(model, shots, options.pop("rules", rules), Runtime, **options)

    return make
