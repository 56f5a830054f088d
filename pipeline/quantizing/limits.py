"""Returns what a quantized model may cost at most on the calibration samples, and what of it a model exceeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edgeship.calibration.errors import StageError
from edgeship.pipeline.quantizing.yardstick import Cost

_SLACK = 1e-9


@dataclass(frozen=True)
class Limits:
    """The limits that are set; a field is None where it limits nothing.

    `max_drop` in points of top-1, or percent of other decisions; `min_agreement` 0..1; `min_sqnr` in dB.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return any(value is not None for value in asdict(self).values())

    def missed(self, cost: Cost, unit: str) -> list[str]:
        """One sentence for each limit that `cost` exceeds; `unit` is what its drop counts.

        Raises StageError where decisions are limited and the model makes none.
        """
        found = []
        if self.max_drop is not None and _decided(cost.drop, "max_drop") > self.max_drop + _SLACK:
            found.append(f"quantize.max_drop = {self.max_drop:g} cannot be met: the drop is {cost.drop:.4g} {unit}")
        if self.min_agreement is not None:
            agreement = _decided(cost.agreement, "min_agreement")
            if agreement < self.min_agreement - _SLACK:
                found.append(
                    f"quantize.min_agreement = {self.min_agreement:g} cannot be met: the agreement is {agreement:.4f}"
                )
        if self.min_sqnr is not None and cost.sqnr_db < self.min_sqnr:
            found.append(f"quantize.min_sqnr = {self.min_sqnr:g} cannot be met: the SQNR is {cost.sqnr_db:.2f} dB")
        return found

    def worth(self, cost: Cost) -> float:
        """What of a cost is to become less: with max_drop alone the task's loss where it is known, else the noise."""
        of_task = self.min_agreement is None and self.min_sqnr is None and cost.loss is not None
        return float(cost.loss) if of_task and cost.loss is not None else cost.noise


def _decided(value: float | None, limit: str) -> float:
    if value is None:
        raise StageError(
            f"quantize.{limit} counts decisions, and the model has none: no output of shape (n, classes); set "
            "quantize.min_sqnr, or pin layers with [[quantize.override]]"
        )
    return value
