"""Returns the picture of what accuracy costs: every variant by its accuracy and its latency or size, and the best ones.

A variant is on the Pareto front when no other is at least as good in both and better in one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgeship.pipeline.reporting import svg

WIDTH, HEIGHT = 440.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 18.0, 26.0, 46.0
RADIUS = 6.0
FARTHEST = 9
"""Lines that a label may stand away from its mark."""
LINE = 14.0


@dataclass(frozen=True)
class Variant:
    """One artifact: of which target (`series` numbers them), whether fp32, its cost and its quality."""

    name: str
    series: int
    is_float: bool
    cost: float
    quality: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Question:
    """What the axes are called, and how a cost is said."""

    title: str
    cost: str
    quality: str
    unit: float
    """A cost is shown divided by this."""
    limits: tuple[float, float] = (0.0, 100.0)
    """No quality lies beyond."""


def pareto_front(variants: Sequence[Variant]) -> list[Variant]:
    """The variants that no other beats, cheapest first."""
    front: list[Variant] = []
    for each in sorted(variants, key=lambda v: (v.cost, -v.quality)):
        if not front or each.quality > front[-1].quality:
            front.append(each)
    return front


def tradeoff_chart(variants: Sequence[Variant], question: Question) -> Markup:
    """The scatter plot: filled marks are quantized, hollow ones fp32; whiskers are 95 % intervals."""
    x, y = _scales(variants, question)
    parts = [_axes(x, y, question)]
    front = pareto_front(variants)
    parts.append(svg.path(_stairs([(x(v.cost / question.unit), y(v.quality)) for v in front]), "front"))
    places = [(x(v.cost / question.unit), y(v.quality)) for v in variants]
    labels = _place_labels(places, [v.name for v in variants])
    for variant, place, label in zip(variants, places, labels, strict=True):
        parts.append(_mark(variant, place, y, label, question))
    said = ", ".join(f"{v.name}: {v.quality:.2f} at {v.cost / question.unit:.3g}" for v in variants)
    return svg.drawing(WIDTH, HEIGHT, f"{question.title}. {said}", *parts)


def _scales(variants: Sequence[Variant], question: Question) -> tuple[svg.Scale, svg.Scale]:
    most = max(v.cost for v in variants) / question.unit
    lows = [v.interval[0] if v.interval else v.quality for v in variants]
    highs = [v.interval[1] if v.interval else v.quality for v in variants]
    low, high = min(lows), max(highs)
    margin = max((high - low) * 0.12, 0.05)
    return (
        svg.Scale(0.0, most * 1.12 or 1.0, LEFT, WIDTH - RIGHT),
        svg.Scale(
            max(low - margin, question.limits[0]),
            min(high + margin, question.limits[1] + margin / 2),
            HEIGHT - BOTTOM,
            TOP,
        ),
    )


def _axes(x: svg.Scale, y: svg.Scale, question: Question) -> Markup:
    parts = []
    ticks = [tick for tick in svg.round_ticks(y.low, y.high, 5) if tick <= question.limits[1]]
    for tick, label in zip(ticks, svg.tick_labels(ticks), strict=True):
        parts += [
            svg.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            svg.text(LEFT - 8, y(tick) + 4, label, "end"),
        ]
    ticks = svg.round_ticks(x.low, x.high, 5)
    for tick, label in zip(ticks, svg.tick_labels(ticks), strict=True):
        parts += [
            svg.line(x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 5, "axis"),
            svg.text(x(tick), HEIGHT - BOTTOM + 19, label, "middle"),
        ]
    parts += [
        svg.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"),
        svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, question.cost, "middle", "name"),
        svg.text(4, 13, question.quality, class_="name"),
    ]
    return svg.group(parts)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front's outline: the quality one gets for each cost, from none to the best."""
    outline = [(points[0][0], HEIGHT - BOTTOM), points[0]]
    for (_, y0), (x1, y1) in itertools.pairwise(points):
        outline += [(x1, y0), (x1, y1)]
    return [*outline, (WIDTH - RIGHT, points[-1][1])]


def _mark(
    variant: Variant, place: tuple[float, float], y: svg.Scale, label: tuple[float, float, str], question: Question
) -> Markup:
    px, py = place
    parts = []
    if variant.interval:
        low, high = y(variant.interval[0]), y(variant.interval[1])
        parts += [
            svg.line(px, low, px, high, "whisker"),
            *(svg.line(px - 4, end, px + 4, end, "whisker") for end in (low, high)),
        ]
    kind = "mark hollow" if variant.is_float else "mark"
    parts += [svg.element("circle", cx=px, cy=py, r=RADIUS, class_=kind), svg.text(*label[:2], variant.name, label[2])]
    told = f"{variant.name}: {variant.quality:.2f}, {variant.cost / question.unit:.4g} {question.cost}"
    return svg.group(parts, told, f"series-{variant.series % 6}")


def _place_labels(places: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """Where each label goes: beside its mark, on the side and at the height where it covers nothing."""
    boxes = [(px - RADIUS, py - RADIUS, px + RADIUS, py + RADIUS) for px, py in places]
    labels = []
    for (px, py), name in zip(places, names, strict=True):
        width = len(name) * svg.CHARACTER
        choices = []
        for shift in sorted(range(-FARTHEST, FARTHEST + 1), key=lambda lines: (abs(lines), -lines)):
            base = py + 4 + shift * LINE
            choices += [(px + 11, base, "start"), (px - 11, base, "end")]
        chosen = next((c for c in choices if _is_free(_box(c, width), boxes)), choices[0])
        boxes.append(_box(chosen, width))
        labels.append(chosen)
    return labels


def _box(label: tuple[float, float, str], width: float) -> tuple[float, float, float, float]:
    x, base, anchor = label
    left = x if anchor == "start" else x - width
    return left, base - 10, left + width, base + 3


def _is_free(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]]) -> bool:
    left, top, right, bottom = box
    inside = left >= LEFT and right <= WIDTH - 2 and top >= TOP - 8 and bottom <= HEIGHT - BOTTOM
    return inside and not any(left < r and l_ < right and top < b and t < bottom for l_, t, r, b in taken)
