"""The drawings, by what they claim: the front, the axes, the clipped share, labels that cover nothing."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeship.calibration.values.silhouette import Silhouette
from edgeship.pipeline.reporting import svg, tradeoff
from edgeship.pipeline.reporting.distribution import Times, latency_chart, outside, silhouette_chart
from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.reporting.tradeoff import Question, Variant, pareto_front, tradeoff_chart

QUESTION = Question("Accuracy against latency", "ms", "top-1", 1.0)
numbers = st.floats(0.001, 1e9)
variants = st.lists(st.builds(Variant, st.just("v"), st.just(0), st.booleans(), numbers, st.floats(0, 100)), min_size=1)


@given(variants)
def test_no_variant_beats_one_on_the_front_and_each_other_is_beaten(given_variants: list[Variant]) -> None:
    front = pareto_front(given_variants)

    def beats(a: Variant, b: Variant) -> bool:
        return a.cost <= b.cost and a.quality >= b.quality and (a.cost < b.cost or a.quality > b.quality)

    assert not any(beats(other, best) for best in front for other in given_variants)
    costs = {(best.cost, best.quality) for best in front}
    assert all((v.cost, v.quality) in costs or any(beats(best, v) for best in front) for v in given_variants)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@example(879609.9999999999, 1e-06, 6)
def test_ticks_are_round_inside_and_about_as_many_as_asked(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = svg.round_ticks(low, high, count)
    if not high > low:
        return
    slack = span * 1e-6 + 2 * math.ulp(max(abs(low), abs(high)))
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 1
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(ticks)} if span > 1e-3 else set()
    assert len(steps) <= 1 or max(steps) / min(steps) < 1.001


def test_ticks_are_labelled_with_equally_many_decimals() -> None:
    assert svg.tick_labels([-0.5, 0.0, 0.5]) == ["\N{MINUS SIGN}0.5", "0.0", "0.5"]
    assert svg.tick_labels([0, 2000]) == ["0", "2,000"]


@example([(60.0, 248.0), (60.0, 236.0), (60.0, 210.0), (60.0, 226.0)])
@given(st.lists(st.tuples(st.floats(60, 420), st.floats(30, 250)), min_size=1, max_size=4))
def test_labels_of_a_few_variants_cover_neither_marks_nor_each_other(places: list[tuple[float, float]]) -> None:
    names = [f"target {i} int8" for i in range(len(places))]
    labels = tradeoff._place_labels(places, names)
    boxes = [tradeoff._box(label, len(name) * svg.CHARACTER) for label, name in zip(labels, names, strict=True)]
    for index, box in enumerate(boxes):
        others = [other for place, other in enumerate(boxes) if place != index]
        assert not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0, 10.0])
def test_the_clipped_share_is_that_of_the_values(limit: float) -> None:
    values = np.random.default_rng(1).normal(0, 1, 4000).astype(np.float32)
    silhouette = Silhouette()
    silhouette.update(values)
    found = outside(Facts(silhouette.to_json()), (-limit, limit), 0.0)
    assert found == pytest.approx(float((np.abs(values) > limit).mean()), abs=0.01)


def test_a_range_up_to_half_a_step_inside_the_extremes_clips_nothing() -> None:
    silhouette = Silhouette()
    silhouette.update(np.array([-1, 1], np.float32))
    assert outside(Facts(silhouette.to_json()), (-0.996, 0.996), 0.01) == 0.0


def test_slow_outliers_are_counted_and_do_not_stretch_the_axis() -> None:
    times = [1.0 + 0.001 * (i % 10) for i in range(200)] + [50.0, 60.0]
    chart = latency_chart([Times("int8", False, 0, times)], "tflite")
    assert "2 slower not drawn" in chart
    ticks = [float(text) for text in re.findall(r'text-anchor="middle">([\d.]+)<', chart)]
    assert max(ticks) < 1.1


@pytest.mark.parametrize("cost", [0.0, 1e-9, 5.0])
def test_a_single_variant_can_be_drawn(cost: float) -> None:
    chart = tradeoff_chart([Variant("only", 0, False, cost, 100.0)], QUESTION)
    assert "nan" not in chart
    assert chart.count("<circle") == 1


def test_a_tensor_of_zeros_can_be_drawn() -> None:
    silhouette = Silhouette()
    silhouette.update(np.zeros(5, np.float32))
    assert "nan" not in silhouette_chart("zeros", Facts(silhouette.to_json()), (0.0, 1e-9))
    assert "<svg" in silhouette_chart("nothing known", Facts(), None)
