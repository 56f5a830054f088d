"""`[[quantize.override]]`: what single tensors get, and what is never clipped by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.algorithms.minmax import MinMax
from edgeship.calibration.algorithms.percentile import Percentile
from edgeship.calibration.errors import InputError
from edgeship.calibration.planning.overrides import Override, Pinned, make_observers, rules_with_floats
from edgeship.calibration.types import QuantRules
from edgeship.calibration.values.ranges import representable


@pytest.fixture
def net(build: Callable[..., ir.Model]) -> ir.Model:
    """Conv, Relu, Conv, pooling, Gemm."""
    rng = np.random.default_rng(0)
    return build(
        """(float[1,3,8,8] x) => (float[1,5] logits) {
            first = Conv <pads = [1,1,1,1]> (x, w1, b1)
            hidden = Relu(first)
            second = Conv (hidden, w2)
            pooled = GlobalAveragePool(second)
            flat = Flatten(pooled)
            logits = Gemm(flat, w3)
        }""",
        w1=rng.normal(size=(4, 3, 3, 3)),
        b1=rng.normal(size=4),
        w2=rng.normal(size=(6, 4, 1, 1)),
        w3=rng.normal(size=(6, 5)),
    )


def test_the_logits_are_spared_from_clipping(net: ir.Model, rules: QuantRules) -> None:
    observers = make_observers(net, rules, "percentile")
    assert isinstance(observers["logits"], MinMax)
    assert all(isinstance(observers[name], Percentile) for name in ("x", "hidden", "second"))


def test_boxes_and_scores_are_spared_alike(build: Callable[..., ir.Model], rules: QuantRules) -> None:
    w = np.ones((2, 3, 1, 1), np.float32)
    heads = build(
        """(float[1,3,4,4] x) => (float[1,2,4,4] boxes, float[1,2,4,4] scores) {
            body = Relu(x) stem = Conv(body, w0)
            boxes = Conv(stem, w1) raw = Conv(stem, w2) scores = Sigmoid(raw)
        }""",
        w0=np.ones((3, 3, 1, 1), np.float32),
        w1=w,
        w2=2 * w,
    )
    kinds = {name: type(observer) for name, observer in make_observers(heads, rules, "percentile").items()}
    assert kinds["boxes"] is kinds["raw"] is MinMax
    assert kinds["stem"] is Percentile


def test_a_pattern_gives_its_tensors_another_algorithm_and_the_last_one_wins(net: ir.Model, rules: QuantRules) -> None:
    wishes = [Override("*", algorithm="percentile"), Override("sec*", algorithm="minmax")]
    observers = make_observers(net, rules, "minmax", wishes)
    assert isinstance(observers["second"], MinMax)
    assert isinstance(observers["logits"], Percentile)
    assert isinstance(observers["hidden"], Percentile)


def test_a_tensor_that_lives_in_its_relu_is_found_by_its_own_name(net: ir.Model, rules: QuantRules) -> None:
    observers = make_observers(net, rules, "minmax", [Override("first", range=(0.0, 6.0))])
    assert isinstance(observers["hidden"], Pinned)


def test_a_pinned_range_is_the_range_in_the_plan(net: ir.Model, quantized: Any) -> None:
    plan, _ = quantized(net, overrides=[Override("second", range=(-2.0, 3.1))])
    covered = representable(plan.activations["second"])
    step = float(plan.activations["second"].scale)
    assert covered.low == pytest.approx(-2.0, abs=step)
    assert covered.span == pytest.approx(5.1)


@pytest.mark.parametrize("pattern", ["hidden", "first", "Conv_first", "Relu_hidden", "w1"])
def test_a_tensor_or_node_kept_float_takes_its_relu_along(net: ir.Model, quantized: Any, pattern: str) -> None:
    plan, qdq = quantized(net, overrides=[Override(pattern, stays_float=True)])
    assert plan.int8_nodes[0] == "Conv_second"
    assert "recipe keeps" in plan.stays_float["first"]
    conv = next(node for node in qdq.graph if node.name == "Conv_first")
    assert [value.name for value in conv.inputs] == ["x", "w1", "b1"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Override("secnd", algorithm="minmax"), "'secnd' matches no tensor with a range.*did you mean 'second'"),
        (Override("hiden", stays_float=True), "'hiden' matches no tensor, node or weights.*did you mean 'hidden'"),
        (Override("*9", range=(0.0, 1.0)), r"matches no tensor with a range of its own; there are: first, hidden"),
        (Override("second", algorithm="mae"), "unknown range algorithm 'mae'"),
    ],
)
def test_an_override_in_vain_is_an_error_with_the_nearest_names(
    net: ir.Model, quantized: Any, wish: Override, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantized(net, overrides=[wish])


def test_everything_kept_float_is_an_error_that_says_why(net: ir.Model, quantized: Any) -> None:
    with pytest.raises(InputError, match=r"no node of the model can be int8.*the recipe keeps '\*' float"):
        quantized(net, overrides=[Override("*", stays_float=True)])


def test_rules_without_floats_are_the_rules(net: ir.Model, rules: QuantRules) -> None:
    assert rules_with_floats(net, rules, [Override("*", algorithm="minmax")]) is rules


@pytest.mark.parametrize("wish", [{}, {"algorithm": "minmax", "stays_float": True}, {"range": (1.0, 2.0)}])
def test_an_override_says_one_thing_that_can_be(wish: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the override of 'x'"):
        Override("x", **wish)


def test_a_model_calibrated_without_overrides_does_not_mention_them(net: ir.Model, quantized: Any) -> None:
    _, qdq = quantized(net)
    assert "overrides" not in qdq.metadata_props["edgeship.quantization"]
