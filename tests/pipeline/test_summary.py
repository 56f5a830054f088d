"""The summary says what the report holds, in words a person uses, and warns before something bad ships."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgeship.pipeline.summary import form_rows, milliseconds, percent, print_summary, size, times_smaller

REPORT: dict[str, Any] = {
    "recipe": "digits",
    "model": {"name": "digits", "parameters": 61706, "macs": 416520},
    "stages": [
        {
            "name": "convert",
            "seconds": 1.25,
            "cached": False,
            "outputs": [
                {"path": "5-convert/convert.json", "bytes": 10},
                {"path": "5-convert/tflite/fp32.tflite", "bytes": 100},
                {"path": "5-convert/tflite/model.tflite", "bytes": 2048},
            ],
        },
        {"name": "parity", "seconds": 9.0, "cached": True, "outputs": []},
    ],
    "reference": {"accuracy": {"top1": 98.0, "n": 100}},
    "targets": {
        "tflite": {
            "artifact": "9-release/model.tflite",
            "bytes": 2048,
            "fp32_bytes": 8192,
            "int8_share": 1.0,
            "float_layers": [],
            "parity": {"max_steps": 1.0, "mean_steps": 0.01, "agreement": 0.9, "decisions": 1000, "saturation": None},
            "accuracy": {
                "top1": 97.0,
                "n": 100,
                "drop": 1.0,
                "drop_interval": [-1.0, 3.0],
                "fp32_agreement": 0.99,
            },
            "latency": {
                "fp32_median_ms": 2.0,
                "median_ms": 1.0,
                "p90_ms": 1.2,
                "speedup": 2.0,
                "noisy": False,
                "threads": 1,
                "runs": 200,
            },
            "gates": [
                {"name": "accuracy.max_drop", "limit": 0.5, "measured": 1.0, "met": False},
                {"name": "accuracy.min_top1", "limit": 90, "measured": None, "met": False},
                {"name": "parity.max_steps", "limit": 2, "measured": 1.0, "met": True},
            ],
        }
    },
}


def printed(report: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_summary(report, Path("build/digits"), Console(file=stream, width=110))
    return stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        *("61,706 parameters", "1.2 s", "tflite/model.tflite 2.0 KiB", "up to date", "(4.0x smaller)"),
        *("top-1 98.00 % -> 97.00 %", "drop +1.00 points, 95 %: -1.00 .. +3.00", "decides as fp32: 99.00 %"),
        *("max 1 steps, mean 0.01", "same decision: 90.00 % of 1,000", "2 ms -> 1 ms", "2.00x", "1 thread, 200 runs"),
        *(
            "100 % of MACs, as executed",
            "NOT MET accuracy.max_drop: 1 (limit 0.5)",
            "met parity.max_steps: 1 (limit 2)",
        ),
        *("accuracy.min_top1: not measurable", "build/digits/9-release/model.tflite"),
    ],
)
def test_everything_one_wants_to_know_is_said(text: str) -> None:
    assert text in printed(REPORT)


def test_brackets_in_names_are_printed_as_they_are() -> None:
    finding = {"where": "data", "rule": "twins", "seen": "[bold] 1.png = [/x] 2.png", "accepted": ""}
    report = {**REPORT, "quantization": {"data": {"findings": [finding]}}}
    stream = io.StringIO()
    print_summary(report, Path("[red]runs/digits"), Console(file=stream, width=110))
    assert "[red]runs/digits/9-release/model.tflite" in stream.getvalue()
    assert "twins: [bold] 1.png = [/x] 2.png" in stream.getvalue()


def test_what_is_only_compared_with_is_left_out() -> None:
    assert "fp32.tflite" not in printed(REPORT)
    assert "convert.json" not in printed(REPORT)


def test_a_run_that_stopped_early_has_a_summary_too() -> None:
    report = {**REPORT, "targets": {}, "reference": {}}
    assert "convert" in printed(report)


def test_layers_that_can_clip_and_float_layers_and_noise_are_warned_of() -> None:
    report = copy.deepcopy(REPORT)
    facts = report["targets"]["tflite"]
    layers = [{"layer": f"conv{n}", "channels": n, "pairs": 2, "clipped": 1, "sums": 9} for n in range(1, 6)]
    facts["parity"]["saturation"] = {"layers": layers, "layers_clipping": 4, "samples": 8}
    facts["float_layers"] = ["softmax"]
    facts["latency"]["noisy"] = True
    text = printed(report)
    assert "5 layers can clip on x86 without VNNI: conv1 (1 channels), conv2 (2 channels)" in text
    assert "and 2 more; 4 do on the samples" in text
    assert "executed in float: softmax" in text
    assert "measure again on a quiet machine" in text


def test_float_outputs_are_told_in_parts_of_their_range() -> None:
    report = copy.deepcopy(REPORT)
    parity = report["targets"]["tflite"]["parity"]
    parity["outputs"] = {"a": {"step_kind": "equivalent"}, "b": {"step_kind": "quantized"}}
    assert "max 1 steps, mean 0.01" in printed(report)
    parity["outputs"]["b"]["step_kind"] = "equivalent"
    assert "max 1 of 255 parts of the range, mean 0.01" in " ".join(printed(report).split())


@pytest.mark.parametrize(("interval", "told"), [([0.27, 0.39], True), ([0.9, 1.02], False), (None, False)])
def test_an_artifact_that_is_surely_slower_than_its_float_twin_is_warned_of(
    interval: list[float] | None, told: bool
) -> None:
    report = copy.deepcopy(REPORT)
    report["targets"]["tflite"]["latency"]["speedup_interval"] = interval
    assert ("slower than the float one on this machine (0.27 .. 0.39x)" in printed(report)) is told


def test_a_float_artifact_is_not_called_a_slow_quantized_one() -> None:
    report = copy.deepcopy(REPORT)
    report["quantization"] = {"mode": "none"}
    report["targets"]["tflite"]["latency"]["speedup_interval"] = [0.27, 0.39]
    assert "slower than the float one" not in printed(report)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (92_100, 49_900, "1.8x smaller"),
        (100, 230, "2.3x larger"),
        (92_136, 92_144, "as large"),
        (105, 100, "1.1x smaller"),
    ],
)
def test_sizes_are_compared_in_words(before: int, after: int, told: str) -> None:
    assert times_smaller(before, after) == told


def test_float_layers_are_grouped_by_the_reason_and_named_as_nodes() -> None:
    report = copy.deepcopy(REPORT)
    kept = [
        {"layer": f"t{n}/float", "node": f"conv{n} (Conv)", "reason": "the recipe keeps 'conv*' float"}
        for n in range(5)
    ]
    unknown = {"layer": "lstm", "node": None, "reason": None}
    report["targets"]["tflite"]["float_reasons"] = [*kept, kept[0], unknown]
    text = printed(report)
    assert "conv0 (Conv), conv1 (Conv), conv2 (Conv) and 2 more: the recipe keeps 'conv*' float" in text
    assert "tflite: executed in float: lstm\n" in text


def test_numbers_are_said_as_people_say_them() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.00 GiB"]
    assert [milliseconds(n) for n in (0.01234, 0.1234, 12.34)] == ["12.3 us", "0.123 ms", "12.3 ms"]
    assert [percent(n) for n in (1.0, 0.99999, 0.5)] == ["100.00 %", "> 99.99 %", "50.00 %"]


def test_the_form_that_was_found_by_measuring_is_said_with_how_many_were_tried() -> None:
    report = copy.deepcopy(REPORT)
    tried = [
        {"form": "full weights", "weights": "full", "keep_float": [], "lost": ""},
        {
            "form": "full weights, conv in float",
            "weights": "full",
            "keep_float": ["conv"],
            "lost": "slower: 2.00 times",
        },
    ]
    times = [
        {"name": "fp32", "median_ms": 3.0, "noisy": False},
        {"name": "full weights", "median_ms": 2.0, "noisy": True},
        {"name": "full weights, conv in float", "median_ms": 4.0, "noisy": False},
    ]
    report["quantization"] = {
        "scheme": {"targets": {"tflite": {"chosen": "full weights", "tried": tried}}},
        "measured": {"scheme": {"tflite": times}},
    }
    text = printed(report)
    assert "full weights, 1.50x float's speed" in text
    assert "fastest here of 2 tried" in text
    assert "tflite: the form was chosen by times that scatter" in " ".join(text.split())
    assert form_rows(report) == [
        "tflite: full weights: chosen",
        "tflite: full weights, conv in float: slower: 2.00 times",
    ]
