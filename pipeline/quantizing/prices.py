"""Returns the latency of several quantized models on each target, all in turns, each in its own process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.benchmark.statistics import Measurement, ratio
from edgeship.pipeline.devices.worker import Subject
from edgeship.pipeline.golden import read_golden

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.pipeline.stage import StageContext

AT_ONCE = 8
RUNS, WARMUP = 60, 10


def measure_models(context: StageContext, models: Mapping[str, ir.Model]) -> dict[str, Any]:
    """By target a list of {name, median_ms, noisy}, in the order of `models`; targets that cannot run here are absent.

    More than eight models are measured eight at a time, the first among each, and scaled by it.
    """
    from edgeship.targets.base import ConvertOptions, load

    found: dict[str, Any] = {}
    for name in sorted(context.recipe.targets):
        target = load(name)
        if not target.availability().installed:
            continue
        with tempfile.TemporaryDirectory(prefix="edgeship-") as folder:
            subjects = []
            for place, model in enumerate(models.values()):
                path = Path(folder) / f"{place}{target.suffix}"
                path.write_bytes(target.convert(model, ConvertOptions()))
                subjects.append(Subject(name, path, context.recipe.benchmark.threads))
            times = _measured(context, subjects)
        found[name] = [
            {"name": label, "median_ms": round(ms, 4), "noisy": noisy}
            for label, (ms, noisy) in zip(models, times, strict=True)
        ]
    return found


def measure_artifacts(context: StageContext, target: str, paths: Mapping[str, Path]) -> dict[str, tuple[float, bool]]:
    """Median milliseconds of each artifact by name, taken in turns, and whether its times scatter."""
    times = _measured(context, [Subject(target, path) for path in paths.values()])
    return dict(zip(paths, times, strict=True))


def _measured(context: StageContext, subjects: Sequence[Subject]) -> list[tuple[float, bool]]:
    """Median milliseconds of each, and whether they scatter."""
    feeds = read_golden(context.inputs["export"] / "golden.npz").feeds[0] if "export" in context.inputs else None
    settings = context.recipe.benchmark
    schedule = Schedule(min(RUNS, settings.runs), min(WARMUP, settings.warmup), launches=1)
    first, rest = subjects[0], subjects[1:]
    times: list[tuple[float, bool]] = []
    for group in _groups(rest, AT_ONCE - 1):
        taken = measure([first, *group], feeds, schedule, lambda d, t: context.progress(d, t, "inferences"))
        if not times:
            times.append((taken[0].median_ms, taken[0].noisy))
        times += [_scaled(each, taken[0], times[0][0]) for each in taken[1:]]
    if not times:
        (alone,) = measure([first], feeds, schedule)
        times.append((alone.median_ms, alone.noisy))
    return times


def _scaled(measurement: Measurement, first: Measurement, first_ms: float) -> tuple[float, bool]:
    return ratio(measurement, first).value * first_ms, measurement.noisy


def _groups(items: Sequence[Subject], size: int) -> Iterator[list[Subject]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
