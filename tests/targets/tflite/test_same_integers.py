"""A planned network gives the reference's very integers: no sum, product, mean or table lies on a rounding boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgeship.calibration.planning.plan import make_plan, tensors_to_observe
from edgeship.calibration.types import strictest
from edgeship.calibration.writing.exact import exact
from edgeship.calibration.writing.qdq import apply_plan
from edgeship.targets.base import ConvertOptions, load
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Reference = Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]]
node = helper.make_node
CHANNELS = 8
BLOCKS: dict[str, list[onnx.NodeProto]] = {
    "convolution": [node("Conv", ["h", "w"], ["y"], pads=[1, 1, 1, 1])],
    "depthwise": [node("Conv", ["h", "d"], ["y"], pads=[1, 1, 1, 1], group=CHANNELS)],
    "residual": [
        node("Conv", ["h", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Add", ["a", "h"], ["b"]),
        node("Relu", ["b"], ["r"]),
        node("Conv", ["r", "d"], ["c"], pads=[1, 1, 1, 1], group=CHANNELS),
        node("Add", ["r", "c"], ["y"]),
    ],
    "constant": [node("Mul", ["h", "k"], ["m"]), node("Add", ["m", "k"], ["s"]), node("Sub", ["s", "h"], ["y"])],
    "gate": [
        node("GlobalAveragePool", ["h"], ["g"]),
        node("Conv", ["g", "p"], ["q"]),
        node("Sigmoid", ["q"], ["s"]),
        node("Mul", ["h", "s"], ["y"]),
    ],
    "silu": [node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["m"]), node("Add", ["m", "h"], ["y"])],
    "square": [node("Mul", ["h", "h"], ["y"])],
    "tables": [node("Gelu", ["h"], ["g"]), node("Tanh", ["g"], ["t"]), node("Elu", ["t"], ["y"])],
    "hard swish": [node("HardSwish", ["h"], ["s"]), node("Conv", ["s", "p"], ["y"])],
    "average": [node("AveragePool", ["h"], ["y"], kernel_shape=[2, 2], strides=[2, 2])],
    "padded average": [
        node("AveragePool", ["h"], ["y"], kernel_shape=[4, 2], pads=[1, 0, 2, 1], count_include_pad=1),
    ],
    "mean": [node("ReduceMean", ["h", "axes"], ["y"], keepdims=1)],
    "attention": [
        node("Reshape", ["h", "flat"], ["f"]),
        node("Transpose", ["f"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["f", "t"], ["l"]),
        node("Reshape", ["l", "square"], ["y4"]),
        node("Conv", ["y4", "p"], ["y"]),
    ],
    "normalization": [node("LayerNormalization", ["h", "gain", "k12"], ["n"]), node("Conv", ["n", "p"], ["y"])],
    "normalization, in float": [node("LayerNormalization", ["h", "gain", "k12"], ["y"])],
    "normalization of planes": [node("LayerNormalization", ["h", "plane"], ["y"], axis=2, epsilon=0.1)],
    "unit vectors": [node("LpNormalization", ["h"], ["n"]), node("Conv", ["n", "p"], ["y"])],
}
"""Each between a convolution, whose scales are whatever they are, and the output `y`; `h` is (1, 8, 12, 12)."""


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_integer_is_the_references(
    kind: str, model_of: Callable[..., onnx.ModelProto], reference: Reference, tmp_path: Path
) -> None:
    """Five draws of weights, twelve images each: tens of thousands of results, of which one in some hundred thousand
    would differ by chance, and every fourth mean of four.
    """
    for seed in range(5):
        rng = np.random.default_rng(seed)
        constants = {
            "stem": rng.normal(size=(CHANNELS, 3, 3, 3)),
            "w": rng.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 6,
            "d": rng.normal(size=(CHANNELS, 1, 3, 3)),
            "p": rng.normal(size=(CHANNELS, CHANNELS, 1, 1)) / 2,
            "k": rng.normal(size=(1, CHANNELS, 1, 1)),
            "gain": rng.uniform(0.5, 2, size=12),
            "k12": rng.normal(size=12),
            "plane": rng.uniform(0.5, 2, size=(12, 12)),
            "axes": np.array([2, 3]),
            "flat": np.array([1, CHANNELS, -1]),
            "square": np.array([1, CHANNELS, CHANNELS, 1]),
        }
        stem = node("Conv", ["x", "stem"], ["h"], pads=[1, 1, 1, 1])
        used = {name for each in BLOCKS[kind] for name in each.input} | {"stem"}
        weights = {
            name: values.astype(np.float32) if values.dtype == np.float64 else values
            for name, values in constants.items()
            if name in used
        }
        model = model_of([stem, *BLOCKS[kind]], {"x": (1, 3, 12, 12)}, ["y"], weights)
        images = rng.normal(size=(12, 1, 3, 12, 12)).astype(np.float32)
        assert _differing(model, images, reference, tmp_path / f"{seed}.tflite") == 0


def _differing(model: onnx.ModelProto, images: Array, reference: Reference, path: Path) -> int:
    """Planned for both targets and run in LiteRT: how many outputs are another integer than the reference's, or, where
    the output is not quantized, another number.
    """
    graph, rules = ir.from_proto(model), strictest([TARGET.rules, load("onnxruntime").rules])
    names = tensors_to_observe(graph, rules)
    exposed = onnx.ModelProto.FromString(model.SerializeToString())
    own = {value.name for value in (*exposed.graph.input, *exposed.graph.output)}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    seen = [{**reference(exposed, {"x": image}), "x": image} for image in images]
    observers: Any = {name: _Seen([values[name] for values in seen]) for name in names}
    plan = make_plan(graph, rules, observers)
    qdq = exact(apply_plan(graph, plan))
    path.write_bytes(TARGET.convert(qdq, ConvertOptions()))
    session, step = TFLiteSession(path), float(plan.activations["y"].scale) if "y" in plan.activations else 0.0
    quantized = ir.to_proto(qdq)
    # Away from the boundaries of the input, which a model without known pixels cannot be kept clear of.
    grids = [plan.activations["x"].dequantize(plan.activations["x"].quantize(image)) for image in images]
    results = [(session.run({"x": grid})["y"], reference(quantized, {"x": grid})["y"]) for grid in grids]
    return sum(int((np.abs(got - want) > 0.5 * step).sum()) for got, want in results)


class _Seen:
    """The range of what was observed."""

    def __init__(self, values: list[Array]) -> None:
        self._values = np.concatenate([each.reshape(-1) for each in values])

    def range(self) -> tuple[float, float]:
        return min(0.0, float(self._values.min())), max(0.0, float(self._values.max()))
