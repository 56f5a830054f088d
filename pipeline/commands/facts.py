"""Returns the commands that tell facts: init, targets, doctor, inspect."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE


@click.command(short_help="Write a commented recipe.toml.")
@click.argument("folder", type=FILE, default=".")
@click.option("--model", type=FILE, help="The model the recipe is for: .onnx, .pt2, PATH.py or PATH.py:factory.")
def init(folder: Path, model: Path | None) -> None:
    """Write a commented recipe.toml into FOLDER; an existing one is left alone."""
    from edgeship.pipeline.defined_names import check_factory
    from edgeship.pipeline.recipe_template import SUFFIXES, recipe_text, split_factory
    from edgeship.pipeline.workspace import write_atomically

    path = folder / "recipe.toml"
    if path.exists():
        raise InputError(f"{path} exists already; it was left as it is")
    model, factory = split_factory(model)
    if model is not None and not model.is_file():
        raise InputError(f"there is no model {model}")
    if model is not None and model.suffix not in SUFFIXES:
        raise InputError(f"--model {model}: a recipe cannot start from it; accepted: {', '.join(SUFFIXES)}")
    note = check_factory(model, factory) if model is not None and factory else None
    write_atomically(path, recipe_text(folder, model, factory))
    if note:
        click.echo(f"note: {note}", err=True)
    click.echo(f"wrote {path}; fill in what is marked with TODO, then: edgeship deploy {path}")


@click.command(short_help="List the targets and whether their runtime is installed.")
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


@click.command(short_help="Show versions, CPU features and what they mean for int8.")
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


@click.command(short_help="Show what a model is made of: ONNX or TFLite.")
@click.argument("model", type=FILE)
@click.option("--target", metavar="NAME", help="Also say what stands in the way of converting an ONNX model for it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: Path, target: str | None, as_json: bool) -> None:
    """Show inputs, outputs, operators, int8 share, size and quantization of MODEL (ONNX or TFLite)."""
    from edgeship.pipeline.inspection import inspect_model

    facts = inspect_model(model)
    refusals, in_float = (None, []) if target is None else _judged(model, target)
    if as_json:
        document = (
            facts.to_json() if refusals is None else {**facts.to_json(), "refusals": refusals, "in_float": in_float}
        )
        click.echo(json.dumps(document, indent=2))
        return
    width = max(len(name) for name, _ in facts.rows())
    for name, value in facts.rows():
        click.echo(f"{name:<{width}}  {value}")
    if refusals is not None:
        click.echo(f"{target}: {len(refusals)} things stand in the way" if refusals else f"{target}: can be converted")
        for refusal in refusals:
            click.echo(f"  {refusal}")
        for note in in_float:
            click.echo(f"  in float: {note}")


def _judged(model: Path, target: str) -> tuple[list[str], list[str]]:
    """The nodes that the target cannot take, and those of a quantized model that it computes in float, with reasons."""
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.targets.base import load

    chosen, loaded = load(target), load_onnx(model)
    refusals, notes = chosen.check(loaded), chosen.notes(loaded)
    return [str(finding) for finding in refusals], [str(finding) for finding in notes]


COMMANDS = (init, targets, doctor, inspect)
