"""Returns the commands that train: compress, train."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

FOLDER = click.option("-o", "--out", type=FILE, required=True, help="The folder to write; a killed run goes on in it.")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
FORCE = click.option("--force", is_flag=True, help="Train again, even where the folder holds the result already.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command(short_help="Prune a recipe's network, or distil it, and train it.")
@click.argument("recipe", type=FILE)
@FOLDER
@SET
@FORCE
@JSON
def compress(recipe: Path, out: Path, overrides: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Make the network of RECIPE smaller as its [compress] table says: pruning, distillation, training."""
    _run(recipe, out, overrides, force=force, as_json=as_json, prune=True)


@click.command(short_help="Fine-tune a recipe's network.")
@click.argument("recipe", type=FILE)
@FOLDER
@SET
@FORCE
@JSON
def train(recipe: Path, out: Path, overrides: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Train the network of RECIPE as [compress.training] says, with the teacher of [compress.distill]; no pruning."""
    _run(recipe, out, overrides, force=force, as_json=as_json, prune=False)


def _run(recipe: Path, out: Path, overrides: tuple[str, ...], *, force: bool, as_json: bool, prune: bool) -> None:
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
    from edgeship.pipeline.compression.outcome import compress_into, finished_before

    name = "compress" if prune else "train"
    facts = None if force else finished_before(loaded, section, out)
    done = f"{out} is up to date"
    if facts:
        click.echo(f"{name}: {done}; --force trains again", err=True)
    if facts is None:
        done = f"wrote {out}"
        with StepProgress(name) as progress:
            facts = compress_into(loaded, section, out, progress)
    if not facts:
        return  # another process of the same launch says it
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
        return
    for line in compress_rows(facts):
        click.echo(line)
    click.echo(f"{done}; {_next_step(loaded, recipe, out, overrides, pruned=prune)}")


def _next_step(loaded: Recipe, recipe: Path, out: Path, overrides: Sequence[str], *, pruned: bool) -> str:
    """The command that goes on from the folder, as it can be typed."""
    given = [str(recipe), *(part for each in overrides for part in ("--set", each))]
    if loaded.compress is not None and (pruned or loaded.compress.prune is None):
        return f"deploy it with: {shlex.join(['edgeship', 'deploy', *given, '--compressed', str(out)])}"
    model = loaded.model.model_dump(exclude_none=True, exclude={"weights", "weights_key"})
    if loaded.compress is None:  # `train` needs no such table
        del model["args"]
        model["source"] = str(out.absolute() / "model.pt2")
        return f"deploy it with: {shlex.join(['edgeship', 'deploy', *given, '--set', f'model={_inline(model)}'])}"
    model["weights"] = str(out.absolute() / "weights.safetensors")
    command = ["edgeship", "compress", *given, "--set", f"model={_inline(model)}", "-o", f"{out}-pruned"]
    return f"prune it with: {shlex.join(command)}"


def _inline(value: Any) -> str:
    """The value as TOML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)} = {_inline(each)}' for name, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False)


COMMANDS = (compress, train)
