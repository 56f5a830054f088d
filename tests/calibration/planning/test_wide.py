"""16-bit activations: a complete int8 plan becomes one of the same shape that computes on finer integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import version_converter

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.learned.fake_quant import FakeQuantGraph
from edgeship.calibration.planning.overrides import Override
from edgeship.calibration.planning.wide import WIDE_BITS, wide_params, widen
from edgeship.calibration.quantize import calibrate
from edgeship.calibration.types import QuantPlan, QuantRules
from edgeship.calibration.writing.qdq import apply_plan

Array = np.ndarray[Any, np.dtype[Any]]
Quantized = Callable[..., tuple[QuantPlan, ir.Model]]


def at_21(model: ir.Model) -> ir.Model:
    return ir.from_proto(version_converter.convert_version(ir.to_proto(model), 21))


def noise(run: Callable[..., dict[str, Array]], float_model: ir.Model, quantized: ir.Model, images: Array) -> float:
    """Squared error over squared signal at the logits."""
    error = signal = 0.0
    for image in images:
        feeds = {"image": image[np.newaxis]}
        expected, seen = run(float_model, feeds)["logits"], run(quantized, feeds)["logits"]
        error += float(((expected - seen) ** 2).sum())
        signal += float((expected**2).sum())
    return error / signal


def test_16_bit_activations_leave_only_the_noise_of_the_weights(
    tiny_model: ir.Model,
    tiny_images: Array,
    rules: QuantRules,
    open_float: Callable[[bytes], Any],
    run_exactly: Callable[[ir.Model, Mapping[str, Array]], dict[str, Array]],
) -> None:
    model = at_21(tiny_model)
    samples = [Shot(str(i), {"image": image[np.newaxis]}) for i, image in enumerate(tiny_images)]
    seen = calibrate(model, samples, rules, open_float, refinements=())
    narrow = seen.plan()
    wide = widen(model, narrow)
    weights_only = apply_plan(model, QuantPlan({}, narrow.weights, {}, int8_nodes=narrow.int8_nodes))
    images = tiny_images
    of_narrow = noise(run_exactly, model, apply_plan(model, narrow), images)
    of_wide = noise(run_exactly, model, apply_plan(model, wide), images)
    of_weights = noise(run_exactly, model, weights_only, images)
    assert of_wide < of_narrow
    assert of_wide == pytest.approx(of_weights, rel=0.2)


class Shot:
    def __init__(self, name: str, feeds: dict[str, Array]) -> None:
        self.name, self.feeds = name, feeds


def test_everything_wide_is_symmetric_and_every_relu_is_a_node(tiny_model: ir.Model, quantized: Quantized) -> None:
    plan, _ = quantized(tiny_model)
    wide = widen(tiny_model, plan)
    assert wide.folded == {}
    assert wide.recast == {}
    assert set(wide.wide_nodes) == set(wide.int8_nodes)
    relus = {node.name for node in tiny_model.graph if node.op_type in {"Relu", "Clip"}}
    assert relus <= set(wide.int8_nodes)
    for params in wide.activations.values():
        assert (params.spec.bits, int(params.zero_point)) == (WIDE_BITS, 0)
    for name, constant in plan.weights.items():
        assert np.array_equal(wide.weights[name].integers, constant.integers)


def test_the_bias_means_the_same_number_at_the_finer_scale(tiny_models: dict[str, bytes], quantized: Quantized) -> None:
    model = ir.from_proto(onnx.load_model_from_string(tiny_models["plain"]))
    plan, _ = quantized(model)
    wide = widen(model, plan)
    for name, bias in plan.biases.items():
        after = wide.biases[name]
        step = float(after.params.scale.max())
        assert np.allclose(
            after.params.dequantize(after.integers), bias.params.dequantize(bias.integers), atol=step, rtol=1e-6
        )


def test_a_bias_too_large_for_the_finer_scale_enlarges_the_scale_of_its_channel(
    build: Callable[..., ir.Model], quantized: Quantized
) -> None:
    weights = np.ones((2, 1, 1, 1), np.float32)
    weights[1] = 1e-7
    model = build(
        "(float[1,1,4,4] x) => (float[1,2,4,4] y) { y = Conv(x, w, b) }", opset=21, w=weights, b=np.array([0.1, 300.0])
    )
    plan, _ = quantized(model)
    wide = widen(model, plan)
    bias = wide.biases["Conv_y"]
    assert np.abs(bias.integers).max() <= 2**30 + 1
    assert bias.params.dequantize(bias.integers)[1] == pytest.approx(300.0, rel=1e-6)
    assert wide.weights["w"].params.scale[0] == plan.weights["w"].params.scale[0]


def test_fixed_outputs_have_the_scale_that_16_bit_kernels_demand(
    build: Callable[..., ir.Model], quantized: Quantized
) -> None:
    model = build(
        "(float[1,4] x) => (float[1,4] y) { h = MatMul(x, w)\n y = Softmax(h) }",
        opset=21,
        w=np.eye(4, dtype=np.float32),
    )
    plan, _ = quantized(model)
    assert float(widen(model, plan).activations["y"].scale) == 1 / 32768


def test_one_wide_node_is_recast_on_both_sides(
    tiny_models: dict[str, bytes],
    quantized: Quantized,
    run_exactly: Callable[[ir.Model, Mapping[str, Array]], dict[str, Array]],
    tiny_images: Array,
) -> None:
    model = at_21(ir.from_proto(onnx.load_model_from_string(tiny_models["residual"])))
    plan, narrow = quantized(model)
    wide = widen(model, plan, ["Conv_inner_2"])
    assert wide.wide_nodes == ("Conv_inner_2",)
    assert set(wide.recast) == {"inner_1_relu", "inner_2"}
    assert wide.activations["inner_1_relu"].spec.bits == 8
    assert wide.recast["inner_1_relu"].same_as(wide_params(plan.activations["inner_1_relu"]))
    assert wide.activations["inner_2"].spec.bits == WIDE_BITS
    assert wide.recast["inner_2"].same_as(plan.activations["inner_2"])
    mixed = apply_plan(model, wide)
    onnx.checker.check_model(ir.to_proto(mixed), full_check=True)
    feeds = {"image": tiny_images[:1]}
    step = float(plan.activations["logits"].scale)
    difference = np.abs(run_exactly(mixed, feeds)["logits"] - run_exactly(narrow, feeds)["logits"]).max()
    assert difference <= 8 * step


def test_an_override_makes_the_nodes_wide_that_it_names(tiny_models: dict[str, bytes], quantized: Quantized) -> None:
    model = at_21(ir.from_proto(onnx.load_model_from_string(tiny_models["residual"])))
    plan, _ = quantized(model, overrides=[Override("stem_relu", wide=True)])
    assert set(plan.wide_nodes) == {"Conv_stem", "Relu_stem_relu"}


def test_an_override_of_a_node_that_stays_float_says_why(tiny_models: dict[str, bytes], quantized: Quantized) -> None:
    model = at_21(ir.from_proto(onnx.load_model_from_string(tiny_models["residual"])))
    wishes = [Override("inner_2", stays_float=True), Override("inner_2", wide=True)]
    with pytest.raises(InputError, match="'inner_2' cannot be int16: it stays float"):
        quantized(model, overrides=wishes)


def test_an_operator_set_without_16_bits_is_refused(tiny_models: dict[str, bytes], quantized: Quantized) -> None:
    model = ir.from_proto(onnx.load_model_from_string(tiny_models["plain"]))
    plan, _ = quantized(model)
    with pytest.raises(StageError, match="16-bit activations need opset 21 or later; the model has 20"):
        apply_plan(model, widen(model, plan))


def test_tensors_that_share_their_parameters_share_them_in_16_bits(
    tiny_models: dict[str, bytes], quantized: Quantized
) -> None:
    model = at_21(ir.from_proto(onnx.load_model_from_string(tiny_models["plain"])))
    narrow, _ = quantized(model)
    assert narrow.activations["first_relu"] is narrow.activations["smaller"]
    for nodes in (None, ["Conv_first", "MaxPool_smaller"]):
        plan = widen(model, narrow, nodes)
        assert plan.activations["first_relu"] is plan.activations["smaller"]
        assert plan.activations["first_relu"].spec.bits == WIDE_BITS


def test_scales_of_values_that_are_recast_are_not_learnt(tiny_models: dict[str, bytes], quantized: Quantized) -> None:
    model = at_21(ir.from_proto(onnx.load_model_from_string(tiny_models["plain"])))
    plan = widen(model, quantized(model)[0], ["Conv_first"])
    assert "first_relu" in plan.recast
    graph = FakeQuantGraph(model, plan, learn_scales=True)
    assert "smaller" not in graph._factors
    assert "second_relu" in graph._factors
