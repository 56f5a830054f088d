"""Structures that int8 suffers from are found, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeship.calibration.diagnosis.structure import (
    ChannelSpans,
    TopGaps,
    Trouble,
    quantizable_outputs,
    summed_up,
    troubles,
)
from edgeship.calibration.observing.collect import observe
from edgeship.calibration.quantize import calibrate
from edgeship.calibration.types import OperatorRule, QuantRules

Array = np.ndarray[Any, np.dtype[Any]]
Build = Callable[..., ir.Model]
Look = Callable[[ir.Model], list[Trouble]]


@pytest.fixture
def look(rules: QuantRules, samples: Callable[..., Sequence[Any]], open_float: Callable[[bytes], Any]) -> Look:
    """What is found in a model on seeded samples, with int8 HardSwish and MaxPool."""
    more = {"HardSwish": OperatorRule("HardSwish"), **rules.operators}

    def found(model: ir.Model) -> list[Trouble]:
        shots = samples(model)
        seen = calibrate(model, shots, QuantRules("all", more), open_float, refinements=())
        outputs = {name: ChannelSpans() for name in quantizable_outputs(model)}
        gaps = {name: TopGaps() for name in outputs}
        observe(model, shots, {name: [spans, gaps[name]] for name, spans in outputs.items()}, open_float)
        return troubles(model, seen.plan(), seen.observers, outputs, gaps)

    return found


def test_plain_networks_have_no_trouble(tiny_model: ir.Model, look: Look) -> None:
    assert look(tiny_model) == []


def test_only_outputs_that_nodes_compute_in_real_numbers_are_looked_at(build: Build, look: Look) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y, bool[1,2,4,4] above, int64[1,1,4,4] best, float[3] anchors, "
        "float[1,2,4,4] x) { y = Conv(x, w)\n above = Greater(y, zero)\n best = ArgMax<axis=1>(y) }",
        w=np.ones((2, 2, 1, 1)),
        zero=np.array(0.0),
        anchors=np.arange(3.0),
    )
    assert quantizable_outputs(model) == ["y"]
    assert look(model) == []


def test_an_output_of_boxes_and_scores_is_found_with_all_that_makes_it(build: Build, look: Look) -> None:
    weights = np.ones((5, 3, 1, 1), np.float32)
    weights[:4] *= 640
    model = build(
        "(float[1,3,4,4] x) => (float[1,5,16] y) { h = Conv(x, w)\n y = Reshape(h, s) }",
        w=weights,
        s=np.array([1, 5, 16], np.int64),
    )
    (trouble,) = [each for each in look(model) if each.fix == "float_outputs"]
    assert trouble.nodes == ("Reshape_y", "Conv_h")
    assert trouble.finding.rule == "output y mixes ranges under one scale"
    assert trouble.finding.accepted == 'quantize.fixes = ["float_outputs"]'


def test_a_concat_of_unlike_ranges_before_a_layer_is_found(build: Build, look: Look) -> None:
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] y) { a = Conv(x, v)\n b = Conv(x, w)\n c = Concat<axis=1>(a, b)\n"
        " y = Conv(c, u) }",
        v=np.ones((2, 2, 1, 1)),
        w=np.full((2, 2, 1, 1), 100.0),
        u=np.ones((2, 4, 1, 1)),
    )
    (trouble,) = look(model)
    assert (trouble.fix, trouble.nodes) == ("float_concats", ("Concat_c",))


@pytest.mark.parametrize(
    ("body", "nodes"),
    [
        ("h = Conv(x, w)\n s = Sigmoid(h)\n g = Mul(h, s)\n y = Conv(g, w)", ("Sigmoid_s", "Mul_g")),
        ("h = Conv(x, w)\n s = Sigmoid(h)\n g = Mul(s, h)\n y = Conv(g, w)", ("Sigmoid_s", "Mul_g")),
        ("h = Conv(x, w)\n g = HardSwish(h)\n y = Conv(g, w)", ("HardSwish_g",)),
    ],
)
def test_gated_activations_are_found(build: Build, look: Look, body: str, nodes: tuple[str, ...]) -> None:
    model = build(f"(float[1,2,4,4] x) => (float[1,2,4,4] y) {{ {body} }}", w=np.ones((2, 2, 1, 1)))
    (trouble,) = look(model)
    assert (trouble.fix, trouble.nodes) == ("wide_activations", nodes)


def test_a_product_with_another_gate_is_no_silu(build: Build, look: Look) -> None:
    body = "h = Conv(x, w)\n s = Sigmoid(x)\n g = Mul(h, s)\n y = Conv(g, w)"
    assert look(build(f"(float[1,2,4,4] x) => (float[1,2,4,4] y) {{ {body} }}", w=np.ones((2, 2, 1, 1)))) == []


def test_a_padded_max_pool_of_negative_values_is_found(build: Build, look: Look) -> None:
    pool = "MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>"
    text = "(float[1,2,4,4] x) => (float[1,2,4,4] y) {{ h = Conv(x, w)\n {} p = {}({})\n y = Conv(p, w) }}"
    (trouble,) = look(build(text.format("", pool, "h"), w=np.ones((2, 2, 1, 1))))
    assert trouble.finding.where == "MaxPool_p (MaxPool)"
    assert look(build(text.format("r = Relu(h)\n", pool, "r"), w=np.ones((2, 2, 1, 1)))) == []


def test_dead_and_exploding_channels_are_counted(build: Build, look: Look) -> None:
    weights = np.ones((4, 2, 1, 1), np.float32)
    weights[0], weights[1] = 0.0, 500.0
    found = look(build("(float[1,2,4,4] x) => (float[1,4,4,4] y) { y = Conv(x, w) }", w=weights))
    rules = [trouble.finding.rule for trouble in found if trouble.fix is None]
    assert rules == [
        "output channels with next to no weights, under 1e-05 of the largest",
        "an output channel whose weights dwarf the others'",
    ]
    assert [each.finding.seen for each in found if each.finding.rule == rules[0]] == ["1 of 4"]


def test_what_many_nodes_share_is_said_once_and_counted(build: Build, look: Look) -> None:
    chain = [f"h{i} = HardSwish(x{i})\n x{i + 1} = Conv(h{i}, w)" for i in range(5)]
    model = build(
        "(float[1,2,4,4] x) => (float[1,2,4,4] x5) { x0 = Conv(x, w)\n " + "\n ".join(chain) + " }",
        w=np.diag([1.0, 1.0]).reshape(2, 2, 1, 1),
    )
    found = look(model)
    assert len(found) == 5
    (finding,) = summed_up(found)
    assert finding.where == "HardSwish_h0 (HardSwish), HardSwish_h1 (HardSwish), HardSwish_h2 (HardSwish) and 2 more"
    assert finding.seen == "8 bits"
    assert finding.accepted == 'quantize.fixes = ["wide_activations"]'


def test_what_was_seen_at_each_node_is_kept_apart(build: Build, look: Look) -> None:
    some, other = np.ones((4, 2, 1, 1), np.float32), np.ones((4, 4, 1, 1), np.float32)
    some[0], other[:2] = 0.0, 0.0
    body = "h = Conv(x, v)\n y = Conv(h, w)"
    (finding,) = summed_up(look(build(f"(float[1,2,4,4] x) => (float[1,4,4,4] y) {{ {body} }}", v=some, w=other)))
    assert (finding.where, finding.seen) == ("Conv_h (Conv), Conv_y (Conv)", "1 of 4, 2 of 4")


@pytest.mark.parametrize(("bias", "found"), [(0.0, True), (60.0, False)])
def test_scores_whose_two_largest_become_one_integer_are_found(
    build: Build, look: Look, bias: float, found: bool
) -> None:
    weights = np.random.default_rng(4).normal(size=(8, 200))
    weights[:, 0] = 0.0
    model = build("(float[1,8] x) => (float[1,200] y) { y = Gemm(x, w, b) }", w=weights, b=np.eye(200)[0] * bias)
    ties = [trouble for trouble in look(model) if trouble.fix == "wide_outputs"]
    assert [trouble.nodes for trouble in ties] == ([("Gemm_y",)] if found else [])


def test_the_share_of_ties_is_that_of_samples_within_a_step() -> None:
    rng = np.random.default_rng(5)
    gaps = TopGaps()
    for gap in rng.uniform(0, 10, size=2000):
        gaps.update(np.array([[1.0, 1.0 + gap, -3.0]]))
    assert gaps.tied(0.5) == pytest.approx(0.05, rel=0.1)
    assert gaps.tied(0.5) == pytest.approx(np.mean(np.array(gaps.gaps) < 0.5), rel=0.3)
