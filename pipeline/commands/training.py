"""Returns the commands that train: compress, train."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE

FOLDER = click.option("-o", "--out", type=FILE, required=True, help="The folder to write; a killed run goes on in it.")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command(short_help="Prune a recipe's network, or distil it, and train it.")
@click.argument("recipe", type=FILE)
@FOLDER
@SET
@JSON
def compress(recipe: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Make the network of RECIPE smaller as its [compress] table says: pruning, distillation, training."""
    _run(recipe, out, overrides, as_json=as_json, prune=True)


@click.command(short_help="Fine-tune a recipe's network.")
@click.argument("recipe", type=FILE)
@FOLDER
@SET
@JSON
def train(recipe: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train the network of RECIPE as [compress.training] says, with the teacher of [compress.distill]; no pruning."""
    _run(recipe, out, overrides, as_json=as_json, prune=False)


def _run(recipe: Path, out: Path, overrides: tuple[str, ...], *, as_json: bool, prune: bool) -> None:
    from edgeship.pipeline.compress_sections import Compress
    from edgeship.pipeline.compress_summary import compress_rows
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.models import require_training
    from edgeship.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if out.exists() and not out.is_dir():
        raise InputError(f"-o {out} is a file; give a folder")
    if prune and loaded.compress is None:
        raise InputError(f"{recipe.name} has no [compress] table; add one, such as [compress.prune] with macs = 0.5")
    section = loaded.compress or Compress()
    section = section if prune else section.model_copy(update={"prune": None})
    require_training()
    from edgeship.pipeline.compression.outcome import compress_into

    with StepProgress("compress" if prune else "train") as progress:
        facts = compress_into(loaded, section, out, progress)
    if not facts:
        return  # another process of the same launch says it
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    for line in compress_rows(facts):
        click.echo(line)
    click.echo(f"wrote {out}; deploy it with: --set model.source={out / 'model.pt2'}")


COMMANDS = (compress, train)
