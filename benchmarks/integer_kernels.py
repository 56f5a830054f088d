"""Time of TFLite's int8 kernels against the same operator in real numbers between DEQUANTIZE and QUANTIZE.

    python benchmarks/integer_kernels.py [--size 56] [--runs 200]

One operator on int8 tensors of 1 x SIZE x SIZE x 64, converted with and without `integer_only`, the two files in turns
in processes of their own, one thread. The converter takes the second form ("in reals" in docs/operators.md) where that
takes a fraction of the time; where the times are equal, the operator has one form.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.devices.worker import Subject
from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET

CASES = {
    "HardSwish": ("HardSwish", {}, (0.02, -110)),
    "Softmax": ("Softmax", {"axis": 1}, (1 / 256, -128)),
    "Abs": ("Abs", {}, (0.03, -128)),
    "Relu, one scale": ("Relu", {}, (0.03, -20)),
    "Relu, two scales": ("Relu", {}, (0.015, -128)),
    "Gelu": ("Gelu", {}, (0.02, -110)),
    "LeakyRelu": ("LeakyRelu", {"alpha": 0.1}, (0.02, -110)),
    "Sigmoid": ("Sigmoid", {}, (1 / 256, -128)),
    "Tanh": ("Tanh", {}, (1 / 128, 0)),
    "Elu": ("Elu", {}, (0.02, -110)),
}
"""Operator, attributes, scale and zero point of the result; those of the input are 0.03 and -20."""


def model(operator: str, attributes: dict[str, float], result: tuple[float, int], size: int) -> onnx.ModelProto:
    """The operator between tensors of 8 bits."""
    shape = [1, 64, size, size]
    constants = [
        numpy_helper.from_array(np.array(value, kind), name)
        for stem, (scale, zero) in {"x": (0.03, -20), "y": result}.items()
        for name, value, kind in ((f"{stem}_scale", scale, np.float32), (f"{stem}_zero", zero, np.int8))
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node(operator, ["xd"], ["yf"], **attributes),
        helper.make_node("QuantizeLinear", ["yf", "y_scale", "y_zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "y_scale", "y_zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    print(f"{'operator':18} {'int8 kernel, us':>16} {'as converted, us':>17} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (operator, attributes, result) in CASES.items():
            files = []
            for only in (True, False):
                loaded = ir.from_proto(model(operator, attributes, result, options.size))
                files.append(Path(folder) / f"{only}.tflite")
                files[-1].write_bytes(TARGET.convert(loaded, ConvertOptions(io_dtype="int8", integer_only=only)))
            subjects = [Subject("tflite", path) for path in files]
            integer, chosen = (1000 * each.median_ms for each in measure(subjects, None, Schedule(options.runs, 20, 5)))
            print(f"{name:18} {integer:16.0f} {chosen:17.0f} {integer / chosen:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
