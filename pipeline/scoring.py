"""Returns how often predictions are right, with what certainty, and how two models differ on the same samples.

Wilson score interval (Wilson, 1927) with p = k/n and z = 1.96:
    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
Interval of a difference of paired proportions (Agresti and Min, 2005): half an observation is added to each of the four
cells of the 2x2 table, then b and c are the discordant cells and n the total:
    (b - c)/n +- z sqrt(b + c - (b - c)^2/n) / n
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array

Z = 1.959963984540054


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of a proportion, 0..1, which holds it. Raises ValueError for a total of zero."""
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no proportion")
    p = right / total
    middle = p + Z**2 / (2 * total)
    spread = Z * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    scale = 1 + Z**2 / total
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return min(p, max(0.0, low)), max(p, min(1.0, high))  # of none or all, one end is the proportion but for rounding


def paired_interval(lost: int, won: int, total: int) -> tuple[float, float]:
    """The 95 % interval (low, high) of `(lost - won) / total`, -1..1, for two models on the same samples."""
    b, c, n = lost + 0.5, won + 0.5, total + 2.0
    middle = (b - c) / n
    spread = Z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, middle - spread), min(1.0, middle + spread)


def label_problem(label: int, classes: int) -> str:
    """What is wrong with a label of a sample, and what is accepted."""
    return f"the label {label} is not among the model's {classes} classes, 0..{classes - 1}"


@dataclass
class Score:
    """Right answers of one model so far."""

    right: list[bool] = field(default_factory=list)
    right5: int = 0
    classes: int = 0

    def update(self, values: Array, label: int, sample: str = "") -> None:
        """Takes in one sample's class scores, shape (1, classes). Raises InputError for a label that is no class."""
        scores = np.asarray(values).reshape(-1)
        self.classes = scores.size
        if not 0 <= label < scores.size:
            where = f"sample {sample}: " if sample else ""
            raise InputError(f"{where}{label_problem(label, scores.size)}")
        best = np.argsort(-scores, kind="stable")[:5]
        self.right.append(bool(best[0] == label))
        self.right5 += int(label in best)

    @property
    def n(self) -> int:
        """How many samples were seen."""
        return len(self.right)

    @property
    def top1(self) -> float:
        """Percent of right first answers."""
        return 100 * sum(self.right) / self.n if self.n else 0.0

    @property
    def top5(self) -> float | None:
        """Percent of samples with the right class among the first five; None with five classes or fewer."""
        return 100 * self.right5 / self.n if self.n and self.classes > 5 else None

    def to_json(self) -> dict[str, Any]:
        """Percentages, the number of samples, and the 95 % interval of top-1."""
        low, high = wilson_interval(sum(self.right), self.n)
        return {"top1": self.top1, "top5": self.top5, "n": self.n, "interval": [100 * low, 100 * high]}


def drop_of(score: Score, reference: Score) -> dict[str, Any]:
    """The drop of top-1 against the reference on the same samples, in percentage points, with its 95 % interval."""
    lost = sum(was and not now for was, now in zip(reference.right, score.right, strict=True))
    won = sum(now and not was for was, now in zip(reference.right, score.right, strict=True))
    low, high = paired_interval(lost, won, score.n)
    return {
        "drop": 100 * (lost - won) / score.n,
        "drop_interval": [100 * low, 100 * high],
        "lost": lost,
        "won": won,
    }


def class_scores(outputs: Mapping[str, Array]) -> Array | None:
    """The output of shape (1, classes) that labels can be compared with; None when there is none."""
    from edgeship.pipeline.compare import classification_output

    name = classification_output({key: values for key, values in outputs.items() if values.ndim == 2})
    return None if name is None else outputs[name]
