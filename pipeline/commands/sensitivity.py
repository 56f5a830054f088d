"""Returns the command that says what quantizing each layer of a model costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.pipeline.commands.files import FILE
from edgeship.pipeline.commands.quantize import (
    calibrated,
    calibration_options,
    check_options,
    load_float,
    open_checked,
    rules_and_scheme,
)

if TYPE_CHECKING:
    from edgeship.calibration.types import WeightScheme


@click.command(short_help="What quantizing each layer costs by itself.")
@click.argument("model", type=FILE)
@click.option("--data", type=FILE, required=True, help="Samples: images, a CSV of them, an .npz, or a recipe.")
@calibration_options
@click.option("--plot", "picture", type=FILE, help="Draw the dearest layers to this .png, .svg or .pdf (matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def sensitivity(
    model: Path,
    data: Path,
    recipe: Path | None,
    samples: int,
    seed: int,
    targets: tuple[str, ...],
    weights: WeightScheme | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what quantizing each layer of a float MODEL.onnx costs by itself, the dearest layer first.

    With labels the cost is the increase of the cross entropy; without, the noise at the outputs.
    """
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.quantizing.sensitivity import Cache, facts, measure_layers, plot, plotter, table
    from edgeship.pipeline.quantizing.yardstick import Yardstick
    from edgeship.targets.onnxruntime import open_float

    if picture is not None:
        plotter(picture)
    check_options(options)
    rules, scheme = rules_and_scheme(targets, weights, "static")
    loaded = load_float(model)
    opened = open_checked(data, model, loaded, recipe, samples, seed)
    result = calibrated(loaded, opened, rules, scheme, options)
    with StepProgress("sensitivity") as progress:
        yardstick = Yardstick(open_float(to_bytes(loaded)), opened)
        costs = measure_layers(result.calibration.model, result.plan, yardstick, Cache(None), progress)
    if picture is not None:
        plot(costs, picture, model.name)
    click.echo(json.dumps(facts(costs, yardstick.unit), indent=2) if as_json else table(costs, yardstick.unit))


COMMANDS = (sensitivity,)
