"""Returns what raw times prove: medians, the percentiles that a sample can bear, and ratios with their interval.

Two artifacts are measured in rounds, one right after the other, so that what slows the machine slows both. With a[k]
and b[k] their times in round k:

    r[k]     = median(a[k]) / median(b[k])
    ratio    = median(r)
    interval = the 2.5 and 97.5 percentiles of median(r*), where r* are rounds drawn with replacement from launches
               drawn with replacement

Rounds in which something else ran are outliers, and on a loaded machine every third may be one. Means of a middle part
or of what is left after outliers were thrown away are narrower on a quiet machine and break down far earlier; the
median's interval stays right. A launch is a fresh process for every artifact: memory lands elsewhere and the same code
runs up to a percent faster or slower, which no number of inferences in one process would show. The percentile bootstrap
over few launches is too narrow by sqrt(n / (n - 1)), so the interval is widened by that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeship.calibration.types import Array

NOISY = 0.10
TAIL = 10
"""The fewest times that must lie beyond a percentile for it to be told: 100 times for p90, 1000 for p99."""
DRAWS = 2000
SEED = 20_240_229
CONFIDENCE = 0.95
FEWEST_ROUNDS = 6
"""With fewer rounds the bootstrap's interval is not one of 95 %, and none is given."""


@dataclass(frozen=True)
class Measurement:
    """Times of one artifact, in the order they were taken, and the circumstances; figures are properties.

    `launches` gives the number of times in each round of each launch; empty: all in one round. `load_ms` and `first_ms`
    have one value a launch. `peak_bytes` is the largest resident memory of its process, `idle_bytes` what that process
    held before the runtime was loaded.
    """

    nanoseconds: tuple[int, ...]
    warmup: int
    threads: int
    machine: Mapping[str, Any] = field(default_factory=dict)
    launches: tuple[tuple[int, ...], ...] = ()
    load_ms: tuple[float, ...] = ()
    first_ms: tuple[float, ...] = ()
    peak_bytes: int | None = None
    idle_bytes: int | None = None
    settled: bool = True

    @property
    def runs(self) -> int:
        """How many inferences were timed."""
        return len(self.nanoseconds)

    def percentile(self, percent: float) -> float:
        """Milliseconds that `percent` of the inferences stay below, linearly interpolated."""
        return float(np.percentile(np.asarray(self.nanoseconds, np.float64), percent)) / 1e6

    def tail(self, percent: float) -> float | None:
        """The percentile in milliseconds where enough times lie beyond it, else None."""
        return self.percentile(percent) if self.runs * (100 - percent) / 100 >= TAIL - 1e-9 else None

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return self.percentile(50)

    @property
    def p90_ms(self) -> float | None:
        """The 90th percentile in milliseconds; None with fewer than 100 runs."""
        return self.tail(90)

    @property
    def p99_ms(self) -> float | None:
        """The 99th percentile in milliseconds; None with fewer than 1000 runs."""
        return self.tail(99)

    @property
    def iqr_ms(self) -> float:
        """The interquartile range in milliseconds."""
        return self.percentile(75) - self.percentile(25)

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range exceeds a tenth of the median: something else was running."""
        return self.iqr_ms > NOISY * self.median_ms

    def round_medians(self) -> list[Array]:
        """For each launch the median nanoseconds of each of its rounds."""
        times = np.asarray(self.nanoseconds, np.float64)
        found, begun = [], 0
        for rounds in self.launches or ((len(times),),):
            medians = []
            for count in rounds:
                medians.append(float(np.median(times[begun : begun + count])))
                begun += count
            found.append(np.asarray(medians))
        return found

    def to_json(self) -> dict[str, Any]:
        """The figures and the raw times as plain values."""
        return {
            "median_ms": round(self.median_ms, 4),
            "p90_ms": _rounded(self.p90_ms),
            "p99_ms": _rounded(self.p99_ms),
            "iqr_ms": round(self.iqr_ms, 4),
            "noisy": self.noisy,
            "runs": self.runs,
            "warmup": self.warmup,
            "settled": self.settled,
            "threads": self.threads,
            "load_ms": _rounded(float(np.median(self.load_ms)) if self.load_ms else None),
            "first_ms": _rounded(float(np.median(self.first_ms)) if self.first_ms else None),
            "peak_bytes": self.peak_bytes,
            "idle_bytes": self.idle_bytes,
            "launches": [list(rounds) for rounds in self.launches],
            "nanoseconds": list(self.nanoseconds),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another, and the interval that holds it with 95 % confidence.

    `low` and `high` are None with too few rounds to tell.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None."""
        return None if self.low is None or self.high is None else [round(self.low, 4), round(self.high, 4)]


def ratio(a: Measurement, b: Measurement) -> Ratio:
    """The time of `a` over the time of `b`, measured together: their rounds are compared in pairs.

    Raises ValueError when they were not measured in the same rounds.
    """
    if [len(rounds) for rounds in a.launches] != [len(rounds) for rounds in b.launches]:
        raise ValueError("the two were not measured in the same rounds")
    return summarize([np.log(x / y) for x, y in zip(a.round_medians(), b.round_medians(), strict=True)])


def summarize(launches: Sequence[Array]) -> Ratio:
    """The ratio and its interval from the logarithms of the rounds' ratios, launch by launch."""
    value = float(np.median(np.concatenate(launches)))
    drawn = _draws(launches, SEED)
    return _ratio(value, drawn)


def quotient(now: Sequence[Array], then: Sequence[Array]) -> Ratio:
    """exp of the median of `now` minus that of `then`: two ratios of two different runs, and the quotient's interval.

    Both are logarithms of the rounds' ratios, launch by launch.
    """
    value = float(np.median(np.concatenate(now)) - np.median(np.concatenate(then)))
    first, second = _draws(now, SEED), _draws(then, SEED + 1)
    return _ratio(value, None if first is None or second is None else first - second)


def _ratio(value: float, drawn: Array | None) -> Ratio:
    """exp of `value` and of the limits that hold 95 % of `drawn`."""
    if drawn is None:
        return Ratio(math.exp(value), None, None)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Ratio(math.exp(value), math.exp(min(value, low)), math.exp(max(value, high)))


def _draws(launches: Sequence[Array], seed: int) -> Array | None:
    """Medians of resampled rounds of resampled launches, (DRAWS,); None with too few rounds."""
    each = len(launches[0])
    if sum(len(rounds) for rounds in launches) < FEWEST_ROUNDS:
        return None
    generator = np.random.default_rng(seed)
    table = np.stack(launches)
    count = len(launches)
    chosen = generator.integers(0, count, (DRAWS, count))[:, :, None]
    rounds = generator.integers(0, each, (DRAWS, count, each))
    drawn = np.median(table[chosen, rounds].reshape(DRAWS, -1), axis=1)
    center = float(np.median(table))
    widened = math.sqrt(count / (count - 1)) if count > 1 else 1.0
    return np.asarray(center + (drawn - center) * widened)
