"""Writes the golden files beside it: a QDQ model, and what every target makes of it.

    python tests/golden/make.py            (made on 2026-11-24 with the versions of constraints.txt)

The digests change when a converter writes other bytes for the same model. Run it again only when that is meant, and say
why in the commit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

HERE = Path(__file__).parent
MODEL = HERE / "residual.qdq.onnx"
DIGESTS = HERE / "artifacts.json"
TARGETS = ("onnxruntime", "tflite")
CASES = {
    "float32": {},
    "int8": {"io_dtype": "int8"},
    "nchw": {"io_layout": "nchw"},
}


def digests() -> dict[str, str]:
    """SHA-256 of every artifact by "target/case"."""
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.targets.base import ConvertOptions, load

    model = load_onnx(MODEL)
    metadata = {"edgeship.note": "golden"}
    return {
        f"{target}/{case}": hashlib.sha256(
            load(target).convert(model, ConvertOptions(metadata=metadata, **options))  # type: ignore[arg-type]  # a table
        ).hexdigest()
        for target in TARGETS
        for case, options in CASES.items()
    }


def make() -> None:
    """Writes both files."""
    import numpy as np

    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.calibration.quantize import quantize_model
    from edgeship.calibration.samples.data import Sample
    from edgeship.calibration.types import strictest
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_float

    rng = np.random.default_rng(0)
    source = _residual(rng)
    samples = [Sample(str(i), {"image": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)}, None) for i in range(8)]
    rules = strictest([load(name).rules for name in TARGETS])
    _, qdq = quantize_model(source, samples, rules, open_float)
    MODEL.write_bytes(to_bytes(qdq))
    DIGESTS.write_text(json.dumps(digests(), indent=2, sort_keys=True) + "\n")


def _residual(rng: np.random.Generator) -> ir.Model:
    """A small network with a strided convolution, a residual sum, pooling and a classifier."""
    import numpy as np
    import onnx_ir as ir

    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        net (float[1,3,12,12] image) => (float[1,5] logits) {
            stem = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (image, w1, b1)
            stem_relu = Relu (stem)
            inner = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (stem_relu, w2, b2)
            sum = Add (inner, stem_relu)
            sum_relu = Relu (sum)
            pooled = GlobalAveragePool (sum_relu)
            flat = Reshape (pooled, shape)
            logits = Gemm <transB = 1> (flat, w3, b3)
        }"""
    )
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (5, 8), "b3": (5,)}
    constants = {name: (rng.normal(size=shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}
    constants["shape"] = np.array([1, 8])
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name in constants:
                value.const_value = ir.tensor(constants[value.name], name=value.name)
                value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
                model.graph.register_initializer(value)
    from onnx_ir.passes.common import ShapeInferencePass

    return ShapeInferencePass()(model).model


if __name__ == "__main__":
    make()
