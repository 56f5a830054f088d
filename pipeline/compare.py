"""Returns how far outputs are from a reference's.

With x the reference, y the candidate and s the quantization step of an output:
    max_abs = max |x - y|,   mean_abs = mean |x - y|,   steps = |x - y| / s
    cosine = <x, y> / (|x| |y|)
    SQNR = 10 log10( sum (x - mean x)^2 / sum (x - y)^2 )   in dB; the mean is taken out so that a constant scores 0 dB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array


@dataclass(frozen=True)
class Difference:
    """How far one output of a model is from the same output of its reference, over all samples.

    `step` is the quantization step that `max_steps` and `mean_steps` count in. `step_kind` "quantized": the output's
    own scale; "equivalent": the output is float in both, and a step is the range the reference took, divided by 255.
    """

    max_abs: float
    mean_abs: float
    cosine: float
    sqnr_db: float
    max_steps: float
    mean_steps: float
    step: float
    step_kind: str
    count: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is infinite: the SQNR of equal outputs, steps of a reference that never moves."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass
class OutputComparison:
    """Sums over samples of one output; memory does not grow with them."""

    name: str
    step: float = 0.0
    _count: int = 0
    _max: float = 0.0
    _sum_abs: float = 0.0
    _sum_square: float = 0.0
    _sum_x: float = 0.0
    _xx: float = 0.0
    _yy: float = 0.0
    _xy: float = 0.0
    _low: float = math.inf
    _high: float = -math.inf

    def update(self, reference: Array, candidate: Array) -> None:
        """Takes in one sample's outputs. Raises StageError for different shapes or values that are not finite."""
        if reference.shape != candidate.shape:
            raise StageError(
                f"output {self.name!r} has the shape {candidate.shape}; the reference has {reference.shape}"
            )
        x, y = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
        for who, values in (("the reference", x), ("the model", y)):
            if not np.isfinite(values).all():
                raise StageError(f"output {self.name!r} of {who} has values that are not finite")
        if not x.size:
            return
        error = np.abs(x - y)
        self._count += x.size
        self._max = max(self._max, float(error.max()))
        self._sum_abs += float(error.sum())
        self._sum_square += float(error @ error)
        self._sum_x += float(x.sum())
        self._xx += float(x @ x)
        self._yy += float(y @ y)
        self._xy += float(x @ y)
        self._low, self._high = min(self._low, float(x.min())), max(self._high, float(x.max()))

    def result(self) -> Difference:
        """The difference over everything seen. Raises StageError when nothing was."""
        if not self._count:
            raise StageError(f"output {self.name!r} was compared on no values; at least one sample is needed")
        step, kind = self.step, "quantized"
        if not step:
            step, kind = (self._high - self._low) / 255, "equivalent"
        most = _ratio(self._max, step)
        return Difference(
            max_abs=self._max,
            mean_abs=self._sum_abs / self._count,
            cosine=self._cosine(),
            sqnr_db=self._sqnr(),
            # float32 puts neighbours on the integer grid 1.0000012 apart
            max_steps=round(most, 4) if self.step else most,
            mean_steps=_ratio(self._sum_abs / self._count, step),
            step=step,
            step_kind=kind,
            count=self._count,
        )

    def _cosine(self) -> float:
        norms = math.sqrt(self._xx) * math.sqrt(self._yy)
        if not norms:
            return 1.0 if self._xx == self._yy else 0.0
        return min(1.0, max(-1.0, self._xy / norms))

    def _sqnr(self) -> float:
        if not self._sum_square:
            return math.inf
        signal = self._xx - self._sum_x**2 / self._count
        return 10 * math.log10(signal / self._sum_square) if signal > 0 else -math.inf


def _ratio(value: float, step: float) -> float:
    if not value:
        return 0.0
    return value / step if step else math.inf


def step_unit(outputs: Mapping[str, Mapping[str, Any]], most: float = 0.0) -> str:
    """What `most` counts in, for outputs as `Difference.to_json` gives them: parts of the range where all are float."""
    if outputs and all(each.get("step_kind") == "equivalent" for each in outputs.values()):
        return "of 255 parts of the range"
    return "step" if most == 1 else "steps"


@dataclass
class Comparison:
    """Outputs against outputs over samples; `steps` gives the quantization step of each output that has one.

    `decides`: whether there are scores, of which the largest is a decision.
    """

    steps: Mapping[str, float] = field(default_factory=dict)
    decides: bool = True
    samples: int = 0
    decisions: int = 0
    equal_decisions: int = 0
    equal_first: int = 0
    outputs: dict[str, OutputComparison] = field(default_factory=dict)

    def update(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Takes in one sample. Raises StageError when the models have different outputs."""
        if set(reference) != set(candidate):
            raise StageError(f"the model has the outputs {sorted(candidate)}; the reference has {sorted(reference)}")
        for name, values in reference.items():
            if name not in self.outputs:
                self.outputs[name] = OutputComparison(name, self.steps.get(name, 0.0))
            self.outputs[name].update(values, candidate[name])
        self.samples += 1
        output = classification_output(reference) if self.decides else None
        if output is not None:
            x, y = reference[output], candidate[output]
            shared = (x == x.max(-1, keepdims=True)) & (y == y.max(-1, keepdims=True))
            self.decisions += shared[..., 0].size
            self.equal_decisions += int(shared.any(-1).sum())
            self.equal_first += int((x.argmax(-1) == y.argmax(-1)).sum())

    def differences(self) -> dict[str, Difference]:
        """The difference of each output by name."""
        return {name: output.result() for name, output in self.outputs.items()}

    @property
    def agreement(self) -> float | None:
        """The share of decisions with a largest class in common, 0..1; None for a model that decides nothing.

        On the grid of 8-bit integers the two largest classes are often equal. Such a tie decides nothing, so whichever
        of them the other model prefers counts as the same decision; `strict_agreement` counts the first one only.
        """
        return self.equal_decisions / self.decisions if self.decisions else None

    @property
    def strict_agreement(self) -> float | None:
        """The share of decisions with the same arg-max, the first class of a tie, 0..1."""
        return self.equal_first / self.decisions if self.decisions else None


def classification_output(outputs: Mapping[str, Array]) -> str | None:
    """The output whose last axis holds classes, to compare decisions on: the arg-max over that axis.

    A classifier's (N, classes) has one decision per sample; a detector's (N, anchors, classes) one per anchor. Among
    several the first whose name tells of classes or scores is taken, or else the first whose last axis is not 4, as
    boxes have. A last axis of one value decides nothing, and a rank of four is an image. None when no output is of this
    kind.
    """
    candidates = [name for name, values in outputs.items() if values.ndim in (2, 3) and values.shape[-1] > 1]
    named = [name for name in candidates if any(word in name.lower() for word in ("score", "class", "logit", "prob"))]
    others = [name for name in candidates if outputs[name].ndim == 2 or outputs[name].shape[-1] != 4]
    return next(iter(named or others), None)
