"""Returns the steps of mixed precision as rows: what each layer that went back brought, and what it costs in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ALL_INTEGERS = "all in integers"


def mixed_heading(facts: Mapping[str, Any]) -> str:
    """What was asked for, and how many layers that took."""
    keys = ("max_drop", "min_agreement", "min_sqnr")
    asked = ", ".join(f"{key} = {facts[key]:g}" for key in keys if facts.get(key) is not None)
    count = len(facts["reverted"])
    layers = "no layer" if not count else "1 layer" if count == 1 else f"{count} layers"
    return f"mixed precision ({asked}): {layers} back to {facts['precision']}"


def mixed_table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of column names, then one for each step; the latencies are those of the model up to and with the step."""
    facts = report["quantization"]["mixed"]
    prices = report["quantization"].get("measured", {}).get("mixed", {})
    rows = [("layer", "agreement", "SQNR", f"drop ({facts['unit']})", *prices)]
    for place, step in enumerate(facts["steps"]):
        name = step["reverted"] or ALL_INTEGERS
        times = [_milliseconds(prices[target], place) for target in prices]
        rows.append((name, _share(step.get("agreement")), _sqnr(step["noise"]), _points(step["drop"]), *times))
    return rows


def mixed_rows(report: Mapping[str, Any]) -> list[str]:
    """The same as lines of text; none where nothing was mixed."""
    if "mixed" not in report.get("quantization", {}):
        return []
    rows = mixed_table(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return [mixed_heading(report["quantization"]["mixed"]), *lines]


def _milliseconds(times: Sequence[Mapping[str, Any]], place: int) -> str:
    if place >= len(times):
        return "-"
    noisy = " noisy" if times[place]["noisy"] else ""
    return f"{times[place]['median_ms']:.3g} ms{noisy}"


def _share(agreement: float | None) -> str:
    return "-" if agreement is None else f"{100 * agreement:.2f} %"


def _sqnr(noise: float | None) -> str:
    if noise is None:
        return "-"
    return "equal" if noise <= 0 else f"{-10 * math.log10(noise):.1f} dB"


def _points(drop: float | None) -> str:
    return "-" if drop is None else f"{drop:+.2f}"
