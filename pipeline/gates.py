"""Returns whether what was measured is good enough: the recipe's gates against the values in the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import StageError

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

SATURATION = "parity.max_saturated_layers"
SQNR = "accuracy.min_sqnr"

_PLACES: Mapping[str, tuple[str, ...]] = {
    "accuracy.max_drop": ("accuracy", "drop"),
    "accuracy.min_top1": ("accuracy", "top1"),
    "accuracy.min_agreement": ("accuracy", "fp32_agreement"),
    SQNR: ("accuracy", "outputs"),
    "parity.max_steps": ("parity", "max_steps"),
    "parity.mean_steps": ("parity", "mean_steps"),
    "parity.min_agreement": ("parity", "agreement"),
    SATURATION: ("parity", "saturation", "layers_clipping"),
    "latency.min_speedup": ("latency", "speedup"),
    "latency.max_median_ms": ("latency", "int8", "median_ms"),
    "size.max_bytes": ("convert", "bytes"),
    "int8_share.min": ("parity", "int8_share"),
}
LOWER_LIMITS = {
    "accuracy.min_top1",
    "accuracy.min_agreement",
    SQNR,
    "parity.min_agreement",
    "latency.min_speedup",
    "int8_share.min",
}
"""The gates whose limit is the least that is accepted; the others' is the most."""
_NEEDS = {
    "accuracy.max_drop": "labelled samples and a classifier",
    "accuracy.min_top1": "labelled samples and a classifier",
    "accuracy.min_agreement": "a classifier",
}
ROUNDING = 1e-9
"""A drop of 1.0 points computed in binary fractions still meets a limit of 1.0."""


@dataclass(frozen=True)
class Gate:
    """One limit and what was measured.

    None when the model or its data cannot tell, and then the gate is not met; infinite where nothing differs from fp32.
    """

    target: str
    name: str
    limit: float
    measured: float | None
    met: bool

    def __str__(self) -> str:
        relation = "at least" if self.name in LOWER_LIMITS else "at most"
        why = f": it needs {_NEEDS[self.name]}" if self.name in _NEEDS else ""
        seen = f"not measurable{why}" if self.measured is None else figure(self.measured, self.limit)
        return f"{self.target}: {self.name} is {seen}, accepted: {relation} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        """Name, limit, measured value (null where there is none, or it is infinite) and whether it is met."""
        values = asdict(self)
        if self.measured is not None and not math.isfinite(self.measured):
            values["measured"] = None
        del values["target"]
        return values


def figure(value: float, limit: float) -> str:
    """The value in four digits, or in as many as tell it from a limit that it is not."""
    every = (f"{value:.{digits}g}" for digits in range(4, 17))
    return next((text for text in every if value == limit or float(text) != limit), repr(value))


def judge_gates(recipe: Recipe, target: str, measured: Mapping[str, Mapping[str, Any]]) -> list[Gate]:
    """Each gate of the recipe for one target; `measured` has the target's part of every stage's results that ran.

    Gates on a stage that did not run are left out. Limits of parity mean the artifact wherever it runs, so whoever sets
    one and not `parity.max_saturated_layers` has that gate at 0: on x86 without VNNI a saturating layer would differ.
    """
    limits = dict(recipe.gates)
    if any(name.startswith("parity.") for name in limits) and SATURATION not in limits:
        limits[SATURATION] = 0.0
    gates = []
    for name, limit in limits.items():
        stage, *path = _PLACES[name]
        if stage not in measured:
            continue
        value = worst_sqnr(measured[stage]) if name == SQNR else _look_up(measured[stage], path)
        if name == SATURATION and value is None and name not in recipe.gates:
            continue
        gates.append(Gate(target, name, limit, value, _is_met(name, limit, value)))
    return gates


def worst_sqnr(accuracy: Mapping[str, Any]) -> float | None:
    """The smallest signal to noise of an artifact's outputs against fp32, in dB; infinite where none differs.

    None where an output that differs has no signal.
    """
    ratios = []
    for output in accuracy.get("outputs", {}).values():
        ratio = math.inf if output.get("max_abs") == 0 else output.get("sqnr_db")
        if ratio is None:
            return None
        ratios.append(float(ratio))
    return min(ratios, default=None)


def _look_up(values: Any, path: Sequence[str]) -> float | None:
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return None if values is None else float(values)


def _is_met(name: str, limit: float, value: float | None) -> bool:
    if value is None:
        return False
    return value >= limit - ROUNDING if name in LOWER_LIMITS else value <= limit + ROUNDING


def read_results(folders: Mapping[str, Path], target: str) -> dict[str, dict[str, Any]]:
    """The target's part of every result there is: convert, parity, accuracy, latency; `folders` by stage name."""
    results: dict[str, dict[str, Any]] = {}
    for stage in ("convert", "parity", "accuracy", "latency"):
        if stage not in folders:
            continue
        values = read_json(folders[stage] / f"{stage}.json")["targets"].get(target)
        if values is not None:
            results[stage] = values
    return results


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file a stage wrote. Raises StageError when it is gone or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{path.name} of an earlier stage cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path.name} of an earlier stage holds no object")
    return values
