"""Returns the commands that judge models: compare, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import DEVICE, FILE

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
DATA = click.option("--data", type=FILE, required=True, help="Samples: images, a CSV of them, an .npz, or a recipe.")
RECIPE = click.option("--recipe", type=FILE, help="How to preprocess images, where no model's metadata says it.")


@click.command(short_help="Compare the outputs of two models.")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@DATA
@RECIPE
@click.option("--samples", type=click.IntRange(min=1), default=20, show_default=True, help="How many to use.")
@click.option("--layers", is_flag=True, help="Also every tensor that both models have, layer by layer.")
@DEVICE
@JSON
def compare(
    a: Path, b: Path, data: Path, recipe: Path | None, samples: int, layers: bool, device: str, as_json: bool
) -> None:
    """Compare the outputs of models A and B: .onnx, .tflite, or a recipe for its float model. B runs on the device."""
    from edgeship.pipeline.commands.files import device_of, input_shapes_of, open_data, open_model, open_model_on
    from edgeship.pipeline.commands.naming import Renamed, other_names
    from edgeship.pipeline.compare import Comparison
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.explanation import explain
    from edgeship.pipeline.layers import BUDGET, LayerComparison, describe, open_layers, steps_of, to_json

    where = device_of(device, recipe or (data if data.suffix == ".toml" else None))
    first = open_model(a)
    inside = LayerComparison(open_layers(a, as_reference=True), open_layers(b, as_reference=False)) if layers else None
    opened = open_data(data, input_shapes_of(first), recipe=recipe, models=[a, b]).take(samples)
    with StepProgress("compare") as progress, where, open_model_on(where, b) as theirs:
        inputs = other_names(first.inputs, theirs.inputs, "input")
        outputs = other_names(first.outputs, theirs.outputs, "output")
        second = Renamed(theirs, inputs, outputs)
        steps = {outputs[name]: step for name, step in steps_of(b).items()}
        comparison = Comparison(steps or steps_of(a))
        for done, sample in enumerate(opened):
            progress(done, len(opened), "samples")
            comparison.update(first.run(sample.feeds), second.run(sample.feeds))
            if inside is not None:
                inside.update(sample.feeds)
    facts = {
        "a": str(a),
        "b": str(b),
        "samples": comparison.samples,
        "agreement": comparison.agreement,
        "outputs": {name: difference.to_json() for name, difference in comparison.differences().items()},
    }
    found = [] if inside is None else inside.result()
    if as_json:
        inner = {"layers": [to_json(layer) for layer in found], "explanation": explain(found, BUDGET)} if layers else {}
        click.echo(json.dumps({**facts, **inner}, indent=2))
        return
    click.echo("\n".join([_compared(facts), *([describe(found)] if found else [])]))


def _compared(facts: dict[str, Any]) -> str:
    lines = [f"{facts['b']} against {facts['a']} on {facts['samples']} samples"]
    width = max(len(name) for name in facts["outputs"])
    for name, values in facts["outputs"].items():
        sqnr = _sqnr(values)
        unit = "steps" if values["step_kind"] == "quantized" else "of 255 parts of its range"
        steps = "no step to count in" if values["max_steps"] is None else f"max {values['max_steps']:.3g} {unit}"
        lines.append(
            f"  {name:<{width}}  max {values['max_abs']:.3g}, mean {values['mean_abs']:.3g}, SQNR {sqnr}, "
            f"cosine {values['cosine']:.6f}, {steps}"
        )
    if facts["agreement"] is not None:
        lines.append(f"  same decision: {100 * facts['agreement']:.2f} %")
    return "\n".join(lines)


def _sqnr(values: dict[str, Any]) -> str:
    if values["sqnr_db"] is not None:
        return f"{values['sqnr_db']:.1f} dB"
    return "equal" if not values["max_abs"] else "none: the reference never moves"


@click.command(short_help="Score a model on labelled data.")
@click.argument("model", type=FILE)
@DATA
@RECIPE
@click.option("--labels", type=FILE, help="A CSV (file,label), where the data has no labels of its own.")
@click.option("--samples", type=click.IntRange(min=1), help="How many to use.  [default: all]")
@JSON
def evaluate(
    model: Path, data: Path, recipe: Path | None, labels: Path | None, samples: int | None, as_json: bool
) -> None:
    """Score MODEL on labelled data: top-1, top-5, n and the 95 % interval."""
    from edgeship.pipeline.commands.files import input_shapes_of, open_data, open_model
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.quantizing.plausibility import folder_notes
    from edgeship.pipeline.scoring import Score, class_scores

    session = open_model(model)
    every = open_data(data, input_shapes_of(session), recipe=recipe, labels=labels, models=[model])
    opened = every if samples is None else every.take(samples)
    if not opened.has_labels:
        where = {".npz": "accepted: the classes under the key label", ".toml": "set data.labels in it"}
        accepted = where.get(data.suffix.lower(), "give --labels CSV with the columns file,label")
        raise InputError(f"{data} has no labels; {accepted}")
    score = Score()
    with StepProgress("evaluate") as progress:
        for done, sample in enumerate(opened):
            progress(done, len(opened), "samples")
            values = class_scores(session.run(sample.feeds))
            if values is None or sample.label is None:
                raise InputError(f"{model} has no output of shape (1, classes) to compare labels with")
            score.update(values, sample.label, sample.name)
    for note in folder_notes(every, score.classes):
        click.echo(f"note: {note}", err=True)
    facts = score.to_json()
    if as_json:
        click.echo(json.dumps({"model": str(model), **facts}, indent=2))
        return
    top5 = "" if facts["top5"] is None else f", top-5 {facts['top5']:.2f} %"
    low, high = facts["interval"]
    click.echo(f"top-1 {facts['top1']:.2f} % (95 %: {low:.2f} .. {high:.2f}){top5}, n = {facts['n']}")


COMMANDS = (compare, evaluate)
