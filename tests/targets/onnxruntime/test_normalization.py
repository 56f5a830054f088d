"""A normalization that the QDQ model computes from integers is ONNX Runtime's own operator in the artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.samples.data import Sample
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET, OnnxSession, open_float, open_reference


def test_the_artifact_has_the_operator_and_is_compared_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {"w": rng.normal(size=(64, 64)) / 8, "scale": rng.uniform(0.5, 2, 64), "shift": rng.normal(size=64)}
    graph = onnx.parser.parse_graph("""g (float[1, 50, 64] x) => (float[1, 50, 64] y) {
        h = MatMul(x, w)
        n = LayerNormalization(h, scale, shift)
        y = MatMul(n, w)
    }""")
    graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items())
    for node in graph.node:
        node.name = f"make_{node.output[0]}"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    samples = [Sample(str(i), {"x": rng.normal(size=(1, 50, 64)).astype(np.float32)}) for i in range(12)]
    plan, quantized = quantize_model(
        ir.from_proto(onnx.shape_inference.infer_shapes(model)), samples[:4], TARGET.rules, open_float
    )
    assert "LayerNormalization" not in {node.op_type for node in quantized.graph}
    path = tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(quantized, ConvertOptions()))
    assert [node.op_type for node in ir.load(path).graph].count("LayerNormalization") == 1
    reference, artifact = open_reference(to_bytes(TARGET.reference(quantized))), OnnxSession(path)
    step = float(plan.activations["y"].scale)
    steps = [np.abs(artifact.run(s.feeds)["y"] - reference.run(s.feeds)["y"]).max() / step for s in samples[4:]]
    assert max(steps) < 0.5
