"""Clipping found: the static proof against random inputs, the count against a direct emulation of the instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.diagnosis.saturation import can_clip, count_clipped, saturation

LAYERS = {
    "dense": ("y = Conv <pads = [1,1,1,1]> (x, w)", (5, 4, 3, 3), "[1,5,6,6]"),
    "strided": ("y = Conv <strides = [2,2], dilations = [2,1]> (x, w)", (5, 4, 2, 3), "[1,5,2,2]"),
    "grouped": ("y = Conv <group = 2> (x, w)", (6, 2, 1, 1), "[1,6,6,6]"),
    "odd": ("s = Slice(x, zero, three, one) y = Conv(s, w)", (5, 3, 3, 3), "[1,5,4,4]"),
    "gemm": ("f = Flatten(x) y = Gemm <transB = 1> (f, w)", (7, 144), "[1,7]"),
}


def _model(kind: str, build: Callable[..., ir.Model], seed: int = 0) -> ir.Model:
    text, shape, output = LAYERS[kind]
    weights = {"w": np.random.default_rng(seed).uniform(-0.2, 1, shape)}
    if kind == "odd":
        weights |= {"zero": np.array([0]), "three": np.array([3]), "one": np.array([1])}
    return build(f"(float[1,4,6,6] x) => (float{output} y) {{ {text} }}", **weights)


def _emulate(node: ir.Node, weights: np.ndarray, values: np.ndarray, padding: int) -> int:
    """All sums of two products, from an explicit im2col with channels innermost, in the order of the kernel."""
    if node.op_type == "Gemm":
        columns, rows = values.reshape(len(values), -1), weights
        groups = [(columns, rows)]
    else:
        get = {a.name: a.value for a in node.attributes.values()}
        pads, strides = get.get("pads", [0] * 4), get.get("strides", [1, 1])
        dilations, count = get.get("dilations", [1, 1]), get.get("group", 1)
        x = np.pad(values, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])], constant_values=padding)
        _, per_group, kh, kw = weights.shape
        groups = []
        for g in range(count):
            rows = weights[g * len(weights) // count : (g + 1) * len(weights) // count]
            patches = []
            for i in range(0, x.shape[2] - dilations[0] * (kh - 1), strides[0]):
                for j in range(0, x.shape[3] - dilations[1] * (kw - 1), strides[1]):
                    taps = x[
                        :,
                        g * per_group : (g + 1) * per_group,
                        i : i + dilations[0] * (kh - 1) + 1 : dilations[0],
                        j : j + dilations[1] * (kw - 1) + 1 : dilations[1],
                    ]
                    patches.append(taps.transpose(0, 2, 3, 1).reshape(len(x), -1))
            groups.append((np.concatenate(patches), rows.transpose(0, 2, 3, 1).reshape(len(rows), -1)))
    clipped = 0
    for columns, rows in groups:
        odd = columns.shape[1] % 2
        u = np.pad(columns.astype(np.int64), ((0, 0), (0, odd)))
        s = np.pad(rows.astype(np.int64), ((0, 0), (0, odd)))
        sums = u[:, None, 0::2] * s[None, :, 0::2] + u[:, None, 1::2] * s[None, :, 1::2]
        clipped += int(((sums > 32767) | (sums < -32768)).sum())
    return clipped


@pytest.mark.parametrize("kind", LAYERS)
def test_clipped_sums_are_counted_as_the_instruction_would_clip_them(
    kind: str, build: Callable[..., ir.Model], quantized: Any
) -> None:
    plan, qdq = quantized(_model(kind, build))
    node = next(n for n in qdq.graph if n.op_type in {"Conv", "Gemm"})
    integers = plan.weights["w"].integers
    values = np.random.default_rng(1).integers(
        0, 256, (2, 144) if kind == "gemm" else (2, 3 if kind == "odd" else 4, 6, 6)
    )
    values = values.astype(np.uint8)
    expected = _emulate(node, integers, values, 200)
    assert expected > 0
    assert count_clipped(node, integers, values, 200) == expected


@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_with_full_weights_can_clip_and_says_where(
    kind: str, build: Callable[..., ir.Model], quantized: Any, samples: Any, open_float: Any
) -> None:
    model = _model(kind, build)
    plan, qdq = quantized(model)
    (found,) = saturation(qdq, samples(model, 6), open_float)
    node = next(n for n in qdq.graph if n.op_type in {"Conv", "Gemm"})
    assert can_clip(qdq) == {node.name: found.channels}
    quantizer = plan.activations["x"]
    expected = 0
    for shot in samples(model, 6):
        unsigned = (quantizer.quantize(shot.feeds["x"]).astype(np.int16) + 128).astype(np.uint8)
        seen = unsigned[:, :3] if kind == "odd" else unsigned
        expected += _emulate(node, plan.weights["w"].integers, seen, int(quantizer.zero_point) + 128)
    assert found.clipped == expected
    assert found.sums > 0


def test_pair_limited_weights_cannot_clip(tiny_model: ir.Model, quantized: Any, samples: Any, open_float: Any) -> None:
    _, qdq = quantized(tiny_model, weights="pair_limited")
    assert can_clip(qdq) == {}
    assert saturation(qdq, samples(tiny_model), open_float) == []


def test_depthwise_convolutions_are_left_out(build: Callable[..., ir.Model], quantized: Any) -> None:
    model = build("(float[1,4,6,6] x) => (float[1,4,4,4] y) { y = Conv <group = 4> (x, w) }", w=np.ones((4, 1, 3, 3)))
    _, qdq = quantized(model)
    assert can_clip(qdq) == {}
