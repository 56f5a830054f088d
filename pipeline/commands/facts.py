"""Returns the commands that tell facts: init, targets, doctor, inspect."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from edgeship.calibration.errors import InputError

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=FILE, default=".")
@click.option("--model", type=FILE, help="The model the recipe is for: .onnx, .pt2 or a .py file with a factory.")
def init(folder: Path, model: Path | None) -> None:
    """Write a commented recipe.toml into FOLDER; an existing one is left alone."""
    from edgeship.pipeline.recipe_template import recipe_text
    from edgeship.pipeline.workspace import write_atomically

    path = folder / "recipe.toml"
    if path.exists():
        raise InputError(f"{path} exists already; it was left as it is")
    if model is not None and not model.is_file():
        raise InputError(f"there is no model {model}")
    write_atomically(path, recipe_text(folder, model))
    click.echo(f"wrote {path}; fill in what is marked with TODO, then: edgeship deploy {path}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def targets(as_json: bool) -> None:
    """List the targets, whether their runtime is installed, and how to install it."""
    from edgeship.targets.base import load, names

    facts = {}
    for name in names():
        target = load(name)
        facts[name] = {**asdict(target.availability()), "suffix": target.suffix, "weights": target.weights}
    if as_json:
        click.echo(json.dumps({"targets": facts}, indent=2))
        return
    for name, fact in facts.items():
        state = f"installed, version {fact['version']}" if fact["installed"] else f"not installed: {fact['install']}"
        click.echo(f"{name:<14} model{fact['suffix']:<8} {state}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(as_json: bool) -> None:
    """Show versions and CPU features, and what they mean for int8."""
    from edgeship.pipeline.machine import cpu, doctor_facts, machine_facts

    facts, sentences = machine_facts(), doctor_facts()
    if as_json:
        click.echo(json.dumps({**facts, "findings": sentences}, indent=2))
        return
    click.echo(
        f"{cpu().model}, {cpu().cores} cores, {cpu().architecture}: {', '.join(cpu().features) or 'no int8 features'}"
    )
    click.echo(f"{facts['system']}, Python {facts['python']}")
    for name, version in facts["versions"].items():
        click.echo(f"  {name:<16} {version}")
    for sentence in sentences:
        click.echo(sentence)


@click.command()
@click.argument("model", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: Path, as_json: bool) -> None:
    """Show inputs, outputs, operators, int8 share, size and quantization of MODEL (ONNX or TFLite)."""
    from edgeship.pipeline.inspection import inspect_model

    facts = inspect_model(model)
    if as_json:
        click.echo(json.dumps(facts.to_json(), indent=2))
    else:
        width = max(len(name) for name, _ in facts.rows())
        for name, value in facts.rows():
            click.echo(f"{name:<{width}}  {value}")


COMMANDS = (init, targets, doctor, inspect)
