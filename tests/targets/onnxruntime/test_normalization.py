"""A normalization that the QDQ model computes from integers is ONNX Runtime's own operator in the artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from normalized import normalized

from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.samples.data import Sample
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime import TARGET, OnnxSession, open_float, open_reference


def test_the_artifact_has_the_operator_and_is_compared_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    model = normalized(rng, 50, 64)
    samples = [Sample(str(i), {"x": rng.normal(size=(1, 50, 64)).astype(np.float32)}) for i in range(12)]
    plan, quantized = quantize_model(model, samples[:4], TARGET.rules, open_float)
    assert "LayerNormalization" not in {node.op_type for node in quantized.graph}
    path = tmp_path / "model.onnx"
    path.write_bytes(TARGET.convert(quantized, ConvertOptions()))
    assert [node.op_type for node in ir.load(path).graph].count("LayerNormalization") == 1
    reference, artifact = open_reference(to_bytes(TARGET.reference(quantized))), OnnxSession(path)
    step = float(plan.activations["y"].scale)
    steps = [np.abs(artifact.run(s.feeds)["y"] - reference.run(s.feeds)["y"]).max() / step for s in samples[4:]]
    assert max(steps) < 0.5
