"""Returns the command that quantizes a model file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE
from edgeship.pipeline.commands.models import OUT, check_output

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Mode, QuantRules, WeightScheme

MODES = ("static", "dynamic", "float16", "int16")


@click.command(short_help="Quantize an ONNX model.")
@click.argument("model", type=FILE)
@OUT
@click.option("--data", type=FILE, help="Samples: images, a CSV of them, an .npz, or a recipe; for static and int16.")
@click.option("--recipe", type=FILE, help="How to preprocess images, where the model's metadata does not say.")
@click.option("--samples", type=click.IntRange(min=1), default=100, show_default=True, help="How many to use.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the samples.")
@click.option("--algorithm", default="minmax", show_default=True, help="The range algorithm.")
@click.option("--mode", type=click.Choice(MODES), default="static", show_default=True, help="How to quantize.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="For these targets' rules.  [default: all]")
@click.option("--weights", type=click.Choice(["full", "pair_limited"]), help="The weight scheme.  [default: safest]")
@click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per channel.")
@click.option(
    "--refine",
    "refinements",
    multiple=True,
    metavar="NAME",
    default=("bias_correction",),
    show_default=True,
    help="A refinement; several times for several, `none` for none.",
)
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
    **options: Any,
) -> None:
    """Quantize a float MODEL.onnx: to int8 (QDQ) with ranges chosen on real data, or in another mode.

    static: int8 weights and activations. int16: int8 weights, 16-bit activations. dynamic: int8 weights, activations
    rounded at run time. float16: float16 weights. The last two need no data.
    """
    from edgeship.calibration.onnx_file import load_onnx
    from edgeship.pipeline.quantized_source import check_is_float
    from edgeship.targets.base import load, names

    check_output(out, model, *([data] if data else []))
    chosen = [load(name) for name in targets or names()]
    rules = [target.rules for target in chosen]
    clips = mode in ("static", "dynamic") and any(target.weights == "pair_limited" for target in chosen)
    scheme: WeightScheme = weights or ("pair_limited" if clips else "full")
    loaded = load_onnx(model)
    check_is_float(loaded, str(model))
    if mode in ("dynamic", "float16"):
        _small_weights(loaded, out, rules, mode, scheme, per_tensor=options["per_tensor"])
        return
    if data is None:
        raise InputError(f"--mode {mode} chooses ranges on real samples; give --data (dynamic and float16 need none)")
    opened = _open(data, model, loaded, recipe).take(samples, seed)
    _calibrated(loaded, out, opened, rules, scheme, wide=mode == "int16", options=options)


def _small_weights(
    model: ir.Model, out: Path, rules: Sequence[QuantRules], mode: Mode, scheme: WeightScheme, *, per_tensor: bool
) -> None:
    from edgeship.calibration.onnx_file import to_bytes
    from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights
    from edgeship.pipeline.stages.quantize import combined
    from edgeship.pipeline.workspace import write_atomically

    if mode == "float16":
        small = float16_weights(model, ())
    else:
        small = int8_weights(model, combined(rules), (scheme,), (), per_tensor=per_tensor)
    (content,) = small.models.values()
    write_atomically(out, to_bytes(content))
    click.echo(f"wrote {out}: {small.count} weight tensors in {'float16' if mode == 'float16' else 'int8'}")


def _open(data: Path, path: Path, model: ir.Model, recipe: Path | None) -> Samples:
    """The samples; notes on them go to stderr."""
    from edgeship.pipeline.artifacts import input_shapes
    from edgeship.pipeline.commands.files import open_data

    return open_data(data, input_shapes(path), recipe=recipe, models=[path], calibration=True)


def _calibrated(
    model: ir.Model,
    out: Path,
    samples: Samples,
    rules: Sequence[QuantRules],
    scheme: WeightScheme,
    *,
    wide: bool,
    options: dict[str, Any],
) -> None:
    from edgeship.calibration.onnx_file import to_bytes
    from edgeship.calibration.samples.checks import Expected
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.quantizing.data import checked, classes_of
    from edgeship.pipeline.stages.quantize import quantize_model
    from edgeship.pipeline.workspace import write_atomically

    for finding in checked(samples, Expected(classes=classes_of(model)), "--data"):
        click.echo(f"note: {finding}", err=True)
    with StepProgress("quantize") as progress:
        result = quantize_model(
            model,
            samples,
            rules,
            algorithm=options["algorithm"],
            schemes=(scheme,),
            per_tensor=options["per_tensor"],
            refinements=() if options["refinements"] == ("none",) else options["refinements"],
            wide=wide,
            progress=progress,
        )
    write_atomically(out, to_bytes(result.models[scheme]))
    click.echo(f"wrote {out}: {len(result.plan.activations)} tensors quantized on {len(samples)} samples")
    click.echo(str(result.calibration.convergence))


COMMANDS = (quantize,)
