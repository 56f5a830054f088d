"""Cross-layer equalization: the same function, channels of like range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeship.calibration.graph.operators import read_layer
from edgeship.calibration.quantize import calibrate
from edgeship.calibration.refine._spans import find_pairs, find_spans
from edgeship.calibration.refine.equalize import ChannelPeaks
from edgeship.calibration.types import QuantRules

GRAPHS = {
    "dense": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) y = Conv(h, w2, b2)",
    "pooled": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) r = Relu(a) "
    "h = MaxPool <kernel_shape = [2,2]> (r) y = Conv(h, w2, b2)",
    "grouped": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) y = Conv <group = 2> (h, wg, b2)",
    "depthwise": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) "
    "c = Conv <group = 4, pads = [1,1,1,1]> (h, wd, bd) k = Relu(c) y = Conv(k, w2, b2)",
    "gemm": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) "
    "p = GlobalAveragePool(h) f = Flatten(p) y = Gemm(f, wf, bf)",
    "linear bottleneck": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) e = Conv(a, w3, b3) r = Relu(e) "
    "d = Conv(r, w4, b4) k = Add(a, d) y = Conv(k, w2, b2)",
    "basic block": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) e = Conv(h, w3, b3) r = Relu(e) "
    "d = Conv(r, w4, b4) s = Add(h, d) k = Relu(s) y = Conv(k, w2, b2)",
    "pooled head": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) d = Conv(h, w5, b5) k = Add(h, d) "
    "p = GlobalAveragePool(k) f = Flatten(p) y = Gemm(f, wf, bf)",
    "padded shortcut": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) "
    "e = Conv <strides = [2,2]> (h, w6, b6) r = Relu(e) d = Conv(r, w7, b7) t = Slice(h, starts, ends, axes, steps) "
    "p = Pad(t, pads) s = Add(d, p) k = Relu(s) y = Conv(k, w8, b2)",
    "clip": "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Clip(a, low, high) y = Conv(h, w2, b2)",
}
OUTPUTS = {"pooled": "[1,6,7,7]", "gemm": "[1,5]", "pooled head": "[1,5]", "padded shortcut": "[1,6,4,4]"}
RESIDUAL = ("linear bottleneck", "basic block", "pooled head")


def constants() -> dict[str, np.ndarray]:
    """Weights whose channels differ a thousandfold."""
    rng = np.random.default_rng(5)
    unlike = np.array([0.01, 1.0, 10.0, 0.1])
    more = np.array([3.0, 0.05, *unlike, 0.3])
    return {
        "w1": rng.normal(size=(4, 3, 3, 3)) * unlike[:, None, None, None],
        "b1": rng.normal(size=4) * unlike,
        "w2": rng.normal(size=(6, 4, 1, 1)) / unlike[:, None, None],
        "wg": rng.normal(size=(6, 2, 1, 1)),
        "b2": rng.normal(size=6),
        "wd": rng.normal(size=(4, 1, 3, 3)),
        "bd": rng.normal(size=4),
        "w3": rng.normal(size=(8, 4, 1, 1)) / unlike[:, None, None],
        "b3": rng.normal(size=8),
        "w4": rng.normal(size=(4, 8, 1, 1)) * unlike[:, None, None, None],
        "b4": rng.normal(size=4) * unlike,
        "w5": rng.normal(size=(4, 4, 1, 1)) * unlike[:, None, None, None] / unlike[:, None, None],
        "b5": rng.normal(size=4) * unlike,
        "w6": rng.normal(size=(3, 4, 1, 1)),
        "b6": rng.normal(size=3),
        "w7": rng.normal(size=(7, 3, 1, 1)) * more[:, None, None, None],
        "b7": rng.normal(size=7) * more,
        "w8": rng.normal(size=(6, 7, 1, 1)) / more[:, None, None],
        "starts": np.array([0, 0]),
        "ends": np.array([8, 8]),
        "axes": np.array([2, 3]),
        "steps": np.array([2, 2]),
        "pads": np.array([0, 2, 0, 0, 0, 1, 0, 0]),
        "wf": rng.normal(size=(4, 5)),
        "bf": rng.normal(size=5),
        "low": np.float32(0),
        "high": np.float32(6),
    }


@pytest.fixture(params=GRAPHS)
def model(request: pytest.FixtureRequest, build: Callable[..., ir.Model]) -> ir.Model:
    """A chain of layers with channels of unlike ranges."""
    text = GRAPHS[request.param]
    used = {name: array for name, array in constants().items() if f" {name}" in text}
    return build(f"(float[1,3,8,8] x) => (float{OUTPUTS.get(request.param, '[1,6,8,8]')} y) {{ {text} }}", **used)


@pytest.fixture
def equalized(rules: QuantRules, open_float: Any, samples: Any) -> Callable[[ir.Model], ir.Model]:
    """The float model that is calibrated when equalization is asked for, for weights with one scale per tensor."""
    one_scale = replace(rules, weight=replace(rules.weight, axis=None))

    def make(model: ir.Model, *, per_tensor: bool = True) -> ir.Model:
        chosen = one_scale if per_tensor else rules
        return calibrate(model, samples(model), chosen, open_float, refinements=("equalize",)).model

    return make


def layers(model: ir.Model) -> list[np.ndarray]:
    return [read_layer(node).weights for node in model.graph if node.op_type in {"Conv", "Gemm"}]


def test_the_float_function_stays_the_same(
    model: ir.Model, equalized: Callable[[ir.Model], ir.Model], samples: Any, run_exactly: Any
) -> None:
    new = equalized(model)
    assert any(not np.array_equal(a, b) for a, b in zip(layers(model), layers(new), strict=True))
    for shot in samples(model):
        exact = run_exactly(model, shot.feeds)["y"]
        assert run_exactly(new, shot.feeds)["y"] == pytest.approx(
            exact, rel=1e-4, abs=1e-4 * float(np.abs(exact).max())
        )


def test_behind_a_relu_it_is_the_same_for_inputs_far_beyond_the_samples(
    build: Callable[..., ir.Model], equalized: Callable[[ir.Model], ir.Model], samples: Any, run_exactly: Any
) -> None:
    used = {name: array for name, array in constants().items() if f" {name}" in GRAPHS["depthwise"]}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS['depthwise']} }}", **used)
    new = equalized(model)
    feeds = {"x": 1000 * samples(model, 1, 9)[0].feeds["x"]}
    exact = run_exactly(model, feeds)["y"]
    assert run_exactly(new, feeds)["y"] == pytest.approx(exact, rel=1e-4, abs=1e-4 * float(np.abs(exact).max()))


def test_the_given_model_is_left_alone(model: ir.Model, equalized: Callable[[ir.Model], ir.Model]) -> None:
    before = [weights.copy() for weights in layers(model)]
    equalized(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, layers(model), strict=True))


def test_channels_of_both_layers_have_the_same_range(
    build: Callable[..., ir.Model], equalized: Callable[[ir.Model], ir.Model]
) -> None:
    """r1_i = r2_i where the activations leave room (eq. 11 of the paper)."""
    used = {name: array for name, array in constants().items() if f" {name}" in GRAPHS["dense"]}
    used["b1"][:] = 0
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS['dense']} }}", **used)
    first, second = layers(equalized(model))
    r1, r2 = np.abs(first).max(axis=(1, 2, 3)), np.abs(second).max(axis=(0, 2, 3))
    assert r1.max() / r1.min() < 10
    assert r2.max() / r2.min() < 10


def test_a_channel_that_the_clip_cuts_keeps_its_size(
    build: Callable[..., ir.Model], equalized: Callable[[ir.Model], ir.Model]
) -> None:
    used = {name: array for name, array in constants().items() if f" {name}" in GRAPHS["clip"]}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS['clip']} }}", **used)
    old, new = layers(model)[0], layers(equalized(model))[0]
    assert new[2] == pytest.approx(old[2])  # ten times the others: it reaches 6
    assert np.abs(new[0]).max() > 5 * np.abs(old[0]).max()


def test_per_tensor_weights_lose_far_less_with_it(
    build: Callable[..., ir.Model], quantized: Any, rules: QuantRules, run_exactly: Any, samples: Any
) -> None:
    """What it promises: one scale per tensor is enough afterwards."""
    used = {name: array for name, array in constants().items() if f" {name}" in GRAPHS["dense"]}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS['dense']} }}", **used)
    per_tensor = replace(rules, weight=replace(rules.weight, axis=None))

    def noise(*refinements: str) -> float:
        _, qdq = quantized(model, rules=per_tensor, refinements=refinements)
        shots = samples(model)
        return float(
            sum(((run_exactly(qdq, s.feeds)["y"] - run_exactly(model, s.feeds)["y"]) ** 2).sum() for s in shots)
        )

    assert noise("equalize") < 0.1 * noise()


def test_before_a_depthwise_layer_small_channels_get_as_many_integers_as_large_ones(
    build: Callable[..., ir.Model], equalized: Any, quantized: Any, run_exactly: Any, samples: Any
) -> None:
    """Weight scales per channel pay for it on both sides: a channel a thousandth in size is no longer rounded away."""
    used = {name: array for name, array in constants().items() if f" {name}" in GRAPHS["depthwise"]}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS['depthwise']} }}", **used)

    def worst(exact: ir.Model, *refinements: str) -> float:
        """The smallest signal to noise ratio of a channel of h."""
        _, qdq = quantized(model, refinements=refinements)
        signal, noise = np.zeros(4), np.zeros(4)
        for shot in samples(model):
            h, rounded = (run_exactly(only(each, "h"), shot.feeds)["h"] for each in (exact, qdq))
            signal += (h**2).sum(axis=(0, 2, 3))
            noise += ((h - rounded) ** 2).sum(axis=(0, 2, 3))
        return float((signal / noise).min())

    assert worst(model) < 10
    assert worst(equalized(model, per_tensor=False), "equalize") > 1000


def only(model: ir.Model, name: str) -> ir.Model:
    """The model with the tensor `name` as its output."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.add(name=name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    "text",
    [
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Sigmoid(a) y = Conv(h, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Clip(a, high, high2) y = Conv(h, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) k = Mul(h, a) y = Conv(k, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Clip(a, low, high2) k = Add(h, a) y = Conv(k, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) k = Add(h, b5) y = Conv(k, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Sigmoid(a) k = Add(h, a) y = Conv(k, w2, b2)",
        "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) t = Transpose <perm = [0,1,3,2]> (h) m = MatMul(t, w8)"
        " y = Conv(m, w2, b2)",
    ],
)
def test_nothing_is_scaled_through_other_operators_or_several_readers(
    build: Callable[..., ir.Model], equalized: Callable[[ir.Model], ir.Model], text: str
) -> None:
    values = {**constants(), "high": np.float32(-1), "high2": np.float32(1), "w8": np.ones((8, 8), np.float32)}
    values["b5"] = np.ones((1, 4, 1, 1), np.float32)
    used = {name: array for name, array in values.items() if f" {name}" in text.replace(")", " )")}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {text} }}", **used)
    assert find_pairs(model, set(model.graph)) == []
    assert equalized(model) is model


@pytest.mark.parametrize("name", RESIDUAL)
def test_across_residual_adds_channels_become_alike_and_the_report_says_so(
    name: str, build: Callable[..., ir.Model], rules: QuantRules, open_float: Any, samples: Any
) -> None:
    used = {key: array for key, array in constants().items() if f" {key}" in GRAPHS[name]}
    model = build(f"(float[1,3,8,8] x) => (float{OUTPUTS.get(name, '[1,6,8,8]')} y) {{ {GRAPHS[name]} }}", **used)
    one_scale = replace(rules, weight=replace(rules.weight, axis=None))
    seen = calibrate(model, samples(model), one_scale, open_float, refinements=("equalize",))
    facts = seen.refinements["equalize"].report()["Conv_a"]
    assert facts["writes"] == ["Conv_a", "Conv_d"]
    assert facts["reads"][-1] in {"Conv_y", "Gemm_y"}
    assert facts["octaves_after"] < 0.6 * facts["octaves_before"]
    inputs = [_ranges_of_inputs(model, "y"), _ranges_of_inputs(seen.model, "y")]
    if name != "pooled head":  # whose last layer was even before
        assert np.ptp(np.log2(inputs[1])) < np.ptp(np.log2(inputs[0]))


def _ranges_of_inputs(model: ir.Model, output: str) -> np.ndarray:
    """The largest weight that each input channel of the layer making `output` meets."""
    node = next(node for node in model.graph if node.outputs[0].name == output)
    weights = np.abs(read_layer(node).weights)
    return weights.max(axis=(0, 2, 3)) if weights.ndim == 4 else weights.max(axis=1)


def test_per_tensor_weights_of_residual_blocks_lose_far_less_with_it(
    build: Callable[..., ir.Model], quantized: Any, rules: QuantRules, run_exactly: Any, samples: Any
) -> None:
    per_tensor = replace(rules, weight=replace(rules.weight, axis=None))

    def noise(model: ir.Model, *refinements: str) -> float:
        _, qdq = quantized(model, rules=per_tensor, refinements=refinements)
        shots = samples(model)
        return float(
            sum(((run_exactly(qdq, s.feeds)["y"] - run_exactly(model, s.feeds)["y"]) ** 2).sum() for s in shots)
        )

    for name in ("linear bottleneck", "basic block"):
        used = {key: array for key, array in constants().items() if f" {key}" in GRAPHS[name]}
        model = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {GRAPHS[name]} }}", **used)
        assert noise(model, "equalize") < 0.2 * noise(model)


def test_a_residual_tensor_that_the_user_sees_stays_as_it_is(build: Callable[..., ir.Model], rules: QuantRules) -> None:
    text = "a = Conv <pads = [1,1,1,1]> (x, w1, b1) h = Relu(a) k = Add(h, a) y = Conv(k, w2, b2)"
    used = {key: array for key, array in constants().items() if f" {key}" in text}
    inner = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y) {{ {text} }}", **used)
    assert [tuple(span.tensors) for span in find_spans(inner, set(inner.graph))] == [("a", "k")]
    shown = build(f"(float[1,3,8,8] x) => (float[1,6,8,8] y, float[1,4,8,8] k) {{ {text} }}", **used)
    assert find_spans(shown, set(shown.graph)) == []


def test_peaks_merge_to_those_of_one_pass() -> None:
    values = np.random.default_rng(0).normal(size=(6, 3, 4, 4)).astype(np.float32)
    whole, first, second = ChannelPeaks(), ChannelPeaks(), ChannelPeaks()
    whole.update(values)
    first.update(values[:2])
    second.update(values[2:])
    first.merge(second)
    assert whole.peaks is not None
    assert np.array_equal(first.peaks, whole.peaks)


def test_stages_are_tied_where_a_shortcut_pads_channels_with_zeros(
    build: Callable[..., ir.Model], rules: QuantRules, open_float: Any, samples: Any
) -> None:
    """The four channels before the Pad are the third to the sixth of the seven behind it."""
    used = {key: array for key, array in constants().items() if f" {key}" in GRAPHS["padded shortcut"]}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,4,4] y) {{ {GRAPHS['padded shortcut']} }}", **used)
    group = find_spans(model, set(model.graph))[-1]
    places = {node.name: place for node, place in (*group.producers.items(), *group.consumers.items())}
    every, inner = slice(0, 7), slice(2, 6)
    assert places == {"Conv_a": inner, "Conv_d": every, "Conv_e": inner, "Conv_y": every}
    one_scale = replace(rules, weight=replace(rules.weight, axis=None))
    seen = calibrate(model, samples(model), one_scale, open_float, refinements=("equalize",))
    facts = seen.refinements["equalize"].report()["Conv_a"]
    assert facts["octaves_after"] < 0.6 * facts["octaves_before"]
    before, after = (np.log2(_ranges_of_inputs(each, "y")) for each in (model, seen.model))
    assert np.ptp(after) < 0.7 * np.ptp(before)


@pytest.mark.parametrize(
    "change",
    [
        ("p = Pad(t, pads)", "p = Pad(t, pads, one)"),
        ("p = Pad(t, pads)", "q = Relu(t) p = Pad <mode = 'wrap'> (q, pads)"),
        (
            "t = Slice(h, starts, ends, axes, steps)",
            "g = Slice(h, starts, ends, axes, steps) t = Concat <axis = 1> (g)",
        ),
        ("s = Add(d, p)", "q = Pad(t, others) w = Add(d, q) s = Add(w, p)"),
    ],
)
def test_what_is_no_padding_with_zeros_or_puts_a_channel_in_two_places_ties_nothing(
    build: Callable[..., ir.Model], change: tuple[str, str]
) -> None:
    text = GRAPHS["padded shortcut"].replace(*change).replace("'", '"')
    assert text != GRAPHS["padded shortcut"]
    values = {**constants(), "one": np.float32(1), "others": np.array([0, 1, 0, 0, 0, 2, 0, 0])}
    used = {key: array for key, array in values.items() if f" {key}" in text.replace(")", " )")}
    model = build(f"(float[1,3,8,8] x) => (float[1,6,4,4] y) {{ {text} }}", opset=19, **used)
    assert all(len(span.tensors) == 1 for span in find_spans(model, set(model.graph)))
