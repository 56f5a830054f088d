"""Which layer goes back next is decided by the whole model, and with as few measurements as that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from edgeship.calibration.errors import StageError
from edgeship.pipeline.mixed_summary import mixed_rows
from edgeship.pipeline.quantizing.limits import Limits
from edgeship.pipeline.quantizing.margins import Margins
from edgeship.pipeline.quantizing.mixed import Mixer, Step
from edgeship.pipeline.quantizing.sensitivity import Cache, LayerCost
from edgeship.pipeline.quantizing.yardstick import Cost

NOISE = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 0.5}
TOGETHER = {"e": 2.0, "f": 2.0, "g": 0.5}
"""Of each layer by itself."""


@dataclass(frozen=True)
class Model:
    """A calibration whose noise is a function of the layers that are left in integers."""

    noise: Callable[[set[str]], float]
    layers: Mapping[str, float]
    floats: tuple[str, ...] = ()
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def with_overrides(self, more: Sequence[Any]) -> Model:
        return replace(self, floats=(*self.floats, *(override.pattern for override in more)))


def repeating(left: set[str]) -> float:
    """`b` only repeats what `a` spoils before it."""
    return sum(NOISE[name] for name in left if name != "b" or "a" in left)


def together(left: set[str]) -> float:
    """`e` and `f` are the ends of one tensor."""
    return 0.5 * ("g" in left) + 2.0 * bool({"e", "f"} & left)


class Stub(Mixer):
    """A mixer that reads the noise off the model instead of running it."""

    def _step(self, calibration: Any, layer: str | None) -> Step:
        calibration.asked.append(calibration.floats)
        return Step(
            layer,
            Cost(None, None, calibration.noise(set(calibration.layers) - set(calibration.floats)), 10),
            None,
            calibration,
        )  # type: ignore[arg-type]  # no plan is looked at


class Unlabelled:
    unit = "percent of other decisions"


def meet(limits: Limits, model: Model) -> list[str]:
    """The layers that went back."""
    costs = [LayerCost(name, "Conv", 1, Cost(None, None, noise, 10)) for name, noise in model.layers.items()]
    stub = Stub(limits, "float", "full", Unlabelled(), Cache(None), lambda *_: None)  # type: ignore[arg-type]  # it has what is asked
    return stub.meet(model, lambda _: costs).reverted  # type: ignore[arg-type]  # it has what is asked


def sqnr(noise: float) -> float:
    return float(-10 * np.log10(noise))


def test_a_layer_that_repeats_what_another_spoils_stays() -> None:
    assert meet(Limits(min_sqnr=sqnr(0.6)), Model(repeating, NOISE)) == ["a", "c"]


def test_layers_that_help_only_together_are_found() -> None:
    assert meet(Limits(min_sqnr=sqnr(0.6)), Model(together, TOGETHER)) == ["e", "f"]


def test_candidates_that_cannot_be_better_are_not_measured() -> None:
    model = Model(repeating, NOISE)
    meet(Limits(min_sqnr=sqnr(0.6)), model)
    assert model.asked == [(), ("a",), ("a", "b"), ("a", "c")]  # d by itself costs less than c was measured to bring


def test_a_limit_that_is_met_at_once_reverts_nothing() -> None:
    model = Model(repeating, NOISE)
    assert meet(Limits(min_sqnr=sqnr(100.0)), model) == []
    assert model.asked == [()]


def test_limits_of_decisions_ask_for_decisions() -> None:
    for limits in (Limits(max_drop=1.0), Limits(min_agreement=0.9)):
        with pytest.raises(StageError, match=r"counts decisions, and the model has none.*set quantize.min_sqnr"):
            meet(limits, Model(repeating, NOISE))


def test_all_limits_that_are_missed_are_named() -> None:
    cost = Cost(drop=2.0, loss=None, noise=0.1, samples=10, agreement=0.9)
    limits = Limits(max_drop=1.0, min_agreement=0.95, min_sqnr=20.0)
    assert limits.missed(cost, "points of top-1") == [
        "quantize.max_drop = 1 cannot be met: the drop is 2 points of top-1",
        "quantize.min_agreement = 0.95 cannot be met: the agreement is 0.9000",
        "quantize.min_sqnr = 20 cannot be met: the SQNR is 10.00 dB",
    ]
    assert not Limits()
    assert Limits(max_drop=0.0)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_the_expected_agreement_of_few_samples_is_what_many_samples_count(of: str, noise: float) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(0, 2, (20_000, 30))
    y = x + generator.normal(0, noise, x.shape)
    if of == "probabilities":
        x, y = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in (x, y))
    counted = float((x.argmax(1) == y.argmax(1)).mean())
    few = Margins()
    few.update(x[:400], y[:400])
    assert few.expected_agreement() == pytest.approx(counted, abs=0.02)


def test_a_shift_of_all_scores_changes_no_decision() -> None:
    scores = np.random.default_rng(4).normal(0, 1, (50, 10))
    margins = Margins()
    margins.update(scores, scores + 3.0)
    assert margins.expected_agreement() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("count", range(1, 20))
def test_the_expected_agreement_of_sure_samples_is_no_more_than_all(count: int) -> None:
    x = np.zeros((count, 4))
    x[:, 0] = 1000
    margins = Margins()
    margins.update(x, x + np.random.default_rng(0).normal(size=x.shape))
    assert 1 - 1e-12 <= margins.expected_agreement() <= 1


def test_the_steps_are_told_with_what_they_cost_in_time() -> None:
    mixed = {
        "max_drop": None,
        "min_agreement": 0.99,
        "min_sqnr": None,
        "unit": "points of top-1",
        "precision": "float",
        "reverted": ["conv"],
        "steps": [
            {"reverted": None, "agreement": 0.9812, "noise": 0.01, "drop": 2.0},
            {"reverted": "conv", "agreement": None, "noise": 0.0, "drop": None},
        ],
    }
    times = [{"median_ms": 2.0, "noisy": False}, {"median_ms": 2.345, "noisy": True}]
    report = {"quantization": {"mixed": mixed, "measured": {"mixed": {"tflite": times}}}}
    assert mixed_rows(report) == [
        "mixed precision (min_agreement = 0.99): 1 layer back to float",
        "layer            agreement     SQNR  drop (points of top-1)         tflite",
        "all in integers    98.12 %  20.0 dB                   +2.00           2 ms",
        "conv                     -    equal                       -  2.35 ms noisy",
    ]
    assert mixed_rows({"quantization": {}}) == []
