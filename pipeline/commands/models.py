"""Returns the commands that make one model of another: export, simplify, quantize, convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeship.calibration.errors import InputError
from edgeship.pipeline.commands.files import FILE

if TYPE_CHECKING:
    from edgeship.calibration.types import Mode, WeightScheme
    from edgeship.targets.base import IoDtype, IoLayout

MODES = ("static", "dynamic", "float16", "int16")
OUT = click.option("-o", "--out", type=FILE, required=True, help="The file to write; replaced by a complete new one.")


def check_output(out: Path, *inputs: Path) -> None:
    """Raises InputError where writing `out` would fail or overwrite one of `inputs`."""
    if out.is_dir():
        raise InputError(f"-o {out} is a folder; give a file")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"-o {out} is the input; inputs are never modified")
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.absolute().parent}")


@click.command(short_help="Export a recipe's model to checked ONNX.")
@click.argument("recipe", type=FILE)
@OUT
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
def export(recipe: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Export the model of RECIPE to ONNX, checked against its framework."""
    from edgeship.pipeline.recipe import load_recipe
    from edgeship.pipeline.stages.export import export_recipe

    loaded = load_recipe(recipe, overrides)
    check_output(out, recipe, *([loaded.source_path] if loaded.source_path else []))
    result = export_recipe(loaded, out)
    click.echo(f"wrote {out}: opset {result.facts['opset']}, {result.facts['parameters']:,} parameters")


@click.command(short_help="Simplify an ONNX model.")
@click.argument("model", type=FILE)
@OUT
def simplify(model: Path, out: Path) -> None:
    """Simplify MODEL.onnx into the form that the quantizer and the targets want."""
    from edgeship.calibration.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.simplification.simplifier import simplify_model
    from edgeship.pipeline.workspace import write_atomically

    check_output(out, model)
    result = simplify_model(load_onnx(model))
    write_atomically(out, to_bytes(result.model))
    for note in result.notes:
        click.echo(note, err=True)
    before, after = sum(result.before.values()), sum(result.after.values())
    click.echo(f"wrote {out}: {before} operators became {after}")


@click.command(short_help="Quantize an ONNX model to int8 on real data.")
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
    algorithm: str,
    mode: Mode,
    targets: tuple[str, ...],
    weights: WeightScheme | None,
    per_tensor: bool,
    refinements: tuple[str, ...],
) -> None:
    """Quantize a float MODEL.onnx: to int8 (QDQ) with ranges chosen on real data, or in another mode.

    static: int8 weights and activations. int16: int8 weights, 16-bit activations. dynamic: int8 weights, activations
    rounded at run time. float16: float16 weights. The last two need no data.
    """
    from edgeship.calibration.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.artifacts import input_shapes
    from edgeship.pipeline.commands.files import open_data
    from edgeship.pipeline.console import StepProgress
    from edgeship.pipeline.quantizing.weight_only import float16_weights, int8_weights
    from edgeship.pipeline.stages.quantize import combined, quantize_model
    from edgeship.pipeline.workspace import write_atomically
    from edgeship.targets.base import load, names

    check_output(out, model, *([data] if data else []))
    chosen = [load(name) for name in targets or names()]
    rules = [target.rules for target in chosen]
    clips = mode in ("static", "dynamic") and any(target.weights == "pair_limited" for target in chosen)
    scheme: WeightScheme = weights or ("pair_limited" if clips else "full")
    if mode in ("dynamic", "float16"):
        loaded = load_onnx(model)
        if mode == "float16":
            scheme, small = "full", float16_weights(loaded, ())
        else:
            small = int8_weights(loaded, combined(rules), (scheme,), (), per_tensor=per_tensor)
        write_atomically(out, to_bytes(small.models[scheme]))
        click.echo(f"wrote {out}: {small.count} weight tensors in {'float16' if mode == 'float16' else 'int8'}")
        return
    if data is None:
        raise InputError(f"--mode {mode} chooses ranges on real samples; give --data (dynamic and float16 need none)")
    opened = open_data(data, input_shapes(model), recipe=recipe, models=[model], calibration=True).take(samples, seed)
    with StepProgress("quantize") as progress:
        result = quantize_model(
            load_onnx(model),
            opened,
            rules=rules,
            algorithm=algorithm,
            schemes=(scheme,),
            per_tensor=per_tensor,
            refinements=() if refinements == ("none",) else refinements,
            wide=mode == "int16",
            progress=progress,
        )
    write_atomically(out, to_bytes(result.models[scheme]))
    click.echo(f"wrote {out}: {len(result.plan.activations)} tensors quantized on {len(opened)} samples")


@click.command(short_help="Convert an ONNX model to a target's format.")
@click.argument("model", type=FILE)
@OUT
@click.option("--target", required=True, metavar="NAME", help="The target to convert for.")
@click.option("--io-layout", type=click.Choice(["nhwc", "nchw"]), help="The layout of images.  [default: the target's]")
@click.option(
    "--io-dtype",
    type=click.Choice(["float32", "int8", "uint8"]),
    default="float32",
    show_default=True,
    help="The type of inputs and outputs.",
)
@click.option("--batch", type=click.IntRange(min=1), help="The size of a dynamic batch.  [default: it stays dynamic]")
def convert(
    model: Path, out: Path, target: str, io_layout: IoLayout | None, io_dtype: IoDtype, batch: int | None
) -> None:
    """Convert MODEL.onnx, float or QDQ, from any exporter, to a target's format."""
    from edgeship.calibration.onnx_file import load_onnx
    from edgeship.pipeline.onnx_form import fix_batch
    from edgeship.pipeline.workspace import write_atomically
    from edgeship.targets.base import ConvertOptions, load

    check_output(out, model)
    chosen = load(target)
    loaded = load_onnx(model)
    if batch:
        fix_batch(loaded, batch)
    metadata = {key: value for key, value in loaded.metadata_props.items() if key.startswith("edgeship.")}
    options = ConvertOptions(io_layout, io_dtype, metadata)
    content = chosen.convert(loaded, options)
    write_atomically(out, content)
    click.echo(f"wrote {out}: {len(content):,} bytes for {target}")


COMMANDS = (export, simplify, quantize, convert)
