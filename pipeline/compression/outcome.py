"""Returns what compression gained and lost, as one record, and writes it with the network and its training."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeship.calibration.errors import StageError
from edgeship.pipeline.benchmark.measure import Schedule
from edgeship.pipeline.benchmark.statistics import ratio
from edgeship.pipeline.compress_sections import Compress
from edgeship.pipeline.compression.artifact import float_artifacts, measure_together
from edgeship.pipeline.compression.compressor import Compressed, compress
from edgeship.pipeline.compression.cost import count_cost
from edgeship.pipeline.compression.loop import process_state
from edgeship.pipeline.compression.made import RECORD, is_up_to_date, origin_of, read_facts, write_made
from edgeship.pipeline.compression.masks import sparsity
from edgeship.pipeline.compression.metrics import FILE, plot_metrics
from edgeship.pipeline.compression.reached import goal_facts, goal_notes
from edgeship.pipeline.compression.saved import save, weights_file
from edgeship.pipeline.compression.training_data import Tell, input_shape
from edgeship.pipeline.workspace import write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

PLOT = "metrics.png"


def write_outcome(  # noqa: PLR0913, PLR0917 - the parts of a stage's context
    recipe: Recipe, section: Compress, targets: Sequence[str], folder: Path, kept: Path, tell: Tell
) -> dict[str, Any]:
    """The record of one compression; `folder` gets all its files, `kept` holds what a killed run goes on from.

    In several processes only the first one writes.
    """
    result = compress(recipe, section, kept, tell)
    facts: dict[str, Any] = {}
    with process_state().main_process_first():
        if process_state().is_main_process:
            facts = outcome(recipe, section, targets, result, tell)
            facts["notes"] += save(recipe, result.model, result.removed, folder)
            write_json(folder / RECORD, facts)
            lines = "".join(f"{json.dumps(each, sort_keys=True)}\n" for each in result.history)
            (folder / FILE).write_text(lines, "utf-8")
            plot_metrics(folder / PLOT, result.history)
    return facts


def outcome(
    recipe: Recipe, section: Compress, targets: Sequence[str], result: Compressed, tell: Tell
) -> dict[str, Any]:
    """Cost, size, top-1 and latency before and after, what was left dense and why, and what was reached of the goal."""
    example = torch.zeros(input_shape(recipe))
    before, after = ({**_size(each), **vars(count_cost(each, example))} for each in (result.dense, result.model))
    for facts, when in ((before, "before"), (after, "after")):
        if when in result.held_out:
            facts["top1"] = round(result.held_out[when], 4)
    if result.masked:
        after["sparsity"] = round(sparsity(result.model, result.masked), 6)
    facts = {
        "kind": section.prune.kind if section.prune else "none",
        "teacher": section.distill.teacher.source.rpartition("/")[2] if section.distill else None,
        "before": before,
        "after": after,
        "cuts": {each.layer: len(each.channels) for each in result.cuts},
        "blocks": result.blocks,
        "left_dense": result.left_dense,
        "notes": _notes(section),
    }
    if section.prune is not None:
        try:
            facts["goal"] = goal_facts(recipe, section.prune, result, before, after)
            facts["notes"] += goal_notes(facts["goal"], result)
        except StageError as error:  # hours of training are not lost for it
            facts["notes"].append(f"prune.{section.prune.goal}: what was reached was not measured: {error}")
    if result.cuts or result.blocks:
        facts["latency"] = {}
        for name in targets:
            try:
                facts["latency"][name] = _latency(recipe, name, result, tell)
            except StageError as error:  # hours of training are not lost for want of a runtime
                facts["notes"].append(f"{name}: no latency was measured: {error}")
    return facts


def _size(model: nn.Module) -> dict[str, int]:
    content = weights_file(model)
    return {"bytes": len(content), "compressed_bytes": len(zlib.compress(content, 6))}


def _notes(section: Compress) -> list[str]:
    if section.prune is None or section.prune.kind != "unstructured":
        return []
    return [
        "single weights are zero: the file is smaller once it is compressed (compressed_bytes), and neither runtime "
        "runs it faster"
    ]


def _latency(recipe: Recipe, target: str, result: Compressed, tell: Tell) -> Mapping[str, Any]:
    """The float artifacts of both networks in the target's runtime, in turns."""
    settings = recipe.benchmark
    schedule = Schedule(settings.runs, settings.warmup, settings.launches)
    before, after = (float_artifacts(recipe, each, [target])[target] for each in (result.dense, result.model))
    measured = measure_together(
        target,
        {"before": before, "after": after},
        schedule,
        settings.threads,
        lambda done, total: tell(done, total, f"inferences, {target}"),
    )
    gain = ratio(measured["before"], measured["after"])
    return {
        "before": measured["before"].to_json(),
        "after": measured["after"].to_json(),
        "speedup": round(gain.value, 4),
        "speedup_interval": gain.interval,
        "noisy": any(each.noisy for each in measured.values()),
    }


def finished_before(recipe: Recipe, section: Compress, folder: Path) -> dict[str, Any] | None:
    """The record that lies in `folder`, where its files are what would be made; None where something is to be done.

    In several processes it is empty but in the first one.
    """
    asked = recipe.model_copy(update={"compress": section})
    if not is_up_to_date(folder, origin_of(asked, tuple(recipe.targets))):
        return None
    return read_facts(folder) if process_state().is_main_process else {}


def compress_into(recipe: Recipe, section: Compress, folder: Path, tell: Tell) -> dict[str, Any]:
    """The record of a compression whose files are put into `folder`, all of them once it is done.

    Checkpoints lie in `folder/unfinished` until then, under a key of all that the result depends on: the same call goes
    on from there, and one with another recipe, model or data starts anew. What the files were made from is written
    beside them.
    """
    asked = recipe.model_copy(update={"compress": section})
    origin = origin_of(asked, tuple(recipe.targets))
    unfinished = folder / "unfinished"
    kept = unfinished / origin.key[:16]
    state = process_state()
    if not state.is_main_process:
        tell = _silent  # the first process speaks for all
    with _made(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
        facts = write_outcome(asked, section, tuple(recipe.targets), Path(temporary), kept, tell)
        if state.is_main_process:
            made = sorted(Path(temporary).iterdir())
            for path in made:
                path.replace(folder / path.name)
            write_made(folder, origin, [path.name for path in made])
    state.wait_for_everyone()
    if state.is_main_process:
        _remove(unfinished)
    return facts


def _silent(_done: int, _total: int, _what: str = "") -> None:
    """Says nothing."""


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which goes again if it was not there and nothing has come into it: what was asked for is refused."""
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not was_there and process_state().is_main_process and not any(folder.iterdir()):
            folder.rmdir()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
