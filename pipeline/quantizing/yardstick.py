"""Returns what a quantized model costs against its float model, on the same samples.

    drop:   percentage points of top-1 lost, with labels; without, percent of the decisions that are others
    loss:   with labels, the mean increase of the cross entropy, in nats: -log p(label), p = softmax of the outputs
    noise:  sum (x - y)^2 / sum (x - mean x)^2 over all outputs (10 log10 of it is minus the SQNR in dB)
    agreement:  the share of equal decisions; of a classifier the expected one (margins.py), of others the counted one

The decision costs (drop) count; the others are fine enough to rank layers that cost no decision at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.pipeline.compare import Comparison, classification_output
from edgeship.pipeline.quantizing.margins import Margins
from edgeship.pipeline.scoring import Score, class_scores, drop_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Array, Session

TINY = 1e-12
CLASSIFIER_RANK = 2
"""Of the scores of a model with one decision per sample; a detector's have an axis of anchors too."""


@dataclass(frozen=True)
class Cost:
    """What a quantized model costs; None where the model or its data cannot tell."""

    drop: float | None
    loss: float | None
    noise: float
    samples: int
    top1: float | None = None
    agreement: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the outputs, in dB; infinite where nothing differs."""
        return float("inf") if self.noise <= 0 else float(-10 * np.log10(self.noise))

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts models by what they cost, the dearest last: by the task where it is known, then by the outputs."""
        return (self.loss if self.loss is not None else 0.0, self.noise)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a noise without end, of outputs that never moved before, is null."""
        return {**asdict(self), "noise": self.noise if math.isfinite(self.noise) else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cost:
        """What `to_json` wrote. Raises KeyError or TypeError for anything else."""
        return cls(**{**values, "noise": math.inf if values["noise"] is None else values["noise"]})


class Yardstick:
    """A float model's outputs on samples, and what others differ from them by."""

    def __init__(
        self, reference: Session, samples: Samples, progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> None:
        """Runs the float model over all samples once."""
        self.samples = samples
        self._outputs: list[Mapping[str, Array]] = []
        self._digest = ""
        self._score = Score()
        self._entropy: list[float] = []
        for sample in samples:
            outputs = reference.run(sample.feeds)
            self._outputs.append(outputs)
            self._judge(outputs, sample.label, sample.name, self._score, self._entropy)
            progress(len(self._outputs), len(samples))

    @property
    def unit(self) -> str:
        """What `drop` counts."""
        return "points of top-1" if self._score.n else "percent of other decisions"

    def digest(self) -> str:
        """SHA-256 over the samples and the float outputs: what every cost depends on besides the quantized model."""
        if not self._digest:
            sha = hashlib.sha256(self.samples.digest().encode())
            for outputs in self._outputs:
                for name in sorted(outputs):
                    sha.update(np.ascontiguousarray(outputs[name]).tobytes())
            self._digest = sha.hexdigest()
        return self._digest

    def cost(self, session: Session) -> Cost:
        """What the model in `session` costs."""
        comparison, score, entropy, margins = Comparison(), Score(), list[float](), Margins()
        for sample, expected in zip(self.samples, self._outputs, strict=True):
            outputs = session.run(sample.feeds)
            comparison.update(expected, outputs)
            decided = classification_output(expected)
            if decided is not None and expected[decided].ndim == CLASSIFIER_RANK:
                margins.update(expected[decided], outputs[decided])
            self._judge(outputs, sample.label, sample.name, score, entropy)
        if score.n:
            drop: float | None = drop_of(score, self._score)["drop"]
        else:
            drop = None if comparison.agreement is None else 100 * (1 - comparison.agreement)
        top1 = score.top1 if score.n else None
        loss = float(np.mean(entropy) - np.mean(self._entropy)) if entropy else None
        agreement = margins.expected_agreement() if margins.seen else comparison.strict_agreement
        return Cost(drop, loss, _noise(comparison), len(self._outputs), top1, agreement)

    @staticmethod
    def _judge(outputs: Mapping[str, Array], label: int | None, name: str, score: Score, entropy: list[float]) -> None:
        scores = class_scores(outputs)
        if label is None or scores is None or classification_output(outputs) is None:
            return
        score.update(scores, label, name)
        entropy.append(_cross_entropy(np.asarray(scores, np.float64).reshape(-1), label))


def _cross_entropy(scores: Array, label: int) -> float:
    """-log p(label); scores that are probabilities already are taken as they are."""
    if scores.min() >= 0 and abs(float(scores.sum()) - 1) < 1e-2:
        return float(-np.log(max(float(scores[label]), TINY)))
    return float(np.logaddexp.reduce(scores) - scores[label])


def _noise(comparison: Comparison) -> float:
    """The mean over the outputs of error power by signal power."""
    ratios = [10 ** (-difference.sqnr_db / 10) for difference in comparison.differences().values()]
    return float(np.mean(ratios))
