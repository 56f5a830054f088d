"""Returns the commands that make one model of another: export, simplify, convert; quantize.py has the fourth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeship.calibration.errors import EdgeshipError, InputError
from edgeship.pipeline.commands.files import FILE
from edgeship.pipeline.commands.shapes import Given, by_input, open_inputs, shape_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from edgeship.calibration.types import Finding
    from edgeship.targets.base import IoDtype, IoLayout, Target

LISTED = 20
"""Notes that a conversion prints."""
OUT = click.option("-o", "--out", type=FILE, required=True, help="The file to write; replaced by a complete new one.")


SHAPE = shape_option("The size of an input, where the model leaves it open.  [default: it stays open]")


def load_shaped(path: Path, shapes: Sequence[Given]) -> ir.Model:
    """The ONNX model in the file, with the sizes that `--shape` gives its inputs."""
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.pipeline.onnx_form import fix_shapes

    loaded = load_onnx(path)
    if shapes:
        given = by_input(shapes, [str(value.name) for value in loaded.graph.inputs], str(path))
        fix_shapes(loaded, given)
    return loaded


def check_output(out: Path, *inputs: Path) -> None:
    """Raises InputError where writing `out` would fail or overwrite one of `inputs`."""
    if out.is_dir():
        raise InputError(f"-o {out} is a folder; give a file")
    if out.exists() and not out.is_file():
        raise InputError(f"-o {out} is no regular file; it would be replaced, not written to")
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"-o {out} is the input; inputs are never modified")
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.absolute().parent}")


def note_suffix(out: Path, whose: str = "ONNX", suffix: str = ".onnx") -> None:
    """Says so where a file was written under a name that other programs take for another format's."""
    if out.suffix != suffix:
        click.echo(f"note: {whose} files are known by the suffix {suffix}; seen: {out.name}", err=True)


@click.command(short_help="Export a recipe's model to checked ONNX.")
@click.argument("recipe", type=FILE)
@OUT
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
def export(recipe: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Export the model of RECIPE to ONNX, checked against its framework."""
    from edgeship.pipeline.recipe import load_recipe
    from edgeship.pipeline.stages.export import export_recipe

    loaded = load_recipe(recipe, overrides)
    check_output(out, recipe, *(path for path in (loaded.source_path, loaded.weights_path) if path))
    result = export_recipe(loaded, out)
    for note in result.facts.get("findings", []):
        said = "; ".join(text for text in (note["rule"], note["seen"], note["accepted"]) if text)
        click.echo(f"note: {note['where']}: {said}", err=True)
    note_suffix(out)
    click.echo(f"wrote {out}: opset {result.facts['opset']}, {result.facts['parameters']:,} parameters")


@click.command(short_help="Simplify an ONNX model.")
@click.argument("model", type=FILE)
@OUT
@SHAPE
def simplify(model: Path, out: Path, shapes: tuple[Given, ...]) -> None:
    """Simplify MODEL.onnx into the form that the quantizer and the targets want."""
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.simplification.simplifier import simplify_model
    from edgeship.pipeline.workspace import write_atomically

    check_output(out, model)
    result = simplify_model(load_shaped(model, shapes))
    write_atomically(out, to_bytes(result.model))
    for note in result.notes:
        click.echo(note, err=True)
    note_suffix(out)
    before, after = sum(result.before.values()), sum(result.after.values())
    click.echo(f"wrote {out}: {before} operators became {after}")


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
@SHAPE
@click.option(
    "--integer-only/--real-where-faster",
    default=None,
    help="Integer kernels wherever there is one (hardware without floating point), or real numbers where CPUs are "
    "faster with them.  [default: integers where inputs or outputs are, or MODEL came out of a TFLite file]",
)
@click.option("--c-array", is_flag=True, help="Also beside OUT, as .c and .h for TensorFlow Lite Micro; needs int8.")
def convert(
    model: Path,
    out: Path,
    target: str,
    io_layout: IoLayout | None,
    io_dtype: IoDtype,
    batch: int | None,
    shapes: tuple[Given, ...],
    integer_only: bool | None,
    c_array: bool,
) -> None:
    """Convert MODEL.onnx, float or QDQ, from any exporter, to a target's format."""
    from edgeship.pipeline.c_source import c_source
    from edgeship.pipeline.onnx_form import fix_batch
    from edgeship.pipeline.stages.convert import border_layout
    from edgeship.pipeline.workspace import write_atomically
    from edgeship.targets.base import ConvertOptions, load

    check_output(out, model)
    chosen = load(target)
    _refuse_unknown(chosen, integer_only=integer_only, c_array=c_array)
    loaded = load_shaped(model, shapes)
    if c_array and io_dtype != "int8":
        _refuse_real_numbers(loaded, io_dtype)
    if batch:
        fix_batch(loaded, batch)
    metadata = {key: value for key, value in loaded.metadata_props.items() if key.startswith("edgeship.")}
    options = ConvertOptions(border_layout(metadata, io_layout), io_dtype, metadata, integer_only=integer_only)
    try:
        content = chosen.convert(loaded, options)
    except EdgeshipError:
        sizes = open_inputs({str(value.name): list(value.shape or ()) for value in loaded.graph.inputs})
        if sizes:
            click.echo(f"note: the model leaves sizes open ({sizes}); --shape gives it some", err=True)
        raise
    in_c = c_source(chosen, content, out.name) if c_array else None
    write_atomically(out, content)
    if in_c:
        write_atomically(out.with_suffix(".c"), in_c.source)
        write_atomically(out.with_suffix(".h"), in_c.header)
    note_suffix(out, f"{target}'s", chosen.suffix)
    _tell(chosen.notes(loaded))
    click.echo(f"wrote {out}: {len(content):,} bytes for {target}")


def _refuse_unknown(target: Target, **options: bool | None) -> None:
    """Raises InputError for an option that the target's runtime has no such thing as."""
    from edgeship.targets.base import Restricted

    refused = target.refused if isinstance(target, Restricted) else {}
    for name, given in options.items():
        if given and name in refused:
            raise InputError(
                f"--{name.replace('_', '-')}: {refused[name]}; accepted: --target {target.name} without it"
            )


def _refuse_real_numbers(model: ir.Model, io_dtype: IoDtype) -> None:
    """Raises InputError where C source is asked for and an input or output of `model` would not be int8 in it."""
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if value.dtype is not None and value.dtype.is_floating_point():
                raise InputError(
                    f"--c-array is for TensorFlow Lite Micro, which takes integers alone, and {kind} {value.name} "
                    f"would be {io_dtype}; accepted: --io-dtype int8"
                )


def _tell(notes: Sequence[Finding]) -> None:
    for note in notes[:LISTED]:
        click.echo(f"in float: {note}", err=True)
    if len(notes) > LISTED:
        click.echo(f"in float: {len(notes) - LISTED} more", err=True)


COMMANDS = (export, simplify, convert)
