"""Returns the command that quantizes a model file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE
from edgeship.pipeline.commands.models import OUT, SHAPE, check_output, load_shaped, note_suffix

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Mode, QuantRules, WeightScheme
    from edgeship.pipeline.commands.shapes import Given
    from edgeship.pipeline.quantizing.calibrated import Quantized

MODES = ("static", "dynamic", "float16", "int16")


def calibration_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that say how ranges are chosen, and for whose rules."""
    options = (
        click.option("--recipe", type=FILE, help="How to preprocess images, where the model's metadata does not say."),
        click.option("--samples", type=click.IntRange(min=1), default=100, show_default=True, help="How many to use."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the samples."),
        click.option("--algorithm", default="minmax", show_default=True, help="The range algorithm."),
        click.option(
            "--weight-algorithm", default="minmax", show_default=True, help="The range algorithm of the weights."
        ),
        click.option(
            "--target", "targets", multiple=True, metavar="NAME", help="For these targets' rules.  [default: all]"
        ),
        click.option(
            "--weights", type=click.Choice(["full", "pair_limited"]), help="The weight scheme.  [default: safest]"
        ),
        click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per channel."),
        click.option(
            "--refine",
            "refinements",
            multiple=True,
            metavar="NAME",
            default=("gptq", "bias_correction"),
            show_default=True,
            help="A refinement; several times for several, `none` for none.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(short_help="Quantize an ONNX model.")
@click.argument("model", type=FILE)
@OUT
@click.option("--data", type=FILE, help="Samples: images, a CSV of them, an .npz, or a recipe; for static and int16.")
@click.option("--mode", type=click.Choice(MODES), default="static", show_default=True, help="How to quantize.")
@SHAPE
@calibration_options
def quantize(
    model: Path,
    out: Path,
    data: Path | None,
    recipe: Path | None,
    samples: int,
    seed: int,
    mode: Mode,
    targets: tuple[str, ...],
    weights: WeightScheme | None,
    shapes: tuple[Given, ...],
    **options: Any,
) -> None:
    """Quantize a float MODEL.onnx: to int8 (QDQ) with ranges chosen on real data, or in another mode.

    static: int8 weights and activations. int16: int8 weights, 16-bit activations. dynamic: int8 weights, activations
    rounded at run time. float16: float16 weights. The last two need no data.
    """
    check_output(out, model, *([data] if data else []))
    check_options(options)
    rules, scheme = rules_and_scheme(targets, weights, mode)
    loaded = load_float(model, shapes)
    if mode in ("dynamic", "float16"):
        _refuse_ignored(mode)
        _small_weights(loaded, out, rules, mode, scheme, per_tensor=options["per_tensor"])
        return
    if data is None:
        raise InputError(f"--mode {mode} chooses ranges on real samples; give --data (dynamic and float16 need none)")
    opened = open_checked(data, model, loaded, recipe, samples, seed)
    result = calibrated(loaded, opened, rules, scheme, options, wide=mode == "int16")
    _write(out, loaded, opened, result, scheme)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises InputError for an algorithm or refinement that there is not, before a model or sample is read."""
    from edgeship.calibration.quantize import check_names

    check_names(options["algorithm"], options["weight_algorithm"], _refinements(options))


def _refinements(options: Mapping[str, Any]) -> tuple[str, ...]:
    given: tuple[str, ...] = options["refinements"]
    if "none" not in given:
        return given
    others = [name for name in given if name != "none"]
    if others:
        raise InputError(
            f"--refine none beside --refine {' --refine '.join(others)}; accepted: none alone, or without it"
        )
    return ()


def load_float(path: Path, shapes: Sequence[Given] = ()) -> ir.Model:
    """The float model in the file, in float32, with the sizes that `--shape` gives, and all shapes that follow.

    Raises InputError for a model that is quantized already.
    """
    from edgeship.pipeline.onnx_form import infer_shapes
    from edgeship.pipeline.quantized_source import check_is_float
    from edgeship.pipeline.source_types import take_floats, widen

    loaded = load_shaped(path, shapes)
    check_is_float(loaded, str(path))
    if widen(loaded):
        click.echo(f"note: {path} is float16, and float32 from here on", err=True)
    for name in take_floats(loaded, str(path)):
        click.echo(
            f"note: input {name} of {path} takes pixels of uint8, and the same numbers as float32 here", err=True
        )
    infer_shapes(loaded)  # many exporters leave them out of the file
    return loaded


def _refuse_ignored(mode: Mode) -> None:
    """Raises InputError for an option on the command line that a mode without ranges would ignore."""
    context = click.get_current_context()
    accepted: dict[str, tuple[str, ...]] = dict.fromkeys(
        ("algorithm", "weight_algorithm", "refinements"), ("static", "int16")
    )
    accepted |= {"weights": ("static", "int16", "dynamic"), "per_tensor": ("static", "int16", "dynamic")}
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and mode not in accepted.get(name, MODES) and context.params[name] != ("none",):
            raise InputError(
                f"--mode {mode} would ignore {parameter.opts[0]}; accepted with {', '.join(accepted[name])}"
            )


def rules_and_scheme(
    targets: Sequence[str], weights: WeightScheme | None, mode: Mode
) -> tuple[list[QuantRules], WeightScheme]:
    """The rules of the targets (all where none is named), and the weight scheme that none of them clips with."""
    from edgeship.targets.base import load, names

    chosen = [load(name) for name in targets or names()]
    clips = mode in ("static", "dynamic") and any(target.weights == "pair_limited" for target in chosen)
    return [target.rules for target in chosen], weights or ("pair_limited" if clips else "full")


def _small_weights(
    model: ir.Model, out: Path, rules: Sequence[QuantRules], mode: Mode, scheme: WeightScheme, *, per_tensor: bool
) -> None:
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.quantizing.calibrated import combined
    from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights
    from edgeship.pipeline.workspace import write_atomically

    if mode == "float16":
        small = float16_weights(model, ())
    else:
        small = int8_weights(model, combined(rules), (scheme,), (), per_tensor=per_tensor)
    (content,) = small.models.values()
    write_atomically(out, to_bytes(content))
    note_suffix(out)
    click.echo(f"wrote {out}: {small.count} weight tensors in {'float16' if mode == 'float16' else 'int8'}")


def open_checked(data: Path, path: Path, model: ir.Model, recipe: Path | None, samples: int, seed: int) -> Samples:
    """The samples of `--data`; notes on them go to stderr. Raises InputError for samples that are useless."""
    from edgeship.calibration.samples.checks import Expected
    from edgeship.pipeline.artifacts import shapes_of
    from edgeship.pipeline.commands.files import open_data
    from edgeship.pipeline.quantizing.data import checked, classes_of, declared_of
    from edgeship.pipeline.quantizing.plausibility import doubts
    from edgeship.pipeline.recipe import load_recipe
    from edgeship.pipeline.source_types import pixel_inputs

    every = open_data(data, shapes_of(model), recipe=recipe, models=[path], calibration=True)
    opened = every.take(samples, seed)
    says = data if data.suffix == ".toml" else recipe
    declared = declared_of(data, model, load_recipe(says) if says else None)
    expected = Expected(declared, classes=classes_of(model), pixels=pixel_inputs(model))
    notes = checked(opened, expected, f"--data {data}")
    for finding in [*notes, *doubts(model, classes_of(model), opened)]:
        click.echo(f"note: {finding}", err=True)
    return opened


def calibrated(
    model: ir.Model,
    samples: Samples,
    rules: Sequence[QuantRules],
    scheme: WeightScheme,
    options: Mapping[str, Any],
    *,
    wide: bool = False,
) -> Quantized:
    """The model quantized with the options of the command line."""
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.quantizing.calibrated import quantize_model

    with StepProgress("quantize") as progress:
        return quantize_model(
            model,
            samples,
            rules,
            algorithm=options["algorithm"],
            weight_algorithm=options["weight_algorithm"],
            schemes=(scheme,),
            per_tensor=options["per_tensor"],
            refinements=_refinements(options),
            wide=wide,
            progress=progress,
        )


def _write(out: Path, model: ir.Model, samples: Samples, result: Quantized, scheme: WeightScheme) -> None:
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.quantizing.in_short import in_short
    from edgeship.pipeline.workspace import write_atomically

    write_atomically(out, to_bytes(result.models[scheme]))
    note_suffix(out)
    seen = result.calibration
    click.echo(f"wrote {out}: {len(result.plan.activations)} tensors quantized on {seen.samples} samples")
    for line in in_short(model, samples, result, scheme):
        click.echo(line)


COMMANDS = (quantize,)
