"""The first layer that diverges is named with the likely cause; saturation is counted where values leave a range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeship.pipeline.compare import OutputComparison
from edgeship.pipeline.explanation import RangeUse, Use, cause_of, explain
from edgeship.pipeline.layers import LayerDifference
from projects import run

Array = np.ndarray[Any, np.dtype[Any]]


def layer(name: str, error: float, use: Use | None = None, own: tuple[float, float] | None = None) -> LayerDifference:
    """A layer off by noise of amplitude `error` on values of size 1; `own`: steps that one and all are off by."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000).astype(np.float32)
    total = OutputComparison(name, 0.01)
    total.update(values, values + error * rng.normal(size=values.size).astype(np.float32))
    alone = None
    if own is not None:
        alone = OutputComparison(name, 0.01)
        off = np.full(values.size, own[1] * 0.01, np.float32)
        off[0] = own[0] * 0.01
        alone.update(values, values + off)
    return LayerDifference(name, "Conv", total.result(), None if alone is None else alone.result(), use)


def test_values_beyond_the_range_are_counted_and_those_at_its_end_are_not() -> None:
    use = RangeUse(-1.0, 1.0, 0.01)
    reference = np.array([0.5, 1.0, 1.005, 1.5, -3.0], np.float32)
    use.update(reference, np.clip(reference, -1, 1))
    result = use.result()
    assert (result.saturated, result.count) == (2, 5)
    assert result.spread == pytest.approx(float(reference.std()) / 0.01)


def test_the_first_layer_under_20_db_is_named_against_a_float_reference() -> None:
    layers = [layer("fine", 0.01), layer("bad", 0.3), layer("worse", 0.5)]
    (line,) = explain(layers, 2.0)
    assert line.startswith("first to diverge: bad (Conv)")
    assert explain(layers[:1], 2.0) == []


def test_the_first_layer_off_by_itself_is_named_against_a_quantized_reference() -> None:
    layers = [layer("fine", 0.3, own=(1, 0)), layer("bad", 0.3, own=(50, 40))]
    (line,) = explain(layers, 2.0)
    assert line == (
        "first to diverge: bad (Conv); likely cause: it computes something else from the same inputs: other weights or "
        "another kernel"
    )
    assert explain(layers[:1], 2.0) == []


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (
            layer("x", 0.3, Use(-1, 2, 500, 10_000, 40)),
            "5 % of its values lie beyond [-1, 2], the range that was chosen",
        ),
        (layer("x", 0.3, Use(-1, 100, 0, 10_000, 1.5)), "its typical values use 1.5 integers: a few extremes decide"),
        (layer("x", 0.3, Use(-1, 1, 0, 10_000, 40)), "the rounding of its own weights or output"),
        (layer("x", 0.3, None, own=(500, 0)), "few of its values are off, by much: channels that clip"),
    ],
)
def test_each_symptom_has_its_cause(seen: LayerDifference, cause: str) -> None:
    assert cause in cause_of(seen, [layer("before", 0.001), seen])


def test_noise_that_came_in_is_not_the_layers_own() -> None:
    seen = layer("x", 0.15)
    assert "accumulated in the layers before it" in cause_of(seen, [layer("before", 0.12), seen])


def test_a_layer_whose_range_was_chosen_on_other_data_is_found_by_the_command(
    tiny_models: dict[str, bytes], tiny_images: Array, tmp_path: Path
) -> None:
    model, out = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    model.write_bytes(tiny_models["plain"])
    np.savez(tmp_path / "dim.npz", image=0.05 * tiny_images)
    np.savez(tmp_path / "real.npz", image=tiny_images)
    quantized = run("quantize", model, "-o", out, "--data", tmp_path / "dim.npz", "--target", "onnxruntime")
    assert quantized.exit_code == 0, quantized.output
    result = run("compare", model, out, "--data", tmp_path / "real.npz", "--layers", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    first = facts["layers"][0]
    assert first["saturated"] > 100
    assert len(first["range"]) == 2
    (line,) = facts["explanation"]
    assert "first to diverge: first_relu (Relu)" in line
    assert "of its values lie beyond" in line
    table = run("compare", model, out, "--data", tmp_path / "real.npz", "--layers")
    assert line in table.output
    assert "cosine" in table.output


def test_quantize_ends_with_what_it_did_and_what_it_costs(
    tiny_models: dict[str, bytes], tiny_data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(tiny_models["plain"])
    result = run("quantize", model, "-o", tmp_path / "q.onnx", "--data", tiny_data)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("wrote ")
    assert lines[1] == "in integers: 3 of 3 layers, 100 % of the multiply-accumulates"
    assert lines[2].startswith("against the float model, on 16 of the samples it was calibrated on: outputs ")
    assert "converged" in lines[3]
    assert "edgeship evaluate" in lines[4]
