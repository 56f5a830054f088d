"""Returns what training measured, as JSON lines and as a plot. No times: the same run writes the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.pipeline.workspace import write_atomically

FILE = "metrics.jsonl"


@dataclass
class EpochMetrics:
    """One epoch: mean loss and top-1 (percent) on the training data as it went by, and top-1 on held-out data after."""

    epoch: int
    step: int
    lr: float
    loss: float
    top1: float | None = None
    validation_top1: float | None = None


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replaces metrics.jsonl by one line for each finished epoch."""
    write_atomically(folder / FILE, "".join(f"{json.dumps(dict(values), sort_keys=True)}\n" for values in history))


def plot_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG with loss and top-1 over the epochs; the same history gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, top1 = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    _line(loss, epochs, [each["loss"] for each in history], "training")
    for key, label in (("top1", "training"), ("validation_top1", "held out")):
        _line(top1, epochs, [each.get(key) for each in history], label)
    for axes, title in ((loss, "loss"), (top1, "top-1, %")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _line(axes: Any, epochs: Sequence[int], values: Sequence[float | None], label: str) -> None:
    known = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=label)
