"""How far the ranges still move as samples come in: whether more of them would change anything.

The ranges are looked at at eight places of the pass. A range has settled at the first look from which on its length
stays within 10 % of the last one: samples before that would have chosen another scale, by that much or more.

Extremes of few samples hardly ever settle to the last tenth, and a tenth costs a sixth of a bit. So it is remarked upon
only where the second half of the samples moved a range by more than a quarter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeship.calibration.observing.collect import Progress
from edgeship.calibration.types import Finding, Observer
from edgeship.calibration.values.ranges import NOTHING

LOOKS = 8
MOVED = 0.10
ENOUGH = 0.5
"""Converged: nothing moved in this last share of the samples."""
REMARKABLE = 0.25
"""A range that this last share moved by more than this is a finding."""


@dataclass(frozen=True)
class Convergence:
    """After how many of `samples` no range moved any more, and the tensors that moved last, with by how much.

    `moving`: by tensor how much longer the range is in the end than it was at the last look before `settled`, as a
    share of it. `late`: the most that any range was moved by the last half of the samples, likewise.
    """

    samples: int
    settled: int
    moving: Mapping[str, float]
    late: float = 0.0

    @property
    def converged(self) -> bool:
        """Whether nothing moved in the last half of the samples."""
        return self.settled <= (1 - ENOUGH) * self.samples

    def __str__(self) -> str:
        if not self.samples:
            return "unknown: no samples were looked at"
        if self.converged:
            return (
                f"converged: the last {self.samples - self.settled} of {self.samples} samples moved no range by more "
                f"than {100 * MOVED:.0f} %; more samples would change nothing"
            )
        worst = sorted(self.moving.items(), key=lambda item: (-item[1], item[0]))[:3]
        named = ", ".join(f"{name} {100 * change:+.0f} %" for name, change in worst)
        if self.late <= REMARKABLE:
            return (
                f"nearly converged: after {self.settled} of {self.samples} samples ranges still moved a little "
                f"({named}); more samples would change little"
            )
        return (
            f"not converged: after {self.settled} of {self.samples} samples ranges still moved ({named}); "
            "give more samples, or an algorithm that is less sensitive to extremes"
        )

    def findings(self) -> list[Finding]:
        """A note where the ranges still move by much."""
        if self.converged or self.late <= REMARKABLE:
            return []
        return [Finding("calibration data", str(self), "", "more samples", "note")]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "samples": self.samples,
            "settled": self.settled,
            "converged": self.converged,
            "summary": str(self),
            "moving": {name: round(change, 4) for name, change in sorted(self.moving.items())},
        }


class Watch:
    """Looks at the observers while samples are counted; hands the count on."""

    def __init__(self, observers: Mapping[str, Observer], progress: Progress | None) -> None:
        self._observers = observers
        self._progress = progress
        self._looks: list[tuple[int, dict[str, float]]] = []
        self._next = 0
        self.done = 0

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """`done` of `total` samples were seen."""
        self.done = done
        every = max(1, (total or done) // LOOKS)
        if done >= self._next or done == total:
            self._look()
            self._next = done + every
        if self._progress is not None:
            self._progress(done, total, what)

    def _look(self) -> None:
        ranges = {name: observer.range() for name, observer in self._observers.items()}
        self._looks.append((self.done, {name: high - low for name, (low, high) in ranges.items()}))

    def result(self) -> Convergence:
        """What was seen."""
        if not self._looks:
            return Convergence(self.done, self.done, {})
        settled, final = self._looks[-1]
        half = next(spans for done, spans in self._looks if done >= (1 - ENOUGH) * self.done)
        late = max((abs(_growth(half[name], span)) for name, span in final.items()), default=0.0)
        for done, spans in reversed(self._looks):
            moves = {name: _growth(span, final[name]) for name, span in spans.items()}
            moving = {name: growth for name, growth in moves.items() if abs(growth) > MOVED}
            if moving:
                return Convergence(self.done, settled, moving, late)
            settled = done
        return Convergence(self.done, 0, {}, late)


def _growth(span: float, final: float) -> float:
    """How much longer the final range is, as a share of it."""
    return (final - span) / final if final >= NOTHING else 0.0
