"""Fixtures of the TFLite tests: small graphs, their conversion, and the runtimes that judge it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.flatfile import load, operator_names
from edgeship.targets.tflite.session import Kernels, TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Convert = Callable[..., Path]


def make_model(  # noqa: PLR0917 - a model's parts
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = 20,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A float model with inferred shapes."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture
def model_of() -> Callable[..., onnx.ModelProto]:
    """Builds a model: nodes, inputs, outputs, constants, opset."""
    return make_model


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Converts a model proto with the options given by name; returns the file."""

    def run(model: onnx.ModelProto, **options: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tflite"
        path.write_bytes(TARGET.convert(ir.from_proto(model), ConvertOptions(**options)))
        return path

    return run


@pytest.fixture
def operators() -> Callable[[Path], Counter[str]]:
    """Counts the operators of a TFLite file by name."""

    def count(path: Path) -> Counter[str]:
        model = load(path)
        names = operator_names(model)
        return Counter(names[operator.opcodeIndex] for operator in model.subgraphs[0].operators or [])

    return count


@pytest.fixture
def reference() -> Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]]:
    """Runs a model in ONNX Runtime with graph optimisations off."""

    def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))

    return run


JUDGES: dict[str, tuple[str, Kernels]] = {
    "xnnpack": ("ai-edge-litert", "default"),
    "builtin": ("ai-edge-litert", "builtin"),
    "reference": ("ai-edge-litert", "reference"),
    "tensorflow": ("tensorflow", "reference"),
}


@pytest.fixture(params=sorted(JUDGES))
def judge(request: pytest.FixtureRequest) -> Callable[[Path], TFLiteSession]:
    """Opens a TFLite file with each set of kernels in turn; TensorFlow's interpreter is the independent one."""
    engine, kernels = JUDGES[request.param]
    if engine == "tensorflow" and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("the independent judge needs the extra: pip install 'edgeship[tensorflow]'")
    return lambda path: TFLiteSession(path, kernels=kernels, engine=engine)


def quantized(
    model: onnx.ModelProto,
    ranges: Mapping[str, tuple[float, int]],
    weights: Mapping[str, int | None] | None = None,
    activations: type[np.int8 | np.int16] = np.int8,
) -> onnx.ModelProto:
    """The QDQ form of a float model: computed values by (scale, zero point), constants in `weights` per channel axis.

    A constant's axis None means one scale. Constants named `bias` become int32 at scale x * weight.
    """
    qdq = onnx.ModelProto()
    qdq.CopyFrom(model)
    graph = qdq.graph
    before, after = [], []
    constants = {t.name: t for t in graph.initializer}
    renamed: dict[str, str] = {}
    scales: dict[str, Array] = {}
    for name, axis in (weights or {}).items():
        values = numpy_helper.to_array(constants[name])
        scales[name], integers = _symmetric(values, axis)
        _store(graph, constants[name], integers, scales[name], np.zeros(scales[name].shape, np.int8), axis, before)
        renamed[name] = f"{name}_dq"
    if "bias" in constants and weights:
        x = ranges[graph.input[0].name][0]
        step = np.float32(x) * scales[next(iter(weights))]
        integers = np.rint(numpy_helper.to_array(constants["bias"]) / step).astype(np.int32)
        _store(graph, constants["bias"], integers, step, np.zeros(step.shape, np.int32), 0, before)
        renamed["bias"] = "bias_dq"
    for name, (scale, zero) in ranges.items():
        graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
        graph.initializer.append(numpy_helper.from_array(np.array(zero, activations), f"{name}_zero"))
        parameters = [f"{name}_scale", f"{name}_zero"]
        is_output = any(output.name == name for output in graph.output)
        made, read = (f"{name}_real", name) if is_output else (name, f"{name}_dq")
        pair = [
            helper.make_node("QuantizeLinear", [made, *parameters], [f"{name}_q"], name=f"{name}_Q"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [read], name=f"{name}_DQ"),
        ]
        produced = any(name in node.output for node in graph.node)
        (after if produced else before).extend(pair)
        renamed[name] = read
        if is_output:
            for node in graph.node:
                node.output[:] = [made if output == name else output for output in node.output]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    nodes = _sorted([*before, *graph.node, *after], {i.name for i in graph.input} | {t.name for t in graph.initializer})
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(qdq)


def _symmetric(values: Array, axis: int | None) -> tuple[Array, Array]:
    others = tuple(a for a in range(values.ndim) if a != axis)
    largest = np.abs(values).max() if axis is None else np.abs(values).max(axis=others)
    scale = np.asarray(largest / 127, np.float32)
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    return scale, np.clip(np.rint(values / scale.reshape(shape if axis is not None else ())), -127, 127).astype(np.int8)


def _store(  # noqa: PLR0917 - a constant's parts
    graph: onnx.GraphProto,
    tensor: onnx.TensorProto,
    integers: Array,
    scale: Array,
    zero: Array,
    axis: int | None,
    nodes: list[onnx.NodeProto],
) -> None:
    name = tensor.name
    graph.initializer.remove(tensor)
    for suffix, values in (("", integers), ("_scale", scale), ("_zero", zero)):
        graph.initializer.append(numpy_helper.from_array(values, f"{name}{suffix}"))
    attributes = {"axis": axis} if axis is not None and scale.ndim else {}
    inputs = [name, f"{name}_scale", f"{name}_zero"]
    nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}_DQ", **attributes))


def _sorted(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    done: list[onnx.NodeProto] = []
    while nodes:
        ready = [node for node in nodes if all(not name or name in known for name in node.input)]
        if not ready:
            raise AssertionError(f"no order for {[node.name for node in nodes]}")
        done += ready
        known |= {output for node in ready for output in node.output}
        nodes = [node for node in nodes if node not in ready]
    return done


@pytest.fixture
def quantize() -> Callable[..., onnx.ModelProto]:
    """Makes a float model QDQ: model, {value: (scale, zero point)}, {constant: channel axis}."""
    return quantized
