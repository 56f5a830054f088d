"""Returns how fast each artifact is on this machine, beside its fp32 twin in the same runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.golden import read_golden
from edgeship.pipeline.measure import Schedule, Subject, measure
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def run(context: StageContext) -> None:
    """Writes latency.json: for each target the int8 and fp32 measurements, raw times included, and the speed-up."""
    from edgeship.pipeline.machine import machine_facts

    settings = context.recipe.benchmark
    schedule = Schedule(settings.threads, settings.runs, settings.warmup)
    feeds = read_golden(context.inputs["export"] / "golden.npz").feeds[0]
    total = 2 * schedule.runs * len(context.targets)
    facts = {}
    for place, name in enumerate(context.targets):
        subjects = [Subject(name, context.inputs["convert"] / artifact_path(name, kind)) for kind in ("fp32", "model")]
        before = 2 * schedule.runs * place

        def progress(done: int, _total: int, before: int = before) -> None:
            context.progress(before + done, total, "inferences")

        fp32, int8 = measure(subjects, feeds, schedule, progress)
        facts[name] = {
            "int8": int8.to_json(),
            "fp32": fp32.to_json(),
            "speedup": round(fp32.median_ms / int8.median_ms, 4),
            "noisy": fp32.noisy or int8.noisy,
        }
    write_json(context.folder / "latency.json", {"machine": machine_facts(), "targets": facts})


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    from edgeship.pipeline.machine import cpu_key

    return {"targets": list(targets), "benchmark": recipe.dump("benchmark"), "cpu": cpu_key()}


STAGE = Stage(name="latency", needs=("export", "convert"), settings=_settings, run=run)
