"""Returns the command that measures latency, here or on a device, and compares it with an earlier measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import GateError, InputError
from edgeship.pipeline.commands.files import DEVICE, FILE
from edgeship.pipeline.commands.limits import Finite
from edgeship.pipeline.commands.shapes import Given, by_input, open_inputs, shape_option

if TYPE_CHECKING:
    from edgeship.calibration.types import Array
    from edgeship.pipeline.benchmark.baseline import Baseline, Change
    from edgeship.pipeline.benchmark.measure import Schedule
    from edgeship.pipeline.benchmark.statistics import Measurement
    from edgeship.pipeline.devices.base import Device


class ThreadCounts(click.ParamType[tuple[int, ...]]):
    """One number of threads, or several with commas."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, each at least 1, none twice."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r}; accepted: a number of threads, or several such as 1,2,4", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(short_help="Measure the latency of models.")
@click.argument("models", type=FILE, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--threads",
    type=ThreadCounts(),
    default="1",
    show_default=True,
    help="Threads of each runtime; 1,2,4: each.",
)
@click.option("--runs", type=click.IntRange(min=1), default=200, show_default=True, help="Timed inferences of each.")
@click.option(
    "--warmup", type=click.IntRange(min=0), default=20, show_default=True, help="The fewest inferences before them."
)
@click.option("--launches", type=click.IntRange(min=1), default=5, show_default=True, help="Fresh processes of each.")
@click.option("--baseline", type=FILE, help="An earlier model, or the JSON of an earlier bench; slower is a failure.")
@click.option(
    "--max-regression", type=Finite(0), default=10.0, show_default=True, metavar="PCT", help="How much slower."
)
@click.option("--profile", is_flag=True, help="Also the time of each operator (on this machine only).")
@shape_option("The size of an input, where a model leaves it open.  [default: 1]")
@DEVICE
@click.option("--recipe", type=FILE, help="The recipe with the [devices.NAME] that --device names.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench(
    models: tuple[Path, ...],
    threads: tuple[int, ...],
    runs: int,
    warmup: int,
    launches: int,
    baseline: Path | None,
    max_regression: float,
    profile: bool,
    shapes: tuple[Given, ...],
    device: str,
    recipe: Path | None,
    as_json: bool,
) -> None:
    """Measure the latency of each MODEL alone in its own process, in turns with the others."""
    from edgeship.pipeline.benchmark.baseline import read_baseline
    from edgeship.pipeline.benchmark.measure import Schedule
    from edgeship.pipeline.commands.files import device_of, suffixes

    beside = baseline is not None and baseline.suffix in suffixes()
    if baseline is not None and beside:
        models = (baseline, *models)
    names = unique_names(models)
    before = read_baseline(baseline) if baseline and not beside else None
    where = device_of(device, recipe)
    if profile and where.address != "host":
        raise InputError(f"--profile: operators are timed on this machine only; seen: --device {device}")
    feeds = _feeds(models, shapes)
    results = _measure(models, threads, Schedule(runs, warmup, launches), where, feeds)
    changes = results.against_first(names, max_regression) if beside else []
    if before:
        changes = results.against(before, names, max_regression)
        if not changes:
            raise InputError(f"--baseline {baseline} has none of the models; it has: {', '.join(before.models)}")
    facts = results.to_json(names, where.address, changes)
    if profile:
        for name, model in zip(names, models, strict=True):
            facts["models"][name]["profile"] = operator_times(model, threads[0])
    click.echo(json.dumps(facts, indent=2) if as_json else _text(facts, changes))
    _refuse(changes)


@dataclass(frozen=True)
class Results:
    """The measurements of the reference workload, and of every model with every number of threads."""

    threads: tuple[int, ...]
    reference: Measurement
    measured: Sequence[Measurement]

    def first(self, model: int) -> Measurement:
        """The measurement of a model with the first number of threads."""
        return self.measured[model * len(self.threads)]

    def against_first(self, names: Sequence[str], limit: float) -> list[Change]:
        """How every model but the first compares with it."""
        from edgeship.pipeline.benchmark.baseline import judge_beside

        return [
            judge_beside(name, self.first(place), self.first(0), limit) for place, name in enumerate(names) if place
        ]

    def against(self, before: Baseline, names: Sequence[str], limit: float) -> list[Change]:
        """How each model that the baseline has compares with it."""
        alone = len(names) == 1
        judged = [
            before.judge(name, self.first(place), self.reference, limit, alone=alone)
            for place, name in enumerate(names)
        ]
        return [change for change in judged if change]

    def to_json(self, names: Sequence[str], device: str, changes: Sequence[Change]) -> dict[str, Any]:
        """Everything as plain values."""
        facts: dict[str, Any] = {
            "device": device,
            "machine": dict(self.reference.machine),
            "reference": self.reference.to_json(),
            "models": {name: self._model(place) for place, name in enumerate(names)},
        }
        if changes:
            facts["regression"] = {change.name: change.to_json() for change in changes}
        return facts

    def _model(self, place: int) -> dict[str, Any]:
        from edgeship.pipeline.benchmark.statistics import ratio

        own, begun = self.first(place), place * len(self.threads)
        against = ratio(self.first(0), own)
        facts = {**own.to_json(), "speedup": round(against.value, 4), "speedup_interval": against.interval}
        others = self.measured[begun + 1 : begun + len(self.threads)]
        if others:
            facts["sweep"] = {str(other.threads): _swept(own, other) for other in others}
        return facts


def _swept(one: Measurement, other: Measurement) -> dict[str, Any]:
    from edgeship.pipeline.benchmark.statistics import ratio

    gain = ratio(one, other)
    return {**other.to_json(), "speedup": round(gain.value, 4), "speedup_interval": gain.interval}


def _feeds(models: Sequence[Path], shapes: Sequence[Given]) -> dict[str, Array] | None:
    """Seeded values of the sizes that `--shape` gives; None, and each worker draws its own, where it gives none.

    Notes on stderr which models leave open what nothing says: a batch of 1 goes without saying.
    """
    import numpy as np

    from edgeship.pipeline.commands.files import open_model

    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for model in models:
        inputs = open_model(model).inputs
        given = by_input(shapes, [info.name for info in inputs], str(model))
        open_ones = open_inputs({info.name: info.shape for info in inputs if info.name not in given})
        if open_ones:
            click.echo(
                f"note: {model} leaves sizes open ({open_ones}), timed with 1 each; --shape gives others", err=True
            )
        for info in inputs:
            sizes = given.get(info.name, tuple(max(1, size) for size in info.shape))
            drawn = generator.random(sizes) if info.dtype.kind == "f" else np.zeros(sizes)
            feeds[info.name] = drawn.astype(info.dtype)
    return feeds if shapes else None


def _measure(
    models: Sequence[Path],
    threads: tuple[int, ...],
    schedule: Schedule,
    device: Device,
    feeds: Mapping[str, Array] | None,
) -> Results:
    from edgeship.pipeline.benchmark.measure import measure
    from edgeship.pipeline.commands.files import runtime_of
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.devices.worker import REFERENCE, Subject

    subjects = [Subject(REFERENCE, None)]
    subjects += [Subject(runtime_of(model), model, count) for model in models for count in threads]
    with StepProgress("bench") as progress, device:
        measured = measure(subjects, feeds, schedule, lambda d, t: progress(d, t, "inferences"), device)
    return Results(threads, measured[0], measured[1:])


def operator_times(model: Path, threads: int) -> list[dict[str, Any]]:
    """The time of each operator of a model in its runtime, as they run; empty where it cannot tell."""
    from edgeship.pipeline.benchmark.operators import profile
    from edgeship.pipeline.commands.files import runtime_of

    return [entry.to_json() for entry in profile(runtime_of(model), model, threads)]


def unique_names(models: Sequence[Path]) -> list[str]:
    """What each model is called in the results: its path as given. Raises InputError for one given twice."""
    names = [model.as_posix() for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{twice[0]} was given twice")
    return names


def _refuse(changes: Sequence[Change]) -> None:
    """Raises GateError for what is slower beyond doubt; says on stderr what cannot be told."""
    for change in changes:
        if change.decision == "undecided":
            click.echo(f"not told from chance: {change}; more --runs narrow the interval", err=True)
        elif change.decision == "incomparable":
            click.echo(f"not compared: {change}", err=True)
    slower = [str(change) for change in changes if change.decision == "slower"]
    if slower:
        raise GateError("\n".join([f"slower than the baseline: {slower[0]}", *(f"  - {line}" for line in slower[1:])]))


def _text(facts: Mapping[str, Any], changes: Sequence[Change]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "threads", "median", "p90", "IQR", "against the first, 95 %", "load", "first", "memory", "")
    ]
    for name, model in facts["models"].items():
        rows.append(_row(name, model))
        rows += [_row("", other, f" its {model['threads']}-thread") for other in model.get("sweep", {}).values()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    machine = facts["machine"]
    stolen = machine["steal"]
    lines.append(
        f"{facts['device']}: {machine['cpu']['model']}, {machine['cpu']['cores']} cores"
        + ("" if stolen is None else f"; {100 * machine['busy']:.0f} % busy, {100 * stolen:.0f} % stolen meanwhile")
    )
    for name, model in facts["models"].items():
        lines += _profile_lines(name, model.get("profile", []))
    return "\n".join([*lines, *(str(change) for change in changes)])


def _row(name: str, model: Mapping[str, Any], of: str = "") -> tuple[str, ...]:
    from edgeship.pipeline.summary import milliseconds, size

    def time(key: str) -> str:
        return "-" if model[key] is None else milliseconds(model[key])

    interval = model["speedup_interval"]
    within = "" if interval is None else f" ({interval[0]:.2f} .. {interval[1]:.2f})"
    notes = [*(["noisy"] if model["noisy"] else []), *([] if model["settled"] else ["still getting faster"])]
    return (
        *(name, str(model["threads"]), time("median_ms"), time("p90_ms"), time("iqr_ms")),
        f"{model['speedup']:.2f}x{of}{within}",
        *(time("load_ms"), time("first_ms"), "-" if model["peak_bytes"] is None else size(model["peak_bytes"])),
        ", ".join(notes),
    )


def _profile_lines(name: str, profile: Sequence[Mapping[str, Any]]) -> list[str]:
    if not profile:
        return []
    total = sum(entry["us"] for entry in profile)
    slowest = sorted(profile, key=lambda entry: -entry["us"])[:10]
    lines = [f"{name}: the slowest of {len(profile)} operators, {total:.0f} us in all"]
    return lines + [
        f"  {100 * entry['us'] / total:5.1f} %  {entry['us']:9.1f} us  {entry['operator']:<24}  {entry['name']}"
        for entry in slowest
    ]


COMMANDS = (bench,)
