"""What is known of coarse int8 kernels is what LiteRT computes, and plans avoid it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgeship.calibration.planning.plan import make_plan, tensors_to_observe
from edgeship.calibration.types import QuantParams, TensorSpec
from edgeship.calibration.writing.qdq import apply_plan
from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.kernel_tables import hard_swish_table, leaky_relu_table
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
EVERY = np.arange(-128, 128)


def params(scale: float, zero_point: int) -> QuantParams:
    """8-bit parameters."""
    return QuantParams(np.array(scale), np.array(zero_point), TensorSpec())


@pytest.mark.parametrize("op", ["HardSwish", "LeakyRelu"])
@pytest.mark.parametrize("seed", range(6))
def test_the_table_is_what_the_runtime_computes(
    op: str, seed: int, model_of: Callable[..., onnx.ModelProto], quantize: Any, convert: Any
) -> None:
    rng = np.random.default_rng(seed)
    scale = float(np.float32(rng.uniform(0.01, 0.1)))
    x = params(scale, int(rng.integers(-120, 120)))
    y = params(float(np.float32(scale * rng.uniform(0.4, 1.2))), int(rng.integers(-128, 100)))
    attributes = {"alpha": float(rng.choice([0.01, 0.1, 0.3]))} if op == "LeakyRelu" else {}
    model = model_of([helper.make_node(op, ["x"], ["y"], **attributes)], {"x": (1, 1, 16, 16)}, ["y"])
    ranges = {"x": (float(x.scale), int(x.zero_point)), "y": (float(y.scale), int(y.zero_point))}
    session = TFLiteSession(convert(quantize(model, ranges), integer_only=True))
    seen = session.run({"x": x.dequantize(EVERY).reshape(1, 1, 16, 16)})["y"].reshape(-1)
    table = hard_swish_table(x, y) if op == "HardSwish" else leaky_relu_table(x, y, attributes["alpha"])
    np.testing.assert_array_equal(y.quantize(seen), table)


def function(op: str, x: Array) -> Array:
    """The function itself."""
    return x * np.clip(x + 3, 0, 6) / 6 if op == "HardSwish" else np.where(x < 0, 0.1 * x, x)


class _Seen:
    """A range that was observed."""

    def __init__(self, low: float, high: float) -> None:
        self.bounds = low, high

    def range(self) -> tuple[float, float]:
        return self.bounds


@pytest.mark.parametrize("op", ["HardSwish", "LeakyRelu"])
def test_a_planned_layer_is_computed_as_the_reference_does(
    op: str,
    model_of: Callable[..., onnx.ModelProto],
    reference: Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]],
    tmp_path: Path,
) -> None:
    attributes = {"alpha": 0.1} if op == "LeakyRelu" else {}
    model = ir.from_proto(model_of([helper.make_node(op, ["x"], ["y"], **attributes)], {"x": (1, 1, 16, 16)}, ["y"]))
    table = hard_swish_table if op == "HardSwish" else partial(leaky_relu_table, alpha=0.1)
    wrong = otherwise = widest = 0
    for high in np.linspace(2, 9, 12):
        lowest = -0.375 if op == "HardSwish" else -0.1 * float(high)
        bounds = {"x": (-float(high), float(high)), "y": (lowest, float(high) * 0.83)}
        observers: Any = {name: _Seen(*bounds[name]) for name in tensors_to_observe(model, TARGET.rules)}
        plan = make_plan(model, TARGET.rules, observers)
        x, y = plan.activations["x"], plan.activations["y"]
        plain = params((bounds["y"][1] - bounds["y"][0]) / 255, int(y.zero_point))
        real = function(op, x.dequantize(EVERY))
        otherwise += int((table(x, plain) != plain.quantize(real)).sum())
        widest = max(widest, float(plan.activations["y"].scale) * 255 / (bounds["y"][1] - bounds["y"][0]))
        path, qdq = tmp_path / "model.tflite", apply_plan(model, plan)
        path.write_bytes(TARGET.convert(qdq, ConvertOptions()))
        feeds = {"x": plan.activations["x"].dequantize(EVERY).reshape(1, 1, 16, 16)}
        expected = reference(ir.to_proto(qdq), feeds)["y"]
        wrong += int((np.abs(TFLiteSession(path).run(feeds)["y"] - expected) > 0.5 * plan.activations["y"].scale).sum())
    assert wrong <= (0 if op == "HardSwish" else 24)  # of 3072 integers: LeakyRelu's ties
    assert otherwise >= 8 * max(wrong, 1)
    assert 1 < widest < 1.03
