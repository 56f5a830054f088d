"""Returns the command that scores a model: evaluate; compare.py has the one that compares two."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
DATA = click.option("--data", type=FILE, required=True, help="Samples: images, a CSV of them, an .npz, or a recipe.")
RECIPE = click.option("--recipe", type=FILE, help="How to preprocess images, where no model's metadata says it.")


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


COMMANDS = (evaluate,)
