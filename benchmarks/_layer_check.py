"""Every layer of an int8 TFLite artifact against the QDQ model's, each fed what the artifact itself computed before
it.

Rounding differences of one step grow from layer to layer, so that outputs alone do not tell a wrong kernel from
honest rounding. Here the artifact's own integers are put back into the QDQ model behind every QuantizeLinear: each of
its layers then computes from exactly what the artifact's layer saw, and what is left is the difference of that layer
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FED = "__fed"
MOVERS = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that compute nothing. An artifact may hold their outputs in an order of its own (and its weights too)."""

ACTIVATIONS = ("Clip", "Relu")
NORMALIZATIONS = ("/scaled", "/shifted")
"""How `edgeship.calibration.writing.exact` names the last node of a LayerNormalization."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Boundary:
    """An activation between layers: `real` before QuantizeLinear, `seen` after DequantizeLinear, and who made it."""

    real: str
    seen: str
    scale: float
    zero_point: int
    operator: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer's output is from the reference's, in steps.

    `signed_steps`: the mean with its sign, which rounding that only falls differently leaves at 0. `off`: the share of
    elements that differ.
    """

    name: str
    operator: str
    elements: int = 0
    max_steps: float = 0.0
    mean_steps: float = 0.0
    signed_steps: float = 0.0
    off: float = 0.0

    def with_image(self, steps: Array) -> LayerDifference:
        """The same with one more image's differences."""
        count = self.elements + steps.size
        kept, new = self.elements / count, steps.size / count
        return replace(
            self,
            elements=count,
            max_steps=max(self.max_steps, float(np.abs(steps).max())),
            mean_steps=kept * self.mean_steps + new * float(np.abs(steps).mean()),
            signed_steps=kept * self.signed_steps + new * float(steps.mean()),
            off=kept * self.off + new * float((np.abs(steps) > 0.5).mean()),
        )


def layer_differences(
    qdq: Path, artifact: Path, images: Sequence[Array], folder: Path
) -> tuple[list[LayerDifference], int]:
    """Differences of all layers that can be found by name, worst first, and how many could not be found."""
    from edgeship.targets.base import load
    from edgeship.targets.tflite.flatfile import description, in_onnx_order
    from edgeship.targets.tflite.flatfile import load as load_file

    proto = onnx.shape_inference.infer_shapes(onnx.load(qdq))
    boundaries = _boundaries(proto.graph)
    probe = folder / (artifact.stem + ".probe.tflite")
    names = _expose(artifact, probe)
    try:
        session = load("tflite").open(probe)
    finally:
        probe.unlink()
    found = [b for b in boundaries if {b.real, b.seen} & names]
    whole, cut = _session(_cut(proto, found, fed=False)), _session(_cut(proto, found, fed=True))
    layouts: dict[str, tuple[int, ...]] = {}
    rows = {b.seen: LayerDifference(b.seen, b.operator) for b in found}
    described = description(load_file(artifact))
    for image in images:
        seen = in_onnx_order(described, session.run({"input": image}))
        if not layouts:
            reference = dict(
                zip([b.seen for b in found], whole.run([b.seen for b in found], {"input": image}), strict=True)
            )
            layouts = {b.seen: _layout(b, _integers(b, seen), reference[b.seen]) for b in found}
        feeds = {b.seen + FED: _real(b, np.transpose(_integers(b, seen), layouts[b.seen])) for b in found}
        own = {info.name for info in cut.get_inputs()}
        results = cut.run([b.seen for b in found], {k: v for k, v in {**feeds, "input": image}.items() if k in own})
        for boundary, result in zip(found, results, strict=True):
            steps = (feeds[boundary.seen + FED] - result) / boundary.scale
            rows[boundary.seen] = rows[boundary.seen].with_image(steps)
    return sorted(rows.values(), key=lambda row: -row.max_steps), len(boundaries) - len(found)


def _boundaries(graph: onnx.GraphProto) -> list[Boundary]:
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in itertools.chain(graph.value_info, graph.output, graph.input)
    }
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        quantize = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantize is None or quantize.op_type != "QuantizeLinear" or not _same(node, quantize, constants):
            continue
        real, seen = quantize.input[0], node.output[0]
        maker = makers.get(real)
        if maker is not None and maker.op_type not in MOVERS:  # without a maker it is the model's input, quantized
            scale, zero_point = constants[node.input[1]], constants[node.input[2]]
            found.append(Boundary(real, seen, float(scale), int(zero_point), _kind(maker, makers), shapes[seen]))
    return found


def _same(node: onnx.NodeProto, other: onnx.NodeProto, constants: dict[str, Array]) -> bool:
    """Whether both have one scale and zero point."""
    pairs = zip(node.input[1:], other.input[1:], strict=True)
    return all(a == b or np.array_equal(constants[a], constants[b]) for a, b in pairs)


def _kind(maker: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    """The operator, and in front of an activation the one that it is computed with."""
    if maker.op_type in ("Add", "Mul") and maker.name.endswith(NORMALIZATIONS):
        return "LayerNormalization"
    before = makers.get(maker.input[0])
    fused = maker.op_type in ACTIVATIONS and before is not None and before.op_type != "DequantizeLinear"
    return f"{before.op_type}+{maker.op_type}" if fused and before is not None else maker.op_type


def _expose(artifact: Path, probe: Path) -> set[str]:
    """Writes the artifact with every computed 8-bit tensor among its outputs; gives their names."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(artifact.read_bytes(), 0)
    graph = model.subgraphs[0]
    computed = [index for operator in graph.operators for index in operator.outputs]
    eight_bits = (schema.TensorType.INT8, schema.TensorType.UINT8)
    extra = [i for i in computed if graph.tensors[i].type in eight_bits and i not in graph.outputs]
    graph.outputs = [*graph.outputs, *extra]
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    probe.write_bytes(bytes(builder.Output()))
    return {graph.tensors[i].name.decode() for i in graph.outputs if graph.tensors[i].type in eight_bits}


def _cut(proto: onnx.ModelProto, found: Sequence[Boundary], *, fed: bool) -> bytes:
    """The QDQ model with all boundaries as outputs; with `fed`, what comes after a boundary reads an input instead."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    names = {boundary.seen for boundary in found}
    make = onnx.helper.make_tensor_value_info
    if fed:
        _feed_integers(model.graph, found)
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name in names:
                    node.input[index] = name + FED
        model.graph.input.extend(make(b.seen + FED, onnx.TensorProto.FLOAT, b.shape) for b in found)
    del model.graph.output[:]
    model.graph.output.extend(make(b.seen, onnx.TensorProto.FLOAT, b.shape) for b in found)
    return bytes(model.SerializeToString())


def _feed_integers(graph: onnx.GraphProto, found: Sequence[Boundary]) -> None:
    """Lets those that read a boundary's integers in another way read the integers of what is fed."""
    makers = {name: node for node in graph.node for name in node.output}
    quantizers = {makers[b.seen].input[0]: (b.seen, makers[makers[b.seen].input[0]]) for b in found}
    seen = {boundary.seen for boundary in found}
    added: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantizers and node.output[0] not in seen:
            name, quantize = quantizers[node.input[0]]
            added[name] = onnx.helper.make_node(
                "QuantizeLinear", [name, *quantize.input[1:]], [f"{quantize.output[0]}{FED}"], f"{name}{FED}"
            )
            node.input[0] = added[name].output[0]
    nodes = [*added.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # inputs that nothing reads are no news here
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _integers(boundary: Boundary, seen: dict[str, Array]) -> Array:
    return seen[boundary.real] if boundary.real in seen else seen[boundary.seen]


def _real(boundary: Boundary, integers: Array) -> Array:
    return ((integers.astype(np.int32) - boundary.zero_point) * np.float32(boundary.scale)).astype(np.float32)


def _layout(boundary: Boundary, integers: Array, reference: Array) -> tuple[int, ...]:
    """The permutation from the artifact's axes to the model's: of all that fit the shape, the one that is closest."""
    orders = itertools.permutations(range(integers.ndim))
    fitting = [order for order in orders if tuple(integers.shape[axis] for axis in order) == reference.shape]
    if not fitting:
        raise ValueError(f"{boundary.real}: the artifact has the shape {integers.shape}, the model {reference.shape}")
    return min(fitting, key=lambda c: float(np.abs(_real(boundary, np.transpose(integers, c)) - reference).mean()))
