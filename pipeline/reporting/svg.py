"""Returns SVG as safe markup: elements whose attributes and texts are escaped, axes with round numbers.

Colours come from the page's style sheet (`currentColor` and classes), so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CHARACTER = 6.3
"""About the width of a character of the charts' 11 px text."""


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """One element; an attribute's `_` means `-`, and one that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(children)
    return Markup(f"<{name}{given}>{inside}</{name}>")  # noqa: S704 - every part is escaped or markup already


def drawing(width: float, height: float, label: str, *children: Markup, class_: str = "") -> Markup:
    """A whole picture; `label` tells those who cannot see it what it shows."""
    box = f"0 0 {_plain(width)} {_plain(height)}"
    return element("svg", *children, viewBox=box, role="img", aria_label=label, class_=f"chart {class_}".strip())


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """Text whose baseline begins, is centred or ends at a point."""
    shown = None if anchor == "start" else anchor
    return element("text", escape(content), x=x, y=y, text_anchor=shown, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("path", d=f"M{_plain(x1)} {_plain(y1)}L{_plain(x2)} {_plain(y2)}", class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points, or the area inside it."""
    steps = "L".join(f"{_plain(x)} {_plain(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def group(children: Iterable[Markup], title: str = "", class_: str | None = None) -> Markup:
    """Elements together; `title` is shown when one points at them."""
    told = [element("title", escape(title))] if title else []
    return element("g", *told, *children, class_=class_)


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value is, kept inside the axis."""
        span = (self.high - self.low) or 1.0
        share = (value - self.low) / span
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values that lie between `low` and `high`; a single one where they are equal."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as texts with equally many decimals."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(ticks[0]) if ticks else 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return [f"{tick:,.{min(decimals, 9)}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
