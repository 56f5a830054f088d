"""Which nodes are int8, which are not, and the reason that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import node_key
from edgeship.calibration.planning.selection import select
from edgeship.calibration.types import QuantRules

Build = Callable[..., ir.Model]
W = np.linspace(-1, 1, 8).reshape(2, 4, 1, 1)
SQUARE = np.linspace(-1, 1, 16).reshape(4, 4, 1, 1)


def _names(model: ir.Model, rules: QuantRules) -> list[str]:
    return [node_key(node) for node in select(model, rules).int8]


def _reasons(model: ir.Model, rules: QuantRules) -> dict[str, str]:
    return {node_key(node): reason for node, reason in select(model, rules).reasons.items()}


def test_a_plain_network_is_int8_throughout(tiny_model: ir.Model, rules: QuantRules) -> None:
    selection = select(tiny_model, rules)
    assert not selection.reasons
    assert len(selection.int8) == len(list(tiny_model.graph))


def test_an_operator_without_kernel_is_a_float_island(build: Build, rules: QuantRules) -> None:
    model = build(
        "(float[1,4,4,4] x) => (float[1,2,4,4] y) { a = Conv(x, s) e = Exp(a) y = Conv(e, w) }", s=SQUARE, w=W
    )
    assert _names(model, rules) == ["Conv_a", "Conv_y"]
    assert _reasons(model, rules) == {"Exp_e": "no int8 Exp kernel in both"}


def test_weights_computed_at_run_time_stay_float(build: Build, rules: QuantRules) -> None:
    model = build("(float[1,4] x, float[4,3] v) => (float[1,3] y) { a = Gemm(x, g) y = MatMul(a, v) }", g=np.eye(4))
    assert _reasons(model, rules) == {"MatMul_y": "it multiplies two computed matrices, and has no weights"}


@pytest.mark.parametrize("attributes", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_a_gemm_that_no_integer_kernel_computes_stays_float(build: Build, rules: QuantRules, attributes: str) -> None:
    model = build(
        f"(float[4,4] x) => (float[4,4] y) {{ a = Gemm(x, g) y = Gemm <{attributes}> (a, h, c) }}",
        g=np.eye(4),
        h=np.eye(4),
        c=np.ones(4),
    )
    assert "Gemm with" in _reasons(model, rules)["Gemm_y"]


def test_box_decoding_stays_float_as_a_whole_and_the_heads_move_as_integers(build: Build, rules: QuantRules) -> None:
    model = build(
        """(float[1,4,4,4] x) => (float[1,32,2] scores, float[1,32,2] boxes) {
        a = Conv(x, s)
        c1 = Conv(a, s) ct = Transpose <perm = [0,2,3,1]> (c1) c = Reshape(ct, shape) scores = Softmax(c)
        b1 = Conv(a, s) bt = Transpose <perm = [0,2,3,1]> (b1) br = Reshape(bt, shape)
        b2 = Conv(a, s) b2t = Transpose <perm = [0,2,3,1]> (b2) b2r = Reshape(b2t, shape)
        j = Concat <axis = 1> (br, b2r) k = Slice(j, from, to, axes)
        m = Mul(k, half) e = Exp(m) boxes = Add(e, half) }""",
        s=SQUARE,
        shape=np.array([1, 32, 2]),
        half=np.array(0.5),
        **{"from": np.array([0]), "to": np.array([32]), "axes": np.array([1])},
    )
    names = _names(model, rules)
    assert {"Transpose_bt", "Reshape_br", "Transpose_b2t", "Reshape_b2r", "Softmax_scores"} <= set(names)
    reasons = _reasons(model, rules)
    assert set(reasons) == {"Concat_j", "Slice_k", "Mul_m", "Exp_e", "Add_boxes"}
    assert reasons["Mul_m"] == "post-processing with Exp, which has no int8 kernel, stays float as a whole"


def test_a_softmax_tail_is_int8(build: Build, rules: QuantRules) -> None:
    model = build("(float[1,4] x) => (float[1,3] y) { a = Gemm(x, g) y = Softmax(a) }", g=np.ones((4, 3)))
    assert _names(model, rules) == ["Gemm_a", "Softmax_y"]


def test_moving_values_between_float_operators_needs_no_integers(build: Build, rules: QuantRules) -> None:
    model = build(
        "(float[1,4,2,2] x) => (float[1,4,2,2] y) { a = Exp(x) t = Transpose <perm = [0,1,3,2]> (a) e = Exp(t)"
        " y = Conv(e, s) }",
        s=SQUARE,
    )
    assert _names(model, rules) == ["Conv_y"]
    assert _reasons(model, rules)["Transpose_t"] == "it only moves values between float operators"


def test_a_quantized_model_is_refused(tiny_model: ir.Model, rules: QuantRules, quantized: Any) -> None:
    _, model = quantized(tiny_model)
    with pytest.raises(InputError, match="quantized already"):
        select(model, rules)


def test_a_model_without_anything_for_integers_is_refused_with_all_reasons(build: Build, rules: QuantRules) -> None:
    model = build("(float[1,4] x) => (float[1,4] y) { a = Exp(x) y = Log(a) }")
    with pytest.raises(InputError, match=r"no node .* can be int8 .*Exp_a \(Exp\): no int8 Exp.*Log_y \(Log\)"):
        select(model, rules)


def test_two_nodes_of_one_name_are_refused(build: Build, rules: QuantRules) -> None:
    model = build("(float[1,4,2,2] x) => (float[1,4,2,2] y) { a = Conv(x, s) y = Conv(a, s) }", s=SQUARE)
    for node in model.graph:
        node.name = "same"
    with pytest.raises(InputError, match="two nodes are called same"):
        select(model, rules)


def test_what_a_float_operator_divides_by_stays_float(build: Build, rules: QuantRules) -> None:
    linear_attention = """(float[1,4,4,4] x) => (float[1,2,4,4] y) {
        a = Conv(x, s)
        r = Relu(a)
        sum = ReduceMean <keepdims = 1> (r, axes)
        low = Slice(sum, begin, end)
        positive = Add(low, epsilon)
        share = Div(r, positive)
        y = Conv(share, w)
    }"""
    model = build(
        linear_attention,
        s=SQUARE,
        w=W,
        axes=np.array([1]),
        begin=np.array([0]),
        end=np.array([1]),
        epsilon=np.array(1e-6),
    )
    assert _names(model, rules) == ["Conv_a", "Relu_r", "Conv_y"]
    assert _reasons(model, rules)["Add_positive"] == "Div_share (Div) is float, and small numbers matter to it"
    assert not _reasons(
        build(
            "(float[1,4,4,4] x) => (float[1,2,4,4] y) { a = Conv(x, s) b = Sigmoid(a) e = Add(b, c) y = Conv(e, w) }",
            s=SQUARE,
            w=W,
            c=np.array(1.0),
        ),
        rules,
    )


@pytest.mark.parametrize(
    ("chain", "int8"),
    [
        ("d = Sigmoid(a) q = Div(a, d)", ["Conv_a", "Conv_y"]),
        ("g = Sigmoid(a) m = Add(g, a) d = Sqrt(m) q = Div(a, d)", ["Conv_a", "Sigmoid_g", "Conv_y"]),
        ("m = Mul(a, a) d = Sqrt(m) q = Div(a, d)", ["Conv_a", "Conv_y"]),
        ("g = Sigmoid(a) m = Mul(g, g) r = ReduceMean(m) q = Div(a, r)", ["Conv_a", "Sigmoid_g", "Conv_y"]),
        ("d = Sigmoid(a) q = Reciprocal(d)", ["Conv_a", "Conv_y"]),
        ("d = Sigmoid(a) q = Div(d, c)", ["Conv_a", "Sigmoid_d", "Conv_y"]),
        ("q = Div(a, a)", ["Conv_a", "Conv_y"]),
    ],
)
def test_divisors_are_float_as_far_back_as_small_numbers_come_from_small_ones(
    build: Build, rules: QuantRules, chain: str, int8: list[str]
) -> None:
    text = f"(float[1,4,4,4] x) => (float[1,2,4,4] y) {{ a = Conv(x, s) {chain} y = Conv(q, w) }}"
    assert _names(build(text, s=SQUARE, w=W, c=np.full((1, 4, 1, 1), 2.0)), rules) == int8


@pytest.mark.parametrize(
    ("chain", "int8"),
    [
        ("m = Mul(n, c) q = Add(d, m)", ["Conv_a", "Conv_y"]),
        ("r = Reshape(n, rows) m = Mul(r, c) q = Relu(m)", ["Conv_a", "Relu_q", "Conv_y"]),
        ("m = Mul(n, n) q = Add(m, c)", ["Conv_a", "Mul_m", "Add_q", "Conv_y"]),  # nothing of the normalization's own
        ("q = Add(n, a)", ["Conv_a", "Add_q", "Conv_y"]),
    ],
)
def test_the_factors_and_terms_of_a_float_normalization_are_its_own(
    build: Build, rules: QuantRules, chain: str, int8: list[str]
) -> None:
    normalized = "a = Conv(x, s) n = InstanceNormalization(a, one, zero)"
    text = f"(float[1,4,4,4] x) => (float[1,2,4,4] y) {{ {normalized} {chain} y = Conv(q, w) }}"
    constants = {"c": np.full((1, 4, 1, 1), 2.0), "d": np.ones((4, 1, 1)), "one": np.ones(4), "zero": np.zeros(4)}
    model = build(text, s=SQUARE, w=W, rows=np.array([1, 4, 4, 4]), **constants)
    assert _names(model, rules) == int8
