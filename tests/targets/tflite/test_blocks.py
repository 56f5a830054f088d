"""Blocks that today's networks are made of, and how many TRANSPOSE each may cost: none but what the block computes.

A channel shuffle is what it computes, done in two wide moves because XNNPACK is slow at the one narrow one.
Attention with several heads moves data twice: heads become a stack of matrices before the products, and features after
them. Where queries, keys and values are products of their own, each is moved by itself. Cutting a picture into windows,
rolling it and putting it together again cost nothing more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeship.targets.tflite.layers import TFLiteLayers
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


def rows(parts: str, columns: int, constants: dict[str, Array], depth: int) -> onnx.NodeProto:
    """`parts`: the names of the input, of the weights, and of the output."""
    x, name, y = parts.split()
    constants[name] = weights(depth, columns)
    return node("MatMul", f"{x} {name}", y)


def packed_attention(batch: int) -> Block:
    """Queries, keys and values from one product, picked by Gather, as torch's MultiheadAttention exports it."""
    constants: dict[str, Array] = {
        "packed": np.array([1, 5, batch, 3, 12]),
        "three": np.array([3, 5, batch, 12]),
        "heads": np.array([5, batch * 3, 4]),
        "stacks": np.array([batch, 3, 5, 4]),
        "joined": np.array([5 * batch, 12]),
        "back": np.array([5, batch, 12]),
        "half": np.array(0.5, np.float32),
    }
    nodes = [
        node("Transpose", "x", "a", perm=[1, 0, 2]),
        rows("a w1 b", 36, constants, 12),
        node("Reshape", "b packed", "c"),
        node("Transpose", "c", "d", perm=[3, 1, 2, 0, 4]),
        node("Reshape", "d three", "e"),
    ]
    for place, name in enumerate("qkv"):
        constants[f"i{name}"] = np.array(place)
        nodes += [
            node("Gather", f"e i{name}", f"{name}1", axis=0),
            node("Reshape", f"{name}1 heads", f"{name}2"),
            node("Transpose", f"{name}2", f"{name}3", perm=[1, 0, 2]),
            node("Reshape", f"{name}3 stacks", f"{name}4"),
        ]
    nodes += [
        node("Mul", "q4 half", "q"),
        node("Transpose", "k4", "k", perm=[0, 1, 3, 2]),
        node("MatMul", "q k", "f"),
        node("Softmax", "f", "g", axis=-1),
        node("MatMul", "g v4", "h"),
        node("Transpose", "h", "i", perm=[2, 0, 1, 3]),
        node("Reshape", "i joined", "j"),
        rows("j w2 l", 12, constants, 12),
        node("Reshape", "l back", "m"),
        node("Transpose", "m", "n", perm=[1, 0, 2]),
        node("Add", "n x", "y"),
    ]
    return nodes, {"x": (batch, 5, 12)}, ["y"], constants


def window_attention(batch: int) -> Block:
    """Shifted windows as Swin has them: roll, partition, heads, bias and mask, reverse, roll back, in a picture of
    4 x 6 with windows of 2 x 3.
    """
    constants: dict[str, Array] = {
        **{name: np.array([n]) for name, n in (("zero", 0), ("one", 1), ("axis", 1), ("end", 9), ("last", 3))},
        "image": np.array([batch, 4, 6, 8]),
        "cut": np.array([batch, 2, 2, 2, 3, 8]),
        "windows": np.array([batch * 4, 6, 8]),
        "packed": np.array([batch * 4, 6, 3, 2, 4]),
        "grouped": np.array([batch, 4, 2, 6, 6]),
        "single": np.array([batch * 4, 2, 6, 6]),
        "whole": np.array([batch, 2, 2, 2, 3, 8]),
        "bias": weights(1, 2, 6, 6),
        "mask": weights(1, 4, 1, 6, 6),
        "gain": weights(8),
        "wc": weights(8, 4, 1, 1),
    }
    nodes = [
        node("Conv", "x wc", "p1"),
        node("Transpose", "p1", "p2", perm=[0, 2, 3, 1]),
        node("LayerNormalization", "p2 gain", "a", axis=-1),
        node("Slice", "a zero one axis", "a1"),
        node("Slice", "a one end axis", "a2"),
        node("Concat", "a2 a1", "b", axis=1),
        node("Reshape", "b cut", "c"),
        node("Transpose", "c", "d", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "d windows", "e"),
        rows("e w1 f", 24, constants, 8),
        node("Reshape", "f packed", "g"),
        node("Transpose", "g", "h", perm=[2, 0, 3, 1, 4]),
    ]
    for place, name in enumerate("qkv"):
        constants[f"i{name}"] = np.array(place)
        nodes.append(node("Gather", f"h i{name}", name, axis=0))
    nodes += [
        node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
        node("MatMul", "q kt", "i"),
        node("Add", "i bias", "j"),
        node("Reshape", "j grouped", "l"),
        node("Add", "l mask", "m"),
        node("Reshape", "m single", "n"),
        node("Softmax", "n", "o", axis=-1),
        node("MatMul", "o v", "p"),
        node("Transpose", "p", "r", perm=[0, 2, 1, 3]),
        node("Reshape", "r windows", "s"),
        rows("s w2 t", 8, constants, 8),
        node("Reshape", "t whole", "u"),
        node("Transpose", "u", "u1", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "u1 image", "u2"),
        node("Slice", "u2 last end axis", "u3"),
        node("Slice", "u2 zero last axis", "u4"),
        node("Concat", "u3 u4", "u5", axis=1),
        node("Add", "u5 p2", "u6"),
        node("Transpose", "u6", "y", perm=[0, 3, 1, 2]),
    ]
    return nodes, {"x": (batch, 4, 4, 6)}, ["y"], constants


def grid_attention() -> Block:
    """A convolution, attention within windows of 2 x 2, attention across them, as MaxViT has it; Split picks the
    heads.
    """
    constants: dict[str, Array] = {
        "wc": weights(8, 4, 1, 1),
        "wd": weights(4, 8, 1, 1),
        "window": np.array([1, 8, 2, 2, 3, 2]),
        "grid": np.array([1, 8, 2, 2, 2, 3]),
        "tokens_w": np.array([1, 6, 4, 8]),
        "tokens_g": np.array([1, 4, 6, 8]),
        "heads_w": np.array([1, 6, 4, 2, 4]),
        "heads_g": np.array([1, 6, 4, 2, 4]),
        "picture_w": np.array([1, 2, 3, 2, 2, 8]),
        "picture_g": np.array([1, 2, 2, 2, 3, 8]),
        "image": np.array([1, 8, 4, 6]),
    }
    nodes = [node("Conv", "x wc", "a")]

    def attend(x: str, kind: str) -> str:
        nodes.append(rows(f"{x} w1{kind} {kind}1", 24, constants, 8))
        nodes.append(node("Split", f"{kind}1", " ".join(f"{name}{kind}1" for name in "qkv"), axis=3, num_outputs=3))
        for name in "qkv":
            nodes.append(node("Reshape", f"{name}{kind}1 heads_{kind}", f"{name}{kind}2"))
            perm = [0, 1, 3, 4, 2] if name == "k" else [0, 1, 3, 2, 4]
            nodes.append(node("Transpose", f"{name}{kind}2", f"{name}{kind}", perm=perm))
        nodes.extend(
            (
                node("MatMul", f"q{kind} k{kind}", f"{kind}2"),
                node("Softmax", f"{kind}2", f"{kind}3", axis=-1),
                node("MatMul", f"{kind}3 v{kind}", f"{kind}4"),
                node("Transpose", f"{kind}4", f"{kind}5", perm=[0, 1, 3, 2, 4]),
                node("Reshape", f"{kind}5 joined_{kind}", f"{kind}6"),
                rows(f"{kind}6 w2{kind} {kind}7", 8, constants, 8),
                node("Add", f"{kind}7 {x}", f"{kind}8"),
            )
        )
        return f"{kind}8"

    constants["joined_w"] = constants["joined_g"] = np.array([1, 6, 4, 8])
    nodes += [
        node("Reshape", "a window", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 4, 3, 5, 1]),
        node("Reshape", "c tokens_w", "d"),
    ]
    nodes += [
        node("Reshape", attend("d", "w") + " picture_w", "e"),
        node("Transpose", "e", "f", perm=[0, 5, 1, 3, 2, 4]),
        node("Reshape", "f grid", "g"),
        node("Transpose", "g", "h", perm=[0, 2, 4, 3, 5, 1]),
        node("Reshape", "h tokens_g", "i"),
        node("Transpose", "i", "j", perm=[0, 2, 1, 3]),
    ]
    nodes += [
        node("Transpose", attend("j", "g"), "k", perm=[0, 2, 1, 3]),
        node("Reshape", "k picture_g", "l"),
        node("Transpose", "l", "m", perm=[0, 5, 1, 3, 2, 4]),
        node("Reshape", "m image", "n"),
        node("Conv", "n wd", "y"),
    ]
    return nodes, {"x": (1, 4, 4, 6)}, ["y"], constants


def patches() -> Block:
    nodes = [
        node("Conv", "x w1", "a", strides=[2, 2]),
        node("Reshape", "a sequence", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 1]),
        node("MatMul", "c w2", "y"),
    ]
    constants = {"w1": weights(8, 4, 2, 2), "w2": weights(8, 5), "sequence": np.array([1, 8, 9])}
    return nodes, {"x": (1, 4, 6, 6)}, ["y"], constants


def group_norm(groups: int, *, affine: bool, batch: int = 2) -> Block:
    """As exporters write it: each group of channels becomes one row."""
    nodes = [
        node("Conv", "x w1", "a", pads=[1] * 4),
        node("Reshape", "a rows", "b"),
        node("InstanceNormalization", "b ones zeros", "c"),
        node("Reshape", "c picture", "d"),
        *([node("Mul", "d gain", "e"), node("Add", "shift e", "f")] if affine else [node("Relu", "d", "f")]),
        node("Conv", "f w2", "y"),
    ]
    constants = {
        "w1": weights(6, 4, 3, 3), "w2": weights(3, 6, 1, 1), "gain": weights(6, 1, 1), "shift": weights(1, 6, 1, 1),
        "ones": np.linspace(1, 2, groups, dtype=np.float32), "zeros": weights(groups),
        "rows": np.array([batch, groups, -1]), "picture": np.array([batch, 6, 5, 4]),
    }  # fmt: skip
    return nodes, {"x": (batch, 4, 5, 4)}, ["y"], constants


@pytest.mark.parametrize(
    ("block", "most"),
    [
        (squeeze_and_excite, 0),
        (squeeze_and_excite_by_vectors, 0),
        (convnext, 0),
        (detection_head, 0),
        (patches, 0),
        (channel_shuffle, 2),
        (attention, 4),
        (lambda: packed_attention(1), 2),
        (lambda: packed_attention(2), 2),
        (lambda: window_attention(1), 2),
        (lambda: window_attention(2), 2),
        (grid_attention, 4),
        *((partial(group_norm, groups, affine=affine), 0) for groups in (1, 3, 6) for affine in (False, True)),
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


def test_a_group_normalization_of_a_dynamic_batch_is_one_too(
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]],
) -> None:
    nodes, _, outputs, constants = group_norm(3, affine=True)
    sizes = {"rows": np.array([0, 3, -1]), "picture": np.array([-1, 6, 5, 4])}
    model = model_of(nodes, {"x": ("n", 4, 5, 4)}, outputs, constants | sizes)
    path = convert(model)
    assert operators(path)["TRANSPOSE"] == 0
    for batch in (1, 3):
        feeds = {"x": RNG.normal(size=(batch, 4, 5, 4)).astype(np.float32)}
        seen = TFLiteSession(path).run(feeds)["y"]
        np.testing.assert_allclose(seen, reference(model, feeds)["y"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_layers_whose_axes_lie_torn_are_read_as_the_model_has_them(
    batch: int,
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    reference: Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]],
) -> None:
    nodes, inputs, outputs, constants = window_attention(batch)
    feeds = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in inputs.items()}
    layers = TFLiteLayers(convert(model_of(nodes, inputs, outputs, constants))).run(feeds)
    expected = reference(model_of(nodes, inputs, ["f", "t", *outputs], constants), feeds)
    for name in ("f", "t"):  # products of windows, which lie as the picture does
        np.testing.assert_allclose(layers[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({}, {"RESHAPE": 2, "TRANSPOSE": 0, "MUL": 3, "ADD": 2}),  # into groups and back; d^2, 1 / s, gain; e, shift
        ({"gain": weights(1, 6, 5, 1)}, {"RESHAPE": 2, "TRANSPOSE": 0, "MUL": 4, "ADD": 3}),  # a factor for each line
        ({"rows": np.array([4, 3, -1])}, {"RESHAPE": 2, "TRANSPOSE": 2}),  # half a picture in a row
    ],
)
def test_only_rows_of_channels_are_a_group_normalization(  # noqa: PLR0917 - a case and its fixtures
    change: dict[str, Array],
    moved: dict[str, int],
    model_of: Callable[..., onnx.ModelProto],
    convert: Callable[..., Path],
    operators: Callable[[Path], Counter[str]],
    reference: Callable[[onnx.ModelProto, Mapping[str, Array]], dict[str, Array]],
) -> None:
    nodes, inputs, outputs, constants = group_norm(3, affine=True)
    model = model_of(nodes, inputs, outputs, constants | change)
    path = convert(model)
    found = operators(path)
    assert {name: found[name] for name in moved} == moved
    feeds = {"x": RNG.normal(size=inputs["x"]).astype(np.float32)}
    seen = TFLiteSession(path).run(feeds)["y"]
    np.testing.assert_allclose(seen, reference(model, feeds)["y"], rtol=1e-3, atol=1e-4)
