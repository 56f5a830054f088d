"""What holds for every plan, over random graphs, and the special cases one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeship.calibration.algorithms.minmax import MinMax
from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.planning.overrides import Override
from edgeship.calibration.planning.plan import make_plan, tensors_to_observe
from edgeship.calibration.types import QuantPlan, QuantRules

Build = Callable[..., ir.Model]
Quantized = Callable[..., tuple[QuantPlan, ir.Model]]

STEPS = {
    "conv": "{y} = Conv <pads = [1,1,1,1]> ({x}, w{n}, b{n})",
    "depthwise": "{y} = Conv <pads = [1,1,1,1], group = 4> ({x}, d{n})",
    "relu": "{y} = Relu({x})",
    "six": "{y} = Clip({x}, zero, six)",
    "pool": "{y} = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> ({x})",
    "average": "{y} = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> ({x})",
    "shift": "{y} = Add({x}, c{n})",
    "add": "{y} = Add({x}, {z})",
    "concat": "t{n} = Concat <axis = 1> ({x}, {z}) {y} = Conv(t{n}, p{n})",
    "sigmoid": "{y} = Sigmoid({x})",
    "turn": "{y} = Transpose <perm = [0,1,3,2]> ({x})",
    "float": "{y} = Erf({x})",
}
chains = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=9)


def _chain(build: Build, kinds: list[str], seed: int) -> ir.Model:
    rng = np.random.default_rng(seed)
    names, text, weights = ["x"], [], {"zero": np.array(0.0), "six": np.array(6.0)}
    for n, kind in enumerate(kinds):
        z = names[int(rng.integers(len(names)))]
        text.append(STEPS[kind].format(x=names[-1], z=z, y=f"v{n}", n=n))
        weights |= {
            f"w{n}": rng.normal(size=(4, 4, 3, 3)) * 10.0 ** rng.integers(-6, 1, (4, 1, 1, 1)),
            f"b{n}": rng.normal(size=4),
            f"d{n}": rng.normal(size=(4, 1, 3, 3)),
            f"c{n}": rng.normal(size=(1, 4, 1, 1)),
            f"p{n}": rng.normal(size=(4, 8, 1, 1)),
        }
        names.append(f"v{n}")
    body = " ".join(text)
    used = {name: array for name, array in weights.items() if f"{name}," in body.replace(")", ",")}
    head = f"(float[1,4,6,6] x) => (float[1,4,6,6] y) {{ {body} y = Conv({names[-1]}, last) }}"
    return build(head, last=rng.normal(size=(4, 4, 1, 1)), **used)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chains, st.integers(0, 1000))
def test_what_every_plan_promises(
    build: Build, quantized: Quantized, rules: QuantRules, kinds: list[str], seed: int
) -> None:
    model = _chain(build, kinds, seed)
    plan, _ = quantized(model, refinements=())
    again, _ = quantized(model, refinements=())
    assert plan.digest() == again.digest()
    for node in model.graph:
        if node.name not in plan.int8_nodes:
            continue
        tensors = [plan.activations[v.name] for v in node.inputs if v is not None and v.name in plan.activations]
        result = node.outputs[0].name
        assert result is not None
        tensors.append(plan.activations[plan.folded.get(result, result)])
        if rules.operators[node.op_type].shares_scale:
            assert all(params.same_as(tensors[0]) for params in tensors)
        if fixed := rules.operators[node.op_type].fixed_output:
            assert (float(tensors[-1].scale), int(tensors[-1].zero_point)) == (fixed.scale, fixed.zero_point)
        if node.op_type == "Conv":
            weights = plan.weights[str(node.inputs[1].name)]
            assert weights.integers.min() >= -127
            assert not weights.params.zero_point.any()
            multiplier = tensors[0].scale * weights.params.scale / tensors[-1].scale
            assert multiplier.min() >= 2.0**-24
            if node.name in plan.biases:
                bias = plan.biases[node.name]
                assert np.array_equal(bias.params.scale, tensors[0].scale * weights.params.scale)
                assert np.abs(bias.integers.astype(np.int64)).max() <= 2**30
    for params in plan.activations.values():
        assert params.spec.qmin <= params.zero_point <= params.spec.qmax  # zero is represented exactly


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(["float", "sigmoid", "concat"], 0)
@given(chains, st.integers(0, 1000))
def test_a_shared_range_contains_what_each_member_saw(  # noqa: PLR0917 - fixtures
    build: Build, samples: Any, open_float: Any, rules: QuantRules, kinds: list[str], seed: int
) -> None:
    from edgeship.calibration.observing.collect import collect

    model = _chain(build, kinds, seed)
    observers = collect(model, samples(model), tensors_to_observe(model, rules), "minmax", open_float)
    plan = make_plan(model, rules, observers)
    for name, observer in observers.items():
        if name not in plan.activations:  # what shares a scale with a fixed one may turn out not to fit it
            assert plan.stays_float[name]
            continue
        params = plan.activations[name]
        low = (params.spec.qmin - int(params.zero_point)) * float(params.scale)
        high = (params.spec.qmax - int(params.zero_point)) * float(params.scale)
        seen = observer.range()
        if seen[1] - seen[0] > 1e-9:
            assert low <= seen[0] + params.scale
            assert high >= seen[1] - params.scale


def test_concat_inputs_and_output_have_one_scale(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,4,4,4] x) => (float[1,4,4,4] y)"
        " { a = Conv(x, u) b = Conv(x, v) p = MaxPool <kernel_shape = [1,1]> (b) j = Concat <axis = 1> (a, p)"
        " y = Conv(j, w) }",
        u=np.eye(4).reshape(4, 4, 1, 1),
        v=3 * np.eye(4).reshape(4, 4, 1, 1),
        w=np.ones((4, 8, 1, 1)),
    )
    plan, _ = quantized(model)
    assert all(plan.activations[name].same_as(plan.activations["j"]) for name in ("a", "b", "p"))
    assert plan.activations["j"].scale > plan.activations["x"].scale * 2.9


def test_a_relu_is_folded_and_its_zero_point_is_the_smallest_integer(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,4,4,4] x) => (float[1,4,4,4] y) { c = Conv(x, w) y = Relu(c) }", w=np.eye(4).reshape(4, 4, 1, 1)
    )
    plan, qdq = quantized(model)
    assert plan.folded == {"c": "y"}
    assert int(plan.activations["y"].zero_point) == -128
    assert "Relu" not in [node.op_type for node in qdq.graph]


def test_a_relu_that_joins_negative_values_stays_and_cuts_integers(
    build: Build, quantized: Quantized, run_exactly: Any, samples: Any
) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,4,4,4] y) { c = Conv(x, w) r = Relu(c) j = Concat <axis = 1> (r, x)"
        " y = Conv(j, v) }",
        w=np.eye(2).reshape(2, 2, 1, 1),
        v=np.eye(4).reshape(4, 4, 1, 1),
    )
    plan, qdq = quantized(model)
    assert not plan.folded
    assert plan.activations["c"].same_as(plan.activations["r"])
    assert "Relu" in [node.op_type for node in qdq.graph]
    feeds = samples(model)[0].feeds
    step = float(plan.activations["y"].scale)
    assert np.abs(run_exactly(qdq, feeds)["y"] - run_exactly(model, feeds)["y"]).max() <= 2 * step


def test_a_relu_with_two_readers_of_its_input_is_not_folded(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y) { c = Conv(x, w) r = Relu(c) a = Add(c, r) y = Conv(a, w) }",
        w=np.eye(2).reshape(2, 2, 1, 1),
    )
    plan, _ = quantized(model)
    assert not plan.folded
    assert plan.activations["c"].zero_point > -128


def test_a_fixed_output_that_cannot_join_stays_apart(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,4,4,4] y) { c = Conv(x, w) s = Sigmoid(c) d = Conv(x, w)"
        " y = Concat <axis = 1> (s, d) }",
        w=2 * np.eye(2).reshape(2, 2, 1, 1),
    )
    plan, _ = quantized(model)
    assert (float(plan.activations["s"].scale), int(plan.activations["s"].zero_point)) == (1 / 256, -128)
    assert "joins an output with the fixed range [0, 0.996094] and values in [-" in plan.stays_float["y"]


def test_boxes_and_scores_do_not_share_a_scale_at_the_output(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,4,4,4] y) { a = Conv(x, u) b = Conv(x, w) y = Concat <axis = 1> (a, b) }",
        u=100 * np.eye(2).reshape(2, 2, 1, 1),
        w=np.eye(2).reshape(2, 2, 1, 1),
    )
    plan, _ = quantized(model)
    assert "joins ranges of" in plan.stays_float["y"]
    assert plan.activations["a"].scale > 50 * plan.activations["b"].scale


def test_a_sigmoid_keeps_its_scale_through_a_reshape(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2] x) => (float[2,1] y) { a = Gemm(x, w) s = Sigmoid(a) y = Reshape(s, shape) }",
        w=np.eye(2),
        shape=np.array([2, 1]),
    )
    plan, _ = quantized(model)
    assert plan.activations["y"].same_as(plan.activations["s"])


ATTENTION = (
    "(float[1,3,4] x) => (float[1,3,3] y) { q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm = [0, 2, 1]> (k)"
    " p = MatMul(q, t) y = Softmax <axis = -1> (p) }"
)


def _with_symmetric_keys(rules: QuantRules) -> QuantRules:
    product = replace(rules.operators["MatMul"], symmetric=frozenset({1}))
    return replace(rules, operators={**rules.operators, "MatMul": product})


def test_an_input_that_wants_zero_point_0_gets_it_with_all_that_share_its_scale(
    build: Build, quantized: Quantized, rules: QuantRules
) -> None:
    model = build(ATTENTION, wq=np.eye(4), wk=np.diag([1.0, 1.0, 1.0, -3.0]))
    plain, _ = quantized(model)
    plan, _ = quantized(model, rules=_with_symmetric_keys(rules))
    assert int(plain.activations["k"].zero_point) != 0
    for name in ("k", "t"):
        assert int(plan.activations[name].zero_point) == 0
        assert plan.activations[name].spec == plain.activations[name].spec
        assert 1.0 < plan.activations[name].scale / plain.activations[name].scale < 2.01  # less than a bit
    assert plan.activations["q"].same_as(plain.activations["q"])  # the first operand may have any


def test_a_pinned_zero_point_and_a_kernels_own_are_stronger_than_the_wish_for_0(
    build: Build, quantized: Quantized, rules: QuantRules
) -> None:
    weights = {"wq": np.eye(4), "wk": np.eye(4)}
    pin = Override("k", scale=0.125, zero_point=-5)
    plan, _ = quantized(build(ATTENTION, **weights), rules=_with_symmetric_keys(rules), overrides=[pin])
    assert (float(plan.activations["k"].scale), int(plan.activations["k"].zero_point)) == (0.125, -5)
    text = ATTENTION.replace("t = Transpose <perm = [0, 2, 1]> (k)", "t = Softmax <axis = -1> (k)")
    plan, _ = quantized(
        build(text.replace("1,3,", "1,4,").replace("4,3]", "4,4]"), **weights), rules=_with_symmetric_keys(rules)
    )
    assert int(plan.activations["t"].zero_point) == -128


def test_a_constant_zero_tensor_gets_a_sane_scale(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, w) }",
        w=np.full((2, 2, 1, 1), 1e-3),
        b=np.full(2, -10.0),
    )
    plan, _ = quantized(model, refinements=())
    assert float(plan.activations["r"].scale) == pytest.approx(1 / 255)


def test_a_dead_channel_neither_overflows_its_bias_nor_loses_its_value(
    build: Build, quantized: Quantized, run_exactly: Any, samples: Any
) -> None:
    weights = np.ones((3, 2, 1, 1))
    weights[1] = 1e-12
    weights[2] = 0
    model = build(
        "(float[1,2,4,4] x) => (float[1,3,4,4] y) { y = Conv(x, w, b) }", w=weights, b=np.array([0.1, 2.5, -1.5])
    )
    plan, qdq = quantized(model)
    assert np.abs(plan.biases["Conv_y"].integers.astype(np.int64)).max() <= 2**30
    result = run_exactly(qdq, samples(model)[0].feeds)["y"]
    step = float(plan.activations["y"].scale)
    assert result[0, 1] == pytest.approx(2.5, abs=step)
    assert result[0, 2] == pytest.approx(-1.5, abs=step)


def test_an_initializer_with_two_roles_is_kept_twice(
    build: Build, quantized: Quantized, run_exactly: Any, samples: Any
) -> None:
    model = build(
        "(float[4,4] x) => (float[4,4] y) { a = Gemm(x, w) b = Gemm <transB = 1> (a, w) y = Add(b, w) }",
        w=np.random.default_rng(0).normal(size=(4, 4)) * np.array([1, 10, 0.1, 3]),
    )
    plan, qdq = quantized(model)
    assert set(plan.weights) == {"w", "w:Gemm_b:1", "w:Add_y:1"}
    assert [plan.weights[name].params.spec.axis for name in plan.weights if "Add" not in name] == [1, 0]
    feeds = samples(model)[0].feeds
    expected = run_exactly(model, feeds)["y"]
    assert np.abs(run_exactly(qdq, feeds)["y"] - expected).max() < 0.05 * np.abs(expected).max()


def test_a_shared_weight_serves_nodes_with_different_inputs(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y) { a = Conv(x, w, b) y = Conv(a, w, b) }",
        w=np.array([[3.0, 1.0], [1e-14, 1e-14]]).reshape(2, 2, 1, 1),
        b=np.array([1.0, 5.0]),
    )
    plan, _ = quantized(model, refinements=())
    assert set(plan.weights) == {"w"}
    for node in ("Conv_a", "Conv_y"):
        assert np.abs(plan.biases[node].integers.astype(np.int64)).max() <= 2**30


def test_grouped_transposed_convolution_repeats_its_scales_over_groups(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,4,3,3] x) => (float[1,6,6,6] y) { y = ConvTranspose <group = 2, strides = [2,2]> (x, w, b) }",
        w=np.random.default_rng(0).normal(size=(4, 3, 2, 2)) * np.array([1, 5, 0.2]).reshape(1, 3, 1, 1),
        b=np.arange(6.0),
    )
    plan, _ = quantized(model)
    scale = plan.weights["w"].params.scale
    assert scale.shape == (3,)
    assert np.array_equal(plan.biases["ConvTranspose_y"].params.scale, plan.activations["x"].scale * np.tile(scale, 2))


def test_per_tensor_weights_have_one_scale(tiny_model: ir.Model, quantized: Quantized, rules: QuantRules) -> None:
    plan, _ = quantized(tiny_model, rules=replace(rules, weight=replace(rules.weight, axis=None)))
    assert all(constant.params.scale.shape == () for constant in plan.weights.values())
    assert all(bias.params.scale.shape == () for bias in plan.biases.values())


def test_every_float_tensor_is_listed_with_its_reason(build: Build, quantized: Quantized) -> None:
    model = build(
        "(float[1,4,4,4] x, float[1,2,4,4] z) => (float[1,2,4,4] y, float[1,2,4,4] u)"
        " { c = Conv(x, w) e = Exp(c) l = Log(e) y = Mul(l, half) u = Exp(z) }",
        w=np.ones((2, 4, 1, 1)),
        half=np.array(0.5),
    )
    plan, _ = quantized(model)
    assert set(plan.stays_float) == {"e", "l", "y", "half", "u", "z"}
    assert plan.stays_float["e"] == "Exp_e (Exp): no int8 Exp kernel in both"
    assert plan.stays_float["z"] == "no int8 operator reads this input"


def test_nan_weights_are_an_error_that_names_the_node(build: Build, quantized: Quantized, samples: Any) -> None:
    weights = np.ones((2, 4, 1, 1))
    weights[0, 0] = np.nan
    model = build(
        "(float[1,4,4,4] x) => (float[1,2,4,4] y) { c = Conv(x, v) y = Conv(c, w) }", v=np.ones((4, 4, 1, 1)), w=weights
    )
    with pytest.raises(InputError, match=r"NaN"):
        quantized(model)
    names = {"x": MinMax(), "c": MinMax(), "y": MinMax()}
    from edgeship.calibration.types import OperatorRule

    with pytest.raises(InputError, match=r"node Conv_y \(Conv\): 1 of 8 weights are NaN or infinite"):
        make_plan(model, QuantRules("r", {"Conv": OperatorRule("Conv")}), names)


def test_a_tensor_that_was_not_observed_is_an_error(tiny_model: ir.Model, rules: QuantRules) -> None:
    with pytest.raises(StageError, match="was not observed"):
        make_plan(tiny_model, rules, {})
