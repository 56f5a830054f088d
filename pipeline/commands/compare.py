"""Returns the command that compares two models, or the artifacts of two releases, on the same samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import GateError, InputError
from edgeship.pipeline.commands.files import DEVICE, FILE
from edgeship.pipeline.commands.limits import Finite

if TYPE_CHECKING:
    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Session
    from edgeship.pipeline.devices.base import Device
    from edgeship.pipeline.layers import LayerComparison, LayerDifference
    from edgeship.pipeline.versus import Limits

FEW = 20


@click.command(short_help="Compare the outputs of two models, or of two releases.")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--data", type=FILE, required=True, help="Samples: images, a CSV of them, an .npz, or a recipe.")
@click.option("--labels", type=FILE, help="A CSV (file,label), where the data has no labels of its own.")
@click.option("--recipe", type=FILE, help="How to preprocess images, where no model's metadata says it.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help=f"How many to use.  [default: {FEW}; all of two releases, or with a limit]",
)
@click.option("--layers", is_flag=True, help="Also every tensor that both models have, layer by layer.")
@click.option("--max-drop", type=Finite(), metavar="POINTS", help="Top-1 that B may lose, in percentage points.")
@click.option("--min-agreement", type=Finite(0, 1), metavar="SHARE", help="Equal decisions, 0..1.")
@click.option(
    "--min-sqnr", type=Finite(), metavar="DB", help="Signal to noise of B's worst output, with A as the signal."
)
@click.option("--max-steps", type=Finite(0), help="The largest difference, in quantization steps.")
@click.option("--max-growth", type=Finite(), metavar="PCT", help="By how much B's file may be larger.")
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compare(
    a: Path,
    b: Path,
    data: Path,
    labels: Path | None,
    recipe: Path | None,
    samples: int | None,
    layers: bool,
    device: str,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Compare the outputs of models A and B: .onnx, .tflite, or a recipe for its float model. B runs on the device.

    Two folders are two releases (or runs that made one), whose artifacts are compared target by target. Where a limit
    is not met, the exit code is 3.
    """
    from edgeship.pipeline.commands.files import device_of
    from edgeship.pipeline.versus import Limits

    given = Limits(**limits)
    count = samples or (None if given or a.is_dir() else FEW)
    asked = _Asked(data, labels, recipe, count, layers, given)
    where = device_of(device, recipe or (data if data.suffix == ".toml" else None))
    if a.is_dir() or b.is_dir():
        facts, texts = _releases(a, b, asked, where)
    else:
        with where:
            found = _models(a, b, asked, where)
        facts, texts = found.facts, [found.text]
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(texts))
    _refuse(facts)


@dataclass(frozen=True)
class _Asked:
    """What to compare on, how many samples (None: all), whether layer by layer, and what is accepted."""

    data: Path
    labels: Path | None
    recipe: Path | None
    count: int | None
    layers: bool
    limits: Limits


@dataclass(frozen=True)
class _Compared:
    """What two models differ in, as plain values, and layer by layer where that was asked for."""

    facts: dict[str, Any]
    layers: Sequence[LayerDifference]

    @property
    def text(self) -> str:
        """The same as lines for a person."""
        from edgeship.pipeline.layers import describe
        from edgeship.pipeline.versus import described

        return "\n".join([described(self.facts), *([describe(self.layers)] if self.layers else [])])


def _releases(a: Path, b: Path, asked: _Asked, where: Device) -> tuple[dict[str, Any], list[str]]:
    """The artifacts of two releases, target by target: the facts, and lines for a person."""
    from edgeship.pipeline.releasing.pairs import pair_releases

    pairs = pair_releases(a, b)
    for line in pairs.alone:
        click.echo(f"note: {line}", err=True)
    with where:
        found = {target: _models(*files, asked, where) for target, files in pairs.artifacts.items()}
    changed = [f"changed: {line}" for line in pairs.changes] or ["changed: nothing that the manifests tell"]
    figures = {target: each.facts for target, each in found.items()}
    facts = {"a": str(a), "b": str(b), "changes": list(pairs.changes), "targets": figures}
    return facts, [*changed, *(each.text for each in found.values())]


def _models(a: Path, b: Path, asked: _Asked, where: Device) -> _Compared:
    """Two models on the same samples, B on a connected device."""
    from edgeship.pipeline.commands.files import open_model, open_model_on
    from edgeship.pipeline.commands.naming import Renamed, other_names
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.explanation import explain
    from edgeship.pipeline.layers import BUDGET, steps_of, to_json
    from edgeship.pipeline.versus import Versus, check_limits

    first = open_model(a)
    inside = _open_layers(a, b) if asked.layers else None
    with StepProgress("compare") as progress, open_model_on(where, b) as theirs:
        outputs = other_names(first.outputs, theirs.outputs, "output")
        second = Renamed(theirs, other_names(first.inputs, theirs.inputs, "input"), outputs)
        steps = {outputs[name]: step for name, step in steps_of(b).items()}
        versus = Versus(steps or steps_of(a))
        samples = _samples((a, first), (b, second), asked)
        for done, (ours, his) in enumerate(zip(*samples, strict=True)):
            progress(done, len(samples[0]), "samples")
            versus.update(first.run(ours.feeds), second.run(his.feeds), ours)
            if inside is not None:
                inside.update(ours.feeds)
    facts = versus.facts(a, b)
    check_limits(asked.limits, facts)
    facts["limits"] = asked.limits.judge(facts)
    found = [] if inside is None else inside.result()
    if inside is not None:
        facts |= {"layers": [to_json(layer) for layer in found], "explanation": explain(found, BUDGET)}
    return _Compared(facts, found)


def _open_layers(a: Path, b: Path) -> LayerComparison:
    from edgeship.pipeline.commands.naming import other_names
    from edgeship.pipeline.layers import LayerComparison, open_layers

    ours, theirs = open_layers(a, as_reference=True), open_layers(b, as_reference=False)
    return LayerComparison(ours, theirs, other_names(ours.inputs, theirs.inputs, "input"))


def _samples(a: tuple[Path, Session], b: tuple[Path, Session], asked: _Asked) -> tuple[Samples, Samples]:
    """The samples as A takes them and as B does: images as each model's own metadata says, where both say it.

    Raises InputError where both would be needed layer by layer.
    """
    from edgeship.pipeline.commands.files import input_shapes_of, open_data, preprocessing_of

    shapes = [input_shapes_of(session) for _, session in (a, b)]

    def opened(models: Sequence[Path], inputs: Mapping[str, Sequence[int]]) -> Samples:
        every = open_data(asked.data, inputs, recipe=asked.recipe, labels=asked.labels, models=models)
        return every if asked.count is None else every.take(asked.count)

    ours = opened([a[0], b[0]], shapes[0])
    if asked.recipe is not None or asked.data.suffix.lower() in (".npz", ".toml"):
        return ours, ours
    one, other = (
        preprocessing_of(None, [model], next(iter(s.values()))) for (model, _), s in zip((a, b), shapes, strict=True)
    )
    if one is None or other is None:
        return ours, ours
    differing = [field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)]
    if not differing or (differing == ["shape"] and one.shape[1:] == other.shape[1:]):
        return ours, ours
    if asked.layers:
        raise InputError(
            f"--layers: {a[0]} and {b[0]} make inputs of images in other ways; accepted: --recipe, or .npz"
        )
    click.echo(f"note: {a[0]} and {b[0]} make inputs otherwise ({', '.join(differing)}): each gets its own", err=True)
    return ours, opened([b[0]], shapes[1])


def _refuse(facts: Mapping[str, Any]) -> None:
    """Raises GateError with every limit that is not met."""
    from edgeship.pipeline.versus import limit_text

    judged = facts.get("targets", {"": facts})
    missed = [
        f"{target}: {limit_text(each)}" if target else limit_text(each)
        for target, found in judged.items()
        for each in found["limits"]
        if not each["met"]
    ]
    if missed:
        count = "a limit is" if len(missed) == 1 else f"{len(missed)} limits are"
        raise GateError("\n".join([f"{count} not met: {missed[0]}", *(f"  - {line}" for line in missed[1:])]))


COMMANDS = (compare,)
