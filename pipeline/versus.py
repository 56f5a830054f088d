"""Returns how model B does against model A on the same samples: outputs, decisions, right answers and bytes.

Limits say what B may cost against A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.compare import Comparison
from edgeship.pipeline.gates import ROUNDING, figure, worst_sqnr
from edgeship.pipeline.scoring import Score, class_scores, drop_of
from edgeship.pipeline.source_files import model_bytes

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Sample
    from edgeship.calibration.types import Array


@dataclass(frozen=True)
class Limits:
    """What B may cost against A; None: no limit.

    `max_drop`: points of top-1 lost. `min_agreement`: share of equal decisions. `min_sqnr`: dB of the worst output.
    `max_steps`: quantization steps at any output. `max_growth`: percent of the file's bytes.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None
    max_steps: float | None = None
    max_growth: float | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def judge(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each limit with what was measured (null: cannot be told, or infinite) and whether it is met."""
        steps = [output["max_steps"] for output in facts["outputs"].values()]
        accuracy, size = facts["accuracy"], facts["bytes"]
        measured = {
            "max_drop": accuracy and accuracy["drop"],
            "min_agreement": facts["agreement"],
            "min_sqnr": worst_sqnr(facts),
            "max_steps": None if None in steps else max(steps, default=None),
            "max_growth": size and 100 * (size["b"] / size["a"] - 1),
        }
        return [
            {"name": name, "limit": limit, "measured": _plain(value), "met": _is_met(name, limit, value)}
            for name, value in measured.items()
            if (limit := getattr(self, name)) is not None
        ]


def _is_met(name: str, limit: float, value: float | None) -> bool:
    if value is None:
        return False
    return value >= limit - ROUNDING if name.startswith("min_") else value <= limit + ROUNDING


def _plain(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def limit_text(each: Mapping[str, Any]) -> str:
    """One judged limit in words."""
    relation = "at least" if each["name"].startswith("min_") else "at most"
    nothing = "no difference" if each["met"] else "cannot be told"
    seen = nothing if each["measured"] is None else figure(each["measured"], each["limit"])
    return f"{each['name'].replace('_', '-')} is {seen}, accepted: {relation} {each['limit']:g}"


class Versus:
    """Two models on the same samples, one sample at a time."""

    def __init__(self, steps: Mapping[str, float]) -> None:
        self._comparison = Comparison(steps)
        self._a, self._b = Score(), Score()
        self._scored = True

    def update(self, a: Mapping[str, Array], b: Mapping[str, Array], sample: Sample) -> None:
        """Takes in what both made of one sample."""
        self._comparison.update(a, b)
        ours, theirs = class_scores(a), class_scores(b)
        if sample.label is None or ours is None or theirs is None or not 0 <= sample.label < ours.size:
            self._scored = False
        if self._scored and ours is not None and theirs is not None and sample.label is not None:
            self._a.update(ours, sample.label, sample.name)
            self._b.update(theirs, sample.label, sample.name)

    def facts(self, a: Path, b: Path) -> dict[str, Any]:
        """Everything as plain values; `accuracy` and `bytes` are null where there is nothing to tell."""
        sizes = {"a": _bytes(a), "b": _bytes(b)}
        accuracy = (
            {"a": self._a.to_json(), "b": self._b.to_json(), **drop_of(self._b, self._a)} if self._scored else None
        )
        return {
            "a": str(a),
            "b": str(b),
            "samples": self._comparison.samples,
            "agreement": self._comparison.agreement,
            "outputs": {name: each.to_json() for name, each in self._comparison.differences().items()},
            "accuracy": accuracy,
            "bytes": None if None in sizes.values() else sizes,
        }


def _bytes(model: Path) -> int | None:
    """The model's size; None for a recipe, which has no file of its own."""
    return None if model.suffix == ".toml" else model_bytes(model)


def check_limits(limits: Limits, facts: Mapping[str, Any]) -> None:
    """Raises InputError for a limit on accuracy where the samples, or the outputs, have no classes."""
    if limits.max_drop is not None and facts["accuracy"] is None:
        raise InputError(
            "--max-drop: right answers cannot be counted; accepted: samples with classes (class folders, the column "
            "label, --labels) that the models' output of shape (1, classes) has"
        )


def described(facts: Mapping[str, Any]) -> str:
    """The facts as lines for a person."""
    lines = [f"{facts['b']} against {facts['a']} on {facts['samples']} samples"]
    width = max(len(name) for name in facts["outputs"])
    for name, values in facts["outputs"].items():
        unit = "steps" if values["step_kind"] == "quantized" else "of 255 parts of its range"
        steps = "no step to count in" if values["max_steps"] is None else f"max {values['max_steps']:.3g} {unit}"
        lines.append(
            f"  {name:<{width}}  max {values['max_abs']:.3g}, mean {values['mean_abs']:.3g}, SQNR {_sqnr(values)}, "
            f"cosine {values['cosine']:.6f}, {steps}"
        )
    if facts["agreement"] is not None:
        lines.append(f"  same decision: {100 * facts['agreement']:.2f} %")
    if facts["accuracy"] is not None:
        found = facts["accuracy"]
        low, high = found["drop_interval"]
        lines.append(
            f"  top-1 {found['a']['top1']:.2f} % -> {found['b']['top1']:.2f} %, drop {found['drop']:+.2f} points "
            f"(95 %: {low:+.2f} .. {high:+.2f})"
        )
    if facts["bytes"] is not None:
        lines.append(f"  {_growth(facts['bytes'])}")
    lines += [f"  {'met' if each['met'] else 'NOT MET'}: {limit_text(each)}" for each in facts["limits"]]
    return "\n".join(lines)


def _sqnr(values: Mapping[str, Any]) -> str:
    if values["sqnr_db"] is not None:
        return f"{values['sqnr_db']:.1f} dB"
    return "equal" if not values["max_abs"] else "none: the reference never moves"


def _growth(sizes: Mapping[str, int]) -> str:
    from edgeship.pipeline.summary import size

    change = 100 * (sizes["b"] / sizes["a"] - 1)
    return f"size {size(sizes['a'])} -> {size(sizes['b'])} ({change:+.1f} %)"
