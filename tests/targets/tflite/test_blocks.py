"""Blocks that today's networks are made of, and how many TRANSPOSE each may cost: none but what the block computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Block = tuple[list[onnx.NodeProto], dict[str, tuple[int, ...]], list[str], dict[str, Array]]
RNG = np.random.default_rng(5)


def weights(*shape: int) -> Array:
    return (RNG.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op, inputs.split(), outputs.split(), name=f"{op}_{outputs.split(maxsplit=1)[0]}", **attributes
    )


def squeeze_and_excite() -> Block:
    nodes = [
        node("Conv", "x w1", "a", pads=[1] * 4),
        node("GlobalAveragePool", "a", "b"),
        node("Conv", "b w2", "c"),
        node("Relu", "c", "d"),
        node("Conv", "d w3", "e"),
        node("HardSigmoid", "e", "f", alpha=1 / 6, beta=0.5),
        node("Mul", "a f", "y"),
    ]
    constants = {"w1": weights(8, 4, 3, 3), "w2": weights(2, 8, 1, 1), "w3": weights(8, 2, 1, 1)}
    return nodes, {"x": (1, 4, 6, 6)}, ["y"], constants


def squeeze_and_excite_by_vectors() -> Block:
    nodes = [
        node("Conv", "x w1", "a", pads=[1] * 4),
        node("ReduceMean", "a space", "b", keepdims=0),
        node("Gemm", "b w2", "c", transB=1),
        node("Sigmoid", "c", "d"),
        node("Reshape", "d image", "e"),
        node("Mul", "a e", "y"),
    ]
    constants = {"w1": weights(8, 4, 3, 3), "w2": weights(8, 8), "space": np.array([2, 3])}
    return nodes, {"x": (1, 4, 6, 6)}, ["y"], {**constants, "image": np.array([1, 8, 1, 1])}


def channel_shuffle() -> Block:
    nodes = [
        node("Conv", "x w1", "a"),
        node("Reshape", "a groups", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "c image", "d"),
        node("Split", "d", "e f", axis=1, num_outputs=2),
        node("Conv", "f w2", "g"),
        node("Concat", "e g", "y", axis=1),
    ]
    constants = {"w1": weights(8, 4, 1, 1), "w2": weights(4, 4, 1, 1)}
    shapes = {"groups": np.array([1, 2, 4, 6, 6]), "image": np.array([1, 8, 6, 6])}
    return nodes, {"x": (1, 4, 6, 6)}, ["y"], {**constants, **shapes}


def convnext() -> Block:
    nodes = [
        node("Conv", "x w1", "a", pads=[3] * 4, group=8),
        node("Transpose", "a", "b", perm=[0, 2, 3, 1]),
        node("LayerNormalization", "b gain shift", "c", axis=-1),
        node("MatMul", "c w2", "d"),
        node("Gelu", "d", "e"),
        node("MatMul", "e w3", "f"),
        node("Transpose", "f", "g", perm=[0, 3, 1, 2]),
        node("Mul", "g scale", "h"),
        node("Add", "h x", "y"),
    ]
    constants = {"w1": weights(8, 1, 7, 7), "w2": weights(8, 16), "w3": weights(16, 8), "scale": weights(8, 1, 1)}
    return nodes, {"x": (1, 8, 6, 6)}, ["y"], {**constants, "gain": weights(8), "shift": weights(8)}


def detection_head() -> Block:
    nodes = [
        node("Conv", "x w1", "a", pads=[1] * 4),
        node("Transpose", "a", "b", perm=[0, 2, 3, 1]),
        node("Reshape", "b scores", "c"),
        node("Softmax", "c", "y", axis=2),
        node("Conv", "x w2", "d", pads=[1] * 4),
        node("Transpose", "d", "e", perm=[0, 2, 3, 1]),
        node("Reshape", "e boxes", "z"),
    ]
    constants = {"w1": weights(6, 4, 3, 3), "w2": weights(8, 4, 3, 3)}
    shapes = {"scores": np.array([1, -1, 3]), "boxes": np.array([1, -1, 4])}
    return nodes, {"x": (1, 4, 6, 6)}, ["y", "z"], {**constants, **shapes}


def attention() -> Block:
    heads = [
        part
        for name in "qkv"
        for part in (
            node("MatMul", f"x w{name}", f"{name}1"),
            node("Reshape", f"{name}1 heads", f"{name}2"),
            node("Transpose", f"{name}2", name, perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        )
    ]
    nodes = [
        *heads,
        node("MatMul", "q k", "a"),
        node("Softmax", "a", "b", axis=-1),
        node("MatMul", "b v", "c"),
        node("Transpose", "c", "d", perm=[0, 2, 1, 3]),
        node("Reshape", "d joined", "e"),
        node("MatMul", "e wo", "y"),
    ]
    constants = {f"w{name}": weights(12, 12) for name in "qkvo"}
    return (
        nodes,
        {"x": (2, 5, 12)},
        ["y"],
        {**constants, "heads": np.array([2, 5, 3, 4]), "joined": np.array([2, 5, 12])},
    )


def patches() -> Block:
    nodes = [
        node("Conv", "x w1", "a", strides=[2, 2]),
        node("Reshape", "a sequence", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 1]),
        node("MatMul", "c w2", "y"),
    ]
    constants = {"w1": weights(8, 4, 2, 2), "w2": weights(8, 5), "sequence": np.array([1, 8, 9])}
    return nodes, {"x": (1, 4, 6, 6)}, ["y"], constants


@pytest.mark.parametrize(
    ("block", "most"),
    [
        (squeeze_and_excite, 0),
        (squeeze_and_excite_by_vectors, 0),
        (convnext, 0),
        (detection_head, 0),
        (patches, 0),
        (channel_shuffle, 1),
        (attention, 4),
    ],
)
def test_blocks_cost_no_transpose_that_they_do_not_compute(  # noqa: PLR0917 - a case and its fixtures
    block: Callable[[], Block],
    most: int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]],
) -> None:
    nodes, inputs, outputs, constants = block()
    model = model_of(nodes, inputs, outputs, constants)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] <= most
    feeds = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in inputs.items()}
    seen = TFLiteSession(path).run(feeds)
    for name, values in reference(model, feeds).items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-3, atol=1e-4)
