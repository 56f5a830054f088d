"""Returns what quantizing each layer costs by itself: the model with this one layer in integers against the float one.

Layers that were measured before (the same plan, samples and float outputs) are read from a cache, so that a killed
run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.quantizing.yardstick import Cost, Yardstick

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import QuantPlan
    from edgeship.pipeline.stage import Progress

PLOTTED = 40
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class LayerCost:
    """One layer: its node, operator, multiply-accumulates, and what its quantization costs by itself."""

    layer: str
    operator: str
    macs: int
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"layer": self.layer, "operator": self.operator, "macs": self.macs, **self.cost.to_json()}


class Cache:
    """Costs by key in one JSON file, written after each; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                loaded = json.loads(path.read_text())
                self._known = loaded if isinstance(loaded, dict) else {}
            except (OSError, ValueError):
                self._known = {}  # a damaged cache is no cache

    def get(self, key: str, make: Callable[[], Cost]) -> Cost:
        """The cost kept under `key`, or else what `make` returns, kept from now on."""
        from edgeship.pipeline.workspace import write_json

        try:
            return Cost.from_json(self._known[key])
        except (KeyError, TypeError):
            cost = make()
        self._known[key] = cost.to_json()
        if self._path is not None:
            write_json(self._path, self._known)
        return cost


def measure_layers(
    model: ir.Model, plan: QuantPlan, yardstick: Yardstick, cache: Cache, progress: Progress
) -> list[LayerCost]:
    """Every integer layer's own cost, the dearest first."""
    from edgeship.calibration.graph.macs import count_macs
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.calibration.planning.subset import layers_of, restricted
    from edgeship.calibration.writing.qdq import apply_plan
    from edgeship.targets.onnxruntime import open_simulation

    macs = count_macs(model)
    layers = layers_of(model, plan)
    samples = yardstick.digest()
    costs = []
    for done, (name, node) in enumerate(layers.items()):
        progress(done, len(layers), f"sensitivity of {name}")
        alone = restricted(model, plan, [name])

        def measured(alone: QuantPlan = alone) -> Cost:
            return yardstick.cost(open_simulation(to_bytes(apply_plan(model, alone))))

        key = hashlib.sha256(f"{samples} {alone.digest()}".encode()).hexdigest()
        costs.append(LayerCost(name, node.op_type, macs.get(name, 0), cache.get(key, measured)))
    progress(len(layers), len(layers), "sensitivity")
    return sorted(costs, key=lambda each: (*(-value for value in each.cost.rank), each.layer))


def table(costs: Sequence[LayerCost], unit: str) -> str:
    """The layers as text, the dearest first."""
    width = max([len("layer"), *(len(each.layer) for each in costs)])
    head = f"{'layer':<{width}}  {'operator':<13} {'MACs':>12}"
    lines = [f"{head}  {'SQNR':>9}  {'agreement':>9}  {'loss':>9}  drop ({unit})"]
    for each in costs:
        sqnr = "equal" if each.cost.noise <= 0 else f"{each.cost.sqnr_db:.1f} dB"
        agreement = "-" if each.cost.agreement is None else f"{100 * each.cost.agreement:.2f} %"
        loss = "-" if each.cost.loss is None else f"{each.cost.loss:+.4f}"
        drop = "-" if each.cost.drop is None else f"{each.cost.drop:+.2f}"
        row = f"{each.layer:<{width}}  {each.operator:<13} {each.macs:>12,}"
        lines.append(f"{row}  {sqnr:>9}  {agreement:>9}  {loss:>9}  {drop}")
    return "\n".join(lines)


def plotter(path: Path) -> None:
    """Raises InputError where nothing can be drawn to `path`: before anything is measured."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if path.suffix.lower() not in PICTURES or not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path} cannot be drawn; accepted: {', '.join(PICTURES)} in a folder that exists")


def plot(costs: Sequence[LayerCost], path: Path, title: str) -> None:
    """Draws the dearest layers as bars to `path`. Raises InputError for a file that cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(costs)[:PLOTTED]
    figure = Figure(figsize=(8, 1 + 0.25 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh([each.layer for each in shown], [each.cost.noise for each in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("noise by signal at the outputs")
    axes.set_title(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path} cannot be written: {error}") from error


def facts(costs: Sequence[LayerCost], unit: str) -> Mapping[str, Any]:
    """The layers as plain values."""
    return {
        "unit": unit,
        "samples": costs[0].cost.samples if costs else 0,
        "layers": [each.to_json() for each in costs],
    }
