"""Returns pictures of how values are distributed: inference times, and calibrated tensors beside their chosen range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from edgeship.pipeline.reporting import svg
from edgeship.pipeline.reporting.facts import Facts

WIDTH = 440.0
LEFT, RIGHT = 12.0, 12.0
ROW = 74.0
COLUMNS = 60
TAIL = 0.97
FENCE = 6.0
"""The axis ends behind this share of the times, or so many interquartile ranges above the third quartile, whichever is
less; the slower times are counted, not drawn."""
SMALL_WIDTH, SMALL_HEIGHT = 240.0, 78.0


@dataclass(frozen=True)
class Times:
    """The times of one artifact in milliseconds."""

    name: str
    is_float: bool
    series: int
    milliseconds: Sequence[float]


def latency_chart(rows: Sequence[Times], title: str) -> Markup:
    """One row of bars for each artifact on a common axis, with its median and 90th percentile."""
    every = [np.asarray(row.milliseconds) for row in rows]
    low = min(float(times.min()) for times in every)
    high = max(_end(times) for times in every)
    pad = max((high - low) * 0.06, high * 0.005, 1e-9)
    x = svg.Scale(max(low - pad, 0.0), high + pad, LEFT, WIDTH - RIGHT)
    height = ROW * len(rows) + 44
    parts = [_latency_row(row, times, x, place) for place, (row, times) in enumerate(zip(rows, every, strict=True))]
    ticks = svg.round_ticks(x.low, x.high, 5)
    base = ROW * len(rows) + 6
    parts += [svg.line(LEFT, base, WIDTH - RIGHT, base, "axis")]
    for tick, label in zip(ticks, svg.tick_labels(ticks), strict=True):
        parts += [svg.line(x(tick), base, x(tick), base + 5, "axis"), svg.text(x(tick), base + 18, label, "middle")]
    parts += [svg.text(WIDTH / 2, base + 34, "milliseconds for one inference", "middle", "name")]
    said = ", ".join(f"{row.name}: median {np.median(t):.3g} ms" for row, t in zip(rows, every, strict=True))
    return svg.drawing(WIDTH, height, f"{title}. {said}", *parts)


def _end(times: np.ndarray) -> float:
    first, third, tail = np.quantile(times, (0.25, 0.75, TAIL))
    return float(min(tail, third + FENCE * (third - first)))


def _latency_row(row: Times, times: np.ndarray, x: svg.Scale, place: int) -> Markup:
    counts, edges = np.histogram(times, COLUMNS, (x.low, x.high))
    base = ROW * (place + 1)
    tall = svg.Scale(0, max(int(counts.max()), 1), base, base - ROW + 30)
    bars = [
        svg.element(
            "rect",
            x=x(float(left)) + 0.4,
            y=tall(int(count)),
            width=max(x(float(right)) - x(float(left)) - 0.8, 0.5),
            height=base - tall(int(count)),
            class_="bar hollow" if row.is_float else "bar",
        )
        for count, left, right in zip(counts, edges, edges[1:], strict=False)
        if count
    ]
    median, p90 = float(np.median(times)), float(np.quantile(times, 0.9))
    slower = int((times > x.high).sum())
    note = f"median {median:.3g}, 90th percentile {p90:.3g}" + (f", {slower} slower not drawn" if slower else "")
    parts = [
        svg.text(LEFT, base - ROW + 20, row.name, class_="name"),
        svg.text(WIDTH - RIGHT, base - ROW + 20, note, "end"),
        *bars,
        svg.line(x(median), base - ROW + 28, x(median), base, "median"),
        svg.line(x(p90), base - ROW + 40, x(p90), base, "percentile"),
        svg.line(LEFT, base, WIDTH - RIGHT, base, "grid"),
    ]
    return svg.group(parts, f"{row.name}: {note} ms, {times.size} inferences", f"series-{row.series % 6}")


def silhouette_chart(name: str, values: Facts, chosen: tuple[float, float] | None) -> Markup:
    """A tensor's values (heights are square roots of counts) and the range that its integers represent, shaded."""
    bins = _bins(values)
    low = min([values.number("low") or 0.0, *(chosen or ()), *(b[0] for b in bins[:1])])
    high = max([values.number("high") or 0.0, *(chosen or ()), *(b[1] for b in bins[-1:])])
    x = svg.Scale(low, high if high > low else low + 1.0, 6, SMALL_WIDTH - 6)
    base, top = SMALL_HEIGHT - 18, 8.0
    beside_zero = [count / (right - left) for left, right, count in bins if not left <= 0 < right]
    densest = max(beside_zero, default=0.0) or 1.0  # after a ReLU most values are zero: that bar is cut off
    y = svg.Scale(0, math.sqrt(densest), base, top)
    parts = []
    if chosen:
        left, right = x(chosen[0]), x(chosen[1])
        parts += [
            svg.element("rect", x=left, y=top - 4, width=max(right - left, 1.0), height=base - top + 4, class_="range"),
            *(svg.line(end, top - 4, end, base, "limit") for end in (left, right)),
        ]
    outline = [(x(low), base)]
    for left_end, right_end, count in bins:
        height = y(math.sqrt(count / (right_end - left_end)))
        outline += [(x(left_end), height), (x(right_end), height)]
    parts += [
        svg.path([*outline, (outline[-1][0], base)], "silhouette", closed=True),
        svg.line(6, base, SMALL_WIDTH - 6, base, "axis"),
        *(svg.line(x(end), base - 3, x(end), base + 3, "axis") for end in {low, 0.0, high}),
        svg.text(6, SMALL_HEIGHT - 4, _short(low)),
        svg.text(SMALL_WIDTH - 6, SMALL_HEIGHT - 4, _short(high), "end"),
    ]
    if x(0.0) > 60 and x(0.0) < SMALL_WIDTH - 60:
        parts.append(svg.text(x(0.0), SMALL_HEIGHT - 4, "0", "middle"))
    said = f"values of {name} from {_short(values.number('low') or 0)} to {_short(values.number('high') or 0)}"
    covered = f", integers represent {_short(chosen[0])} to {_short(chosen[1])}" if chosen else ""
    return svg.drawing(SMALL_WIDTH, SMALL_HEIGHT, said + covered, *parts, class_="small")


def _bins(values: Facts) -> list[tuple[float, float, float]]:
    """(from, to, count) from the lowest bin to the highest; see Silhouette.to_json."""
    width = values.number("width")
    if not width or width <= 0:
        return []
    above = [((i + 1) * width, (i + 2) * width, n) for i, n in enumerate(values.numbers("above"))]
    below = [(-(i + 2) * width, -(i + 1) * width, n) for i, n in enumerate(values.numbers("below"))]
    zero = (-width if (values.number("low") or 0) < 0 else 0.0, width, values.number("zero") or 0.0)
    return [*reversed(below), zero, *above]


def outside(values: Facts, chosen: tuple[float, float], step: float) -> float | None:
    """The share of the counted values that clip: more than half a step outside; of a bin that is cut, its part."""
    low, high = chosen[0] - step / 2, chosen[1] + step / 2
    if low <= (values.number("low") or 0.0) and high >= (values.number("high") or 0.0):
        return 0.0
    bins = _bins(values)
    total = sum(count for *_, count in bins)
    inside = 0.0
    for left, right, count in bins:
        overlap = min(right, high) - max(left, low)
        inside += count * min(max(overlap / (right - left), 0.0), 1.0)
    return 1 - inside / total if total else None


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
