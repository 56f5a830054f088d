"""Gates judge values that were measured; a gate nobody sets is not one, and one that cannot be measured is not met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeship.pipeline.gates import Gate, figure, judge_gates
from edgeship.pipeline.recipe import Recipe, load_recipe
from edgeship.pipeline.recipe_sections import GATES

MEASURED: dict[str, Any] = {
    "convert": {"bytes": 1000},
    "parity": {
        "max_steps": 2.0,
        "mean_steps": 0.1,
        "agreement": 0.99,
        "int8_share": 0.95,
        "saturation": {"layers_clipping": 1},
    },
    "accuracy": {
        "drop": 0.5,
        "top1": 84.0,
        "fp32_agreement": 0.98,
        "outputs": {"a": {"max_abs": 0.1, "sqnr_db": 35.0}, "b": {"max_abs": 0.0, "sqnr_db": None}},
    },
    "latency": {"speedup": 1.5, "int8": {"median_ms": 8.0}},
}

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(**gates: float) -> Recipe:
        path = tmp_path / "recipe.toml"
        lines = "\n".join(f'"{name.replace("__", ".")}" = {limit}' for name, limit in gates.items())
        path.write_text(f'name = "tiny"\nmodel.source = "m.onnx"\n[targets.onnxruntime]\n[gates]\n{lines}\n')
        return load_recipe(path)

    return build


def judged(recipe: Recipe, measured: dict[str, Any] | None = None) -> dict[str, Gate]:
    gates = judge_gates(recipe, "onnxruntime", MEASURED if measured is None else measured)
    return {gate.name: gate for gate in gates}


def test_without_gates_everything_is_good_enough(make: Make) -> None:
    assert judged(make()) == {}


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("accuracy.max_drop", 0.5, 0.4),
        ("accuracy.min_top1", 84.0, 84.1),
        ("accuracy.min_agreement", 0.98, 0.99),
        ("accuracy.min_sqnr", 35.0, 35.1),
        ("parity.max_steps", 2, 1.9),
        ("parity.mean_steps", 0.1, 0.09),
        ("parity.min_agreement", 0.99, 0.991),
        ("parity.max_saturated_layers", 1, 0),
        ("latency.min_speedup", 1.5, 1.6),
        ("latency.max_median_ms", 8.0, 7.9),
        ("size.max_bytes", 1000, 999),
        ("int8_share.min", 0.95, 0.96),
    ],
)
def test_each_gate_is_met_at_its_limit_and_not_beyond(make: Make, name: str, met: float, missed: float) -> None:
    assert judged(make(**{name: met}))[name].met
    assert not judged(make(**{name: missed}))[name].met


def test_every_gate_a_recipe_may_set_can_be_judged(make: Make) -> None:
    gates = judged(make(**dict.fromkeys(GATES, 1.0)))
    assert set(gates) == set(GATES)
    assert all(gate.measured is not None for gate in gates.values())


def test_a_gate_that_cannot_be_measured_is_not_met_and_says_so(make: Make) -> None:
    measured = {**MEASURED, "accuracy": {"n": 10, "fp32_agreement": 0.9}}
    gate = judged(make(**{"accuracy.max_drop": 1.0}), measured)["accuracy.max_drop"]
    assert not gate.met
    assert (
        str(gate) == "onnxruntime: accuracy.max_drop is not measurable: it needs labelled samples and a classifier, "
        "accepted: at most 1"
    )


def test_gates_on_stages_that_did_not_run_are_left_out(make: Make) -> None:
    recipe = make(**{"accuracy.max_drop": 1.0, "size.max_bytes": 5000})
    assert set(judged(recipe, {"convert": MEASURED["convert"]})) == {"size.max_bytes"}


def test_a_parity_gate_implies_that_nothing_clips(make: Make) -> None:
    clipping = {**MEASURED, "parity": {**MEASURED["parity"], "saturation": {"layers_clipping": 3}}}
    gates = judged(make(**{"parity.max_steps": 2}), clipping)
    assert gates["parity.max_steps"].met
    assert not gates["parity.max_saturated_layers"].met
    allowed = judged(make(**{"parity.max_steps": 2, "parity.max_saturated_layers": 3}), clipping)
    assert allowed["parity.max_saturated_layers"].met


def test_a_target_that_cannot_clip_has_no_implied_gate(make: Make) -> None:
    measured = {**MEASURED, "parity": {**MEASURED["parity"], "saturation": None}}
    assert set(judged(make(**{"parity.max_steps": 2}), measured)) == {"parity.max_steps"}


def test_a_limit_computed_in_binary_fractions_is_met(make: Make) -> None:
    measured = {**MEASURED, "accuracy": {"drop": 100 * (3 - 2) / 100 + 1e-14, "top1": 84.0}}
    assert judged(make(**{"accuracy.max_drop": 1.0}), measured)["accuracy.max_drop"].met


@pytest.mark.parametrize(("largest", "met"), [(0.0, True), (0.1, False)], ids=["equal outputs", "noise without signal"])
def test_outputs_without_a_ratio_are_good_only_where_nothing_differs(make: Make, largest: float, met: bool) -> None:
    measured = {"accuracy": {"outputs": {"a": {"max_abs": largest, "sqnr_db": None}}}}
    gate = judged(make(accuracy__min_sqnr=30.0), measured)["accuracy.min_sqnr"]
    assert gate.met is met
    assert gate.to_json()["measured"] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [(0.999984, 1, "0.99998"), (1.0, 1, "1"), (0.123456, 1, "0.1235"), (2.00004, 2, "2.00004"), (1e-9, 1e-9, "1e-09")],
)
def test_a_value_is_written_so_that_it_differs_from_a_limit_that_it_is_not(
    value: float, limit: float, text: str
) -> None:
    assert figure(value, limit) == text
