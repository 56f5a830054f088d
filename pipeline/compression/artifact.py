"""Returns what the network's artifact is worth in a runtime: its float artifact for a target, and how fast it runs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.benchmark.statistics import Measurement
from edgeship.pipeline.devices.worker import Subject
from edgeship.targets.base import ConvertOptions, load

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

Progress = Callable[[int, int], None]


def float_artifacts(recipe: Recipe, model: nn.Module, targets: Sequence[str]) -> dict[str, bytes]:
    """The float artifact of each target, made as a deployment makes it."""
    from edgeship.pipeline.simplification.simplifier import simplify_model
    from edgeship.pipeline.torch_export import export_torch, open_torch

    session = open_torch(model.eval().cpu(), recipe.input.shape, recipe.input.name)
    (given,) = session.inputs
    shape = [max(1, side) for side in given.shape]
    feeds = [{given.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}]
    simplified = simplify_model(export_torch(session, feeds).model, feeds=feeds).model
    return {name: load(name).convert(simplified, ConvertOptions()) for name in targets}


def latency_of(recipe: Recipe, model: nn.Module, target: str, schedule: Schedule) -> float:
    """The median milliseconds of the model's float artifact in the target's runtime; the model stays where it is."""
    artifact = float_artifacts(recipe, copy.deepcopy(model), [target])[target]
    return measure_together(target, {"model": artifact}, schedule, recipe.benchmark.threads)["model"].median_ms


def measure_together(
    target: str, artifacts: Mapping[str, bytes], schedule: Schedule, threads: int = 1, progress: Progress | None = None
) -> dict[str, Measurement]:
    """The latency on this machine of several artifacts of one target, taken in turns, by name."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = []
        for name, content in artifacts.items():
            path = Path(folder) / f"{name}{load(target).suffix}"
            path.write_bytes(content)
            subjects.append(Subject(target, path, threads))
        return dict(zip(artifacts, measure(subjects, None, schedule, progress), strict=True))
