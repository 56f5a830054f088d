"""Returns how fast each artifact is, here or on the recipe's device, beside its fp32 twin in the same runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.benchmark.operators import profile
from edgeship.pipeline.benchmark.statistics import Measurement, ratio
from edgeship.pipeline.devices.base import HOST, open_device
from edgeship.pipeline.devices.worker import REFERENCE, Subject
from edgeship.pipeline.golden import read_golden
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def run(context: StageContext) -> None:
    """Writes latency.json: for each target the int8 and fp32 measurements, raw times included, and the speed-up.

    All artifacts of all targets and the reference workload are measured in the same rounds.
    """
    settings, device = context.recipe.benchmark, open_device(context.recipe.device, context.recipe.devices)
    feeds = read_golden(context.inputs["export"] / "golden.npz").feeds[0]
    subjects = [Subject(REFERENCE, None)]
    for name in context.targets:
        subjects += _subjects(context, name)
    schedule = Schedule(settings.runs, settings.warmup, settings.launches)
    with device:
        measured = measure(subjects, feeds, schedule, lambda d, t: context.progress(d, t, "inferences"), device)
    facts, each = {}, 2 + len(settings.sweep)
    for place, name in enumerate(context.targets):
        fp32, int8, *others = measured[1 + place * each : 1 + (place + 1) * each]
        facts[name] = _facts(fp32, int8, others)
        if settings.profile and device.address == HOST:
            operators = profile(name, context.inputs["convert"] / artifact_path(name), settings.threads)
            facts[name]["profile"] = [operator.to_json() for operator in operators]
    values = {
        "machine": dict(measured[0].machine),
        "device": device.address,
        "reference": measured[0].to_json(),
        "targets": facts,
    }
    write_json(context.folder / "latency.json", values)


def _subjects(context: StageContext, target: str) -> list[Subject]:
    """The fp32 artifact, the int8 one, and the int8 one with each further number of threads."""
    settings = context.recipe.benchmark
    fp32, int8 = (context.inputs["convert"] / artifact_path(target, kind) for kind in ("fp32", "model"))
    counts = [settings.threads, *settings.sweep]
    return [Subject(target, fp32, settings.threads), *(Subject(target, int8, count) for count in counts)]


def _facts(fp32: Measurement, int8: Measurement, others: Sequence[Measurement]) -> dict[str, Any]:
    gain = ratio(fp32, int8)
    facts: dict[str, Any] = {
        "int8": int8.to_json(),
        "fp32": fp32.to_json(),
        "speedup": round(gain.value, 4),
        "speedup_interval": gain.interval,
        "noisy": fp32.noisy or int8.noisy,
    }
    if others:
        facts["sweep"] = {str(other.threads): other.to_json() for other in others}
    return facts


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    from edgeship.pipeline.machine import cpu_key

    place = {"device": recipe.device, "devices": recipe.dump("devices")}
    return {"targets": list(targets), "benchmark": recipe.dump("benchmark"), "cpu": cpu_key(), "place": place}


STAGE = Stage(name="latency", needs=("export", "convert"), settings=_settings, run=run)
