"""What is wrong, or remarkable, about a set of calibration samples: findings, before anything is quantized.

An error means that ranges chosen on these samples would be wrong; a note deserves a look. One pass over the samples,
in memory that does not grow with their values.

- Values against the declared preprocessing: pixels 0..255 become [(0 - mean) / std, (255 - mean) / std]. Arrays that
  leave this interval were preprocessed otherwise (or not at all), and so were those that use next to nothing of it.
- Layout: in an image the next value along a row is its neighbour. Where the value three (or four) places on is much
  closer, channels lie innermost: NHWC values were reshaped, not transposed, to NCHW.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeship.calibration.samples.data import Sample, Samples, not_finite
from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.calibration.types import Array, Finding

MINIMUM = 2
"""The fewest samples a range is learnt from: with a single one it is that image's, not the data's."""
WHERE = "calibration data"
OUTSIDE = 0.02
"""Resizing with overshoot leaves the interval of the pixels by less than this share of it."""
UNUSED = 1 / 20
"""All samples together using less of the declared interval than this were scaled otherwise."""
SCRAMBLED = 0.7
"""How much closer the value one pixel of interleaved channels on must be than the next one."""
COVERAGE = 2
"""Samples per class from which on a missing class is remarkable."""


@dataclass(frozen=True)
class Expected:
    """What the samples are held against: what was declared of them, and the samples that artifacts are judged on.

    `declared`: how the input was preprocessed, where the recipe says so and the samples came preprocessed. `classes`:
    how many the model tells apart, 0 where unknown. `evaluation`: its samples' contents, by name. `pixels`: the inputs
    that take whole numbers from 0 to 255 and nothing else.
    """

    declared: Preprocessing | None = None
    classes: int = 0
    evaluation: Iterable[tuple[str, bytes]] = ()
    pixels: Collection[str] = ()


@dataclass
class _Seen:
    """What one pass over the samples collects."""

    declared: Preprocessing | None = None
    pixels: Collection[str] = ()
    broken: list[Finding] = field(default_factory=list)
    scaled: dict[str, Finding] = field(default_factory=dict)
    first: dict[bytes, str] = field(default_factory=dict)
    twins: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)
    low: dict[str, Array] = field(default_factory=dict)
    high: dict[str, Array] = field(default_factory=dict)
    next_one: float = 0.0
    next_pixel: dict[int, float] = field(default_factory=dict)

    def update(self, sample: Sample) -> None:
        """Takes in one sample."""
        finite = True
        for name, values in sample.feeds.items():
            if not np.isfinite(values).all():
                finite = False
                rule = f"input {name!r} holds {not_finite(values)}"
                self.broken.append(Finding(f"sample {sample.name}", rule, "", "finite numbers"))
        if all(values.size > 1 and values.min() == values.max() for values in sample.feeds.values()):
            self.flat.append(sample.name)
        content = hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in sample.feeds.values())).digest()
        if content in self.first:
            self.twins.append(f"{sample.name} = {self.first[content]}")
        self.first.setdefault(content, sample.name)
        for name, values in sample.feeds.items() if finite else ():
            self._values(name, values)

    def _values(self, name: str, values: Array) -> None:
        if name in self.pixels and name not in self.scaled and not _are_pixels(values):
            rule = f"input {name!r} takes pixels (uint8), which the model scales itself; mean and std are not for it"
            span = f"{values.min():.4g} .. {values.max():.4g}"
            self.scaled[name] = Finding(WHERE, rule, span, "whole numbers, 0 .. 255")
        if self.declared is not None and self.declared.takes(values.shape):
            low, high = values.min(axis=self.declared.axes), values.max(axis=self.declared.axes)
            self.low[name] = np.minimum(self.low.get(name, low), low)
            self.high[name] = np.maximum(self.high.get(name, high), high)
        if values.ndim == 4 and values.shape[1] in (3, 4) and values.shape[3] > 2 * values.shape[1]:
            apart = values.shape[1]
            self.next_one += float(np.abs(np.diff(values, axis=3)).mean())
            distance = float(np.abs(values[..., apart:] - values[..., :-apart]).mean())
            self.next_pixel[apart] = self.next_pixel.get(apart, 0.0) + distance


def check_calibration(samples: Samples, expected: Expected | None = None) -> list[Finding]:
    """What is wrong with a set of calibration samples; an error makes it useless, a note deserves a look."""
    expected = expected or Expected()
    if len(samples) < MINIMUM:
        what = "no samples" if not len(samples) else "a single sample: a range is one image's, not the data's"
        return [Finding(WHERE, what, str(len(samples)), f"at least {MINIMUM} samples")]
    seen = _Seen(expected.declared, expected.pixels)
    for sample in samples.unchecked():
        seen.update(sample)
    return [
        *seen.broken,
        *seen.scaled.values(),
        *_sameness(samples, seen),
        *_values(seen, expected.declared),
        *_layout(seen),
        *_coverage(samples.labels, expected.classes),
        *_overlap(samples, expected.evaluation),
    ]


def _are_pixels(values: Array) -> bool:
    return values.size == 0 or bool(values.min() >= 0 and values.max() <= 255 and (values == np.rint(values)).all())


def _sameness(samples: Samples, seen: _Seen) -> list[Finding]:
    findings = []
    if len(seen.first) < MINIMUM:
        copies = f"{len(samples)} copies"
        findings.append(Finding(WHERE, "all samples are the same", copies, f"at least {MINIMUM} different ones"))
    elif seen.twins:
        rule = f"{len(seen.twins)} of {len(samples)} samples are duplicates"
        findings.append(Finding(WHERE, rule, few(seen.twins), "", "note"))
    if len(seen.flat) == len(samples):
        findings.append(Finding(WHERE, "every sample is one constant value", few(seen.flat), "photographs"))
    elif seen.flat:
        rule = f"{len(seen.flat)} of {len(samples)} samples are one constant value"
        findings.append(Finding(WHERE, rule, few(seen.flat), "", "note"))
    return findings


def _values(seen: _Seen, declared: Preprocessing | None) -> list[Finding]:
    if declared is None:
        return []
    findings = []
    for name, low in seen.low.items():
        high = seen.high[name]
        mean, std = (np.asarray(each, np.float64) for each in (declared.mean, declared.std))
        least, most = (0.0 - mean) / std, (255.0 - mean) / std
        room = OUTSIDE * (most - least)
        interval = f"[{least.min():.4g}, {most.max():.4g}], what mean and std make of pixels 0..255"
        values = f"[{low.min():.4g}, {high.max():.4g}]"
        if (low < least - room).any() or (high > most + room).any():
            rule = f"input {name!r} leaves the range of the declared preprocessing"
            findings.append(Finding(WHERE, rule, values, interval))
        elif ((high - low) < UNUSED * (most - least)).all():
            rule = f"input {name!r} uses next to nothing of the range of the declared preprocessing"
            findings.append(Finding(WHERE, rule, values, interval))
    return findings


def _layout(seen: _Seen) -> list[Finding]:
    for apart, distance in seen.next_pixel.items():
        if distance < SCRAMBLED * seen.next_one:
            rule = "channels lie innermost in arrays of shape NCHW: NHWC images were reshaped instead of transposed"
            facts = f"values {apart} places apart differ {distance / seen.next_one:.2f} times as much as neighbours"
            return [Finding(WHERE, rule, facts, "array.transpose(0, 3, 1, 2)")]
    return []


def _coverage(labels: Sequence[int] | None, classes: int) -> list[Finding]:
    if not labels:
        return []
    counts = Counter(labels)
    if len(counts) == 1 and (classes or 2) > 1:
        return [
            Finding(WHERE, f"all {len(labels)} samples are of class {labels[0]}", "", "samples of many classes", "note")
        ]
    missing = [label for label in range(classes) if label not in counts]
    if missing and len(labels) >= COVERAGE * classes:
        rule = f"{len(missing)} of {classes} classes have no sample"
        return [
            Finding(WHERE, rule, "class " + few([str(label) for label in missing]), "samples of every class", "note")
        ]
    return []


def _overlap(samples: Samples, evaluation: Iterable[tuple[str, bytes]]) -> list[Finding]:
    judged = {content: name for name, content in evaluation}
    if not judged:
        return []
    both = [f"{name} = {judged[content]}" for name, content in samples.contents() if content in judged]
    if not both:
        return []
    rule = f"{len(both)} of {len(samples)} samples are evaluation samples too: accuracy on them is too good"
    return [Finding(WHERE, rule, few(both), "different images", "note")]


def few(names: Sequence[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def to_json(findings: Iterable[Finding]) -> list[Mapping[str, str]]:
    """The findings as plain values."""
    return [
        {"where": f.where, "rule": f.rule, "seen": f.seen, "accepted": f.accepted, "severity": f.severity}
        for f in findings
    ]
