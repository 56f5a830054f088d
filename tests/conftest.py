"""Shared fixtures: tiny models with seeded weights, data for them, and the folder of real models and images."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in parallel workers; their threads would fight
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
# no property of ours is about time, and a busy machine makes any example slow
settings.register_profile("edgeship", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgeship")

Nodes = list[onnx.NodeProto]
Array = np.ndarray[Any, np.dtype[Any]]


class _Graph:
    """Collects the nodes and weights of a model with input `image` (1, 3, 12, 12) and output `logits` (1, 5)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: Nodes = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Array) -> str:
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{name}", **attributes))
        return name

    def conv(
        self, name: str, x: str, inputs: int, outputs: int, *, kernel: int = 3, group: int = 1, **more: Any
    ) -> str:
        """A convolution of the same height and width, whose channels have different ranges, as trained ones do."""
        fan_in = inputs // group * kernel * kernel
        spread = self.rng.uniform(0.3, 2.0, (outputs, 1, 1, 1)) / np.sqrt(fan_in)
        weight = self.rng.normal(size=(outputs, inputs // group, kernel, kernel)) * spread
        self.constant(f"{name}_weight", weight)
        self.constant(f"{name}_bias", self.rng.normal(size=outputs) * 0.1)
        return self.node(
            "Conv",
            name,
            [x, f"{name}_weight", f"{name}_bias"],
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            group=group,
            **more,
        )

    def relu(self, x: str) -> str:
        return self.node("Relu", f"{x}_relu", [x])

    def classifier(self, x: str, channels: int) -> onnx.ModelProto:
        pooled = self.node("GlobalAveragePool", "pooled", [x])
        flat = self.node("Flatten", "flat", [pooled], axis=1)
        self.constant("fc_weight", self.rng.normal(size=(5, channels)) / np.sqrt(channels))
        self.constant("fc_bias", self.rng.normal(size=5) * 0.1)
        self.node("Gemm", "logits", [flat, "fc_weight", "fc_bias"], transB=1)
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 12, 12])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _plain() -> onnx.ModelProto:
    graph = _Graph(1)
    first = graph.relu(graph.conv("first", "image", 3, 8))
    pooled = graph.node("MaxPool", "smaller", [first], kernel_shape=[2, 2], strides=[2, 2])
    return graph.classifier(graph.relu(graph.conv("second", pooled, 8, 16)), 16)


def _residual() -> onnx.ModelProto:
    graph = _Graph(2)
    stem = graph.relu(graph.conv("stem", "image", 3, 8))
    inner = graph.conv("inner_2", graph.relu(graph.conv("inner_1", stem, 8, 8)), 8, 8)
    return graph.classifier(graph.relu(graph.node("Add", "sum", [stem, inner])), 8)


def _depthwise() -> onnx.ModelProto:
    graph = _Graph(3)
    stem = graph.conv("stem", "image", 3, 8, strides=[2, 2])
    graph.constant("zero", np.array(0.0))
    graph.constant("six", np.array(6.0))
    clipped = graph.node("Clip", "stem_clip", [stem, "zero", "six"])
    depthwise = graph.relu(graph.conv("depthwise", clipped, 8, 8, group=8))
    return graph.classifier(graph.relu(graph.conv("pointwise", depthwise, 8, 16, kernel=1)), 16)


def _concat() -> onnx.ModelProto:
    graph = _Graph(4)
    stem = graph.relu(graph.conv("stem", "image", 3, 8))
    left = graph.relu(graph.conv("left", stem, 8, 4, kernel=1))
    right = graph.relu(graph.conv("right", stem, 8, 8))
    return graph.classifier(graph.node("Concat", "joined", [left, right], axis=1), 12)


_BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": _plain,
    "residual": _residual,
    "depthwise": _depthwise,
    "concat": _concat,
}


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, bytes]:
    """The serialized float models by name: plain, residual, depthwise, concat; (1, 3, 12, 12) -> (1, 5), opset 20."""
    return {name: build().SerializeToString() for name, build in _BUILDERS.items()}


@pytest.fixture(params=sorted(_BUILDERS))
def tiny_model(request: pytest.FixtureRequest, tiny_models: dict[str, bytes]) -> ir.Model:
    """Each of the tiny models in turn, a fresh copy that the test may change."""
    return ir.serde.deserialize_model(onnx.load_from_string(tiny_models[request.param]))


@pytest.fixture(scope="session")
def tiny_images() -> Array:
    """32 images (n, 3, 12, 12) float32 for the tiny models: smooth, with a few strong values."""
    rng = np.random.default_rng(5)
    images = rng.normal(size=(32, 3, 12, 12))
    images[:, :, 1:] = 0.5 * images[:, :, 1:] + 0.5 * images[:, :, :-1]
    return images.astype(np.float32)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_images: Array) -> Path:
    """An .npz of `tiny_images` under "image" with classes under "label"."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, image=tiny_images, label=np.arange(len(tiny_images)) % 5)
    return path


@pytest.fixture(scope="session")
def edgeship_data() -> Path:
    """The folder of real models and images; tests that need it are skipped without it, and fail when it is wrong."""
    if "EDGESHIP_DATA" not in os.environ:
        pytest.skip("needs real models and images: set EDGESHIP_DATA to their folder")
    path = Path(os.environ["EDGESHIP_DATA"]).resolve()
    if not path.is_dir():
        pytest.fail(f"EDGESHIP_DATA is {path}, which is not a folder")
    return path
