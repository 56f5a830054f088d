"""Returns whether artifacts became slower than an earlier benchmark says, by more than chance and the host explain.

Every benchmark also measures a fixed reference workload, in the same rounds. With m and c the medians of an artifact
and of the reference in a round, x = log(m / c) does not know how fast or how busy the host is, and

    change = exp(median(x now) - median(x then)) - 1

has an interval from the rounds of both runs. An artifact is slower only where that whole interval lies beyond the
limit. A baseline without reference (of edgeship 0.1) is compared as it is; one of another kind of CPU not at all, since
the runtimes' kernels are others there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array
from edgeship.pipeline.benchmark.statistics import Measurement, Ratio, quotient, ratio
from edgeship.pipeline.machine import kernels_of

OLD_ROUNDS = 10
"""The rounds in which benchmarks without a record of their rounds were taken."""
Decision = Literal["slower", "within", "undecided", "incomparable"]


@dataclass(frozen=True)
class Change:
    """How an artifact's time compares with the baseline's; `normalized`: both divided by their reference workload."""

    name: str
    ratio: Ratio | None
    limit: float
    normalized: bool
    decision: Decision
    why: str = ""

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.name}: {self.why}"
        host = "" if self.normalized else ", without allowance for the host"
        return f"{self.name}: {_percent(self.ratio)} against the baseline{host}; accepted: at most {self.limit:g} %"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `change_percent` is positive where it became slower."""
        interval = self.ratio.interval if self.ratio else None
        return {
            "decision": self.decision,
            "change_percent": round(100 * (self.ratio.value - 1), 2) if self.ratio else None,
            "interval_percent": [round(100 * (end - 1), 2) for end in interval] if interval else None,
            "limit_percent": self.limit,
            "normalized": self.normalized,
            "why": self.why or None,
        }


def _percent(ratio: Ratio) -> str:
    value = 100 * (ratio.value - 1)
    if ratio.low is None or ratio.high is None:
        return f"{value:+.1f} % (too few runs for an interval)"
    return f"{value:+.1f} % (95 %: {100 * (ratio.low - 1):+.1f} .. {100 * (ratio.high - 1):+.1f})"


@dataclass(frozen=True)
class Baseline:
    """An earlier benchmark: its models by name, its reference workload if it had one, and its machine."""

    models: Mapping[str, Measurement]
    reference: Measurement | None
    machine: Mapping[str, Any]

    def judge(
        self, name: str, now: Measurement, reference: Measurement, limit: float, *, alone: bool = False
    ) -> Change | None:
        """How `now` compares, in percent of time; None for a model that the baseline does not have.

        `alone`: it is the only model, which the baseline's only one is compared with whatever it is called. Raises
        InputError when the baseline used another number of threads.
        """
        then = self.models.get(name) or (next(iter(self.models.values())) if alone and len(self.models) == 1 else None)
        if then is None:
            return None
        if then.threads != now.threads:
            raise InputError(
                f"--baseline: {name} was measured with {then.threads} threads; now with {now.threads}; give --threads"
            )
        if self.machine.get("cpu") and kernels_of(self.machine) != kernels_of(now.machine):
            kinds = f"{kernels_of(self.machine)}; here {kernels_of(now.machine)}"
            why = f"the baseline is of another kind of CPU ({kinds}); make one on this kind"
            return Change(name, None, limit, False, "incomparable", why)
        normalized = self.reference is not None
        found = quotient(_logarithms(now, reference if normalized else None), _logarithms(then, self.reference))
        return Change(name, found, limit, normalized, _decide(found, limit))


def judge_beside(name: str, now: Measurement, then: Measurement, limit: float) -> Change:
    """How a model compares, in percent of time, with an earlier one that was measured in the same rounds."""
    found = ratio(now, then)
    return Change(name, found, limit, True, _decide(found, limit))


def _decide(found: Ratio, limit: float) -> Decision:
    most = 1 + limit / 100
    if found.low is None or found.high is None:
        return "undecided"
    if found.low > most:
        return "slower"
    return "within" if found.high <= most else "undecided"


def _logarithms(measured: Measurement, reference: Measurement | None) -> list[Array]:
    if reference is None:
        return [np.log(medians) for medians in measured.round_medians()]
    pairs = zip(measured.round_medians(), reference.round_medians(), strict=True)
    return [np.log(own / fixed) for own, fixed in pairs]


def read_baseline(path: Path) -> Baseline:
    """The JSON of an earlier `bench`, of this version or an older one. Raises InputError when it is something else."""
    try:
        values = json.loads(path.read_text())
        machine = values.get("machine", {})
        models = {str(name): _measurement(facts, machine) for name, facts in values["models"].items()}
        reference = _measurement(values["reference"], machine) if "reference" in values else None
        return Baseline(models, _of_the_same_rounds(reference, models), machine)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"--baseline {path} is not the JSON of an earlier bench: {error}") from None


def _of_the_same_rounds(reference: Measurement | None, models: Mapping[str, Measurement]) -> Measurement | None:
    if reference is not None and any(model.launches != reference.launches for model in models.values()):
        raise ValueError("its reference was not measured in the rounds of its models")
    return reference


def _measurement(facts: Mapping[str, Any], machine: Mapping[str, Any]) -> Measurement:
    times = tuple(int(value) for value in facts["nanoseconds"])
    launches = tuple(tuple(int(count) for count in rounds) for rounds in facts.get("launches", ()))
    if not times or min(times) <= 0 or (launches and sum(map(sum, launches)) != len(times)):
        raise ValueError("its times and rounds do not fit together")
    if not launches:
        rounds = min(OLD_ROUNDS, len(times))
        counts = [len(times) * (place + 1) // rounds - len(times) * place // rounds for place in range(rounds)]
        launches = (tuple(counts),)
    return Measurement(times, int(facts["warmup"]), int(facts["threads"]), machine, launches)
