"""An observer that represents what the user said, whatever it sees."""

from __future__ import annotations

from edgeship.calibration.types import Array, Observer, TensorSpec


class Pinned:
    """Represents a given range; `exact`: nobody may choose another scale for it."""

    def __init__(self, low: float, high: float, *, exact: bool = False) -> None:
        self._range = (low, high)
        self.exact = exact

    def update(self, values: Array) -> None:
        """Nothing changes."""

    def merge(self, other: Observer) -> None:
        """Nothing changes."""

    def range(self) -> tuple[float, float]:
        """The given range."""
        return self._range


def pinned_scale(scale: float, zero_point: int, spec: TensorSpec) -> Pinned:
    """An observer whose range has just these parameters under `spec`."""
    return Pinned((spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale, exact=True)
