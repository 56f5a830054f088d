"""Returns each target's int8 artifact, from the quantized model of its weight scheme, and its fp32 twin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.c_source import c_source
from edgeship.pipeline.quantizing.forms import weights_of
from edgeship.pipeline.stage import ModelOutput, Stage, StageContext
from edgeship.pipeline.workspace import sha256_of, write_atomically, write_json
from edgeship.targets.base import ConvertOptions, load

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import Finding
    from edgeship.pipeline.recipe import Recipe
    from edgeship.targets.base import IoLayout, Target


def run(context: StageContext) -> None:
    """Writes `<target>/model<suffix>` and `<target>/fp32<suffix>` for every target, and convert.json.

    Raises UnsupportedError with every node that some target cannot take, before anything is written.
    """
    from edgeship.calibration.graph.macs import count_macs
    from edgeship.calibration.graph.onnx_file import load_onnx

    recipe = context.recipe
    targets = {name: load(name) for name in context.targets}
    schemes = {name: recipe.quantized_model(name) for name in targets}
    quantized = {scheme: load_onnx(context.inputs["quantize"] / f"{scheme}.onnx") for scheme in set(schemes.values())}
    simplified = load_onnx(context.inputs["simplify"] / "model.onnx")
    check_all(
        {
            (name, kind): (target, model)
            for name, target in targets.items()
            for kind, model in (("int8", quantized[schemes[name]]), ("fp32", simplified))
        }
    )
    plan = _plan_digests(context)
    facts = {}
    for done, (name, target) in enumerate(targets.items()):
        context.progress(done, len(targets), name)
        scheme = schemes[name]
        options = options_for(recipe, name, quantized[scheme], {"edgeship.plan": plan.get(scheme, plan["digest"])})
        twin = replace(options_for(recipe, name, simplified, {}), io_dtype="float32")
        int8, fp32 = context.folder / artifact_path(name), context.folder / artifact_path(name, "fp32")
        content = target.convert(quantized[scheme], options)
        write_atomically(int8, content)
        if recipe.targets[name].c_array:
            source = c_source(target, content, "model.c")
            write_atomically(int8.with_suffix(".c"), source.source)
            write_atomically(int8.with_suffix(".h"), source.header)
        write_atomically(fp32, target.convert(simplified, twin))
        facts[name] = {
            "artifact": artifact_path(name),
            "sha256": sha256_of(int8),
            "bytes": int8.stat().st_size,
            "fp32": artifact_path(name, "fp32"),
            "fp32_bytes": fp32.stat().st_size,
            "weights": weights_of(quantized[scheme]) or recipe.weight_scheme(name),
            "io_layout": recipe.targets[name].io_layout,
            "io_dtype": options.io_dtype,
        }
    context.progress(len(targets), len(targets), "done")
    write_json(
        context.folder / "convert.json",
        {
            "plan": plan["digest"],
            "model": {"macs": sum(count_macs(simplified).values()), "parameters": _parameters(simplified)},
            "targets": facts,
        },
    )


def check_all(models: Mapping[tuple[str, str], tuple[Target, ir.Model]]) -> None:
    """Raises UnsupportedError with the error findings of every target on its models, each said once."""
    findings: dict[str, Finding] = {}
    names: dict[str, None] = {}
    for (name, _), (target, model) in models.items():
        for finding in target.check(model):
            if finding.severity == "error":
                findings.setdefault(f"{name}: {finding}", replace(finding, where=f"{name}: {finding.where}"))
                names[name] = None
    if findings:
        raise UnsupportedError(
            f"convert: the model cannot be converted for {' and '.join(names)}", list(findings.values())
        )


def options_for(recipe: Recipe, target: str, model: ir.Model, more: Mapping[str, str]) -> ConvertOptions:
    """What the recipe asks of the target, with the facts that the artifact carries."""
    wanted = recipe.targets[target]
    carried = {key: value for key, value in model.metadata_props.items() if key.startswith("edgeship.")}
    metadata = {**carried, "edgeship.version": _version(), "edgeship.model": recipe.name, **_release(recipe), **more}
    layout = border_layout(carried, wanted.io_layout)
    return ConvertOptions(layout, wanted.io_dtype, metadata, integer_only=wanted.integer_only)


def border_layout(metadata: Mapping[str, str], wanted: IoLayout | None) -> IoLayout | None:
    """What to ask of a target so that images lie as `wanted`; targets take a model's own order for channels first.

    Raises InputError where a model that itself takes images with channels last should take them otherwise.
    """
    own = Preprocessing.from_metadata(metadata)
    if wanted is None or own is None or not own.channels_last:
        return wanted
    if wanted == "nchw":
        raise InputError(
            f'io_layout is "nchw", and the model itself takes images with channels last {list(own.shape)}; '
            'accepted: "nhwc", or no io_layout'
        )
    return "nchw"


def _release(recipe: Recipe) -> dict[str, str]:
    """What the artifact says of the model: the recipe's [release] table, without the key."""
    said = recipe.release.model_dump(exclude={"key", "labels"})
    facts = {f"edgeship.release.{name}": value for name, value in said.items() if value}
    labels = recipe.label_names
    return {**facts, "edgeship.release.labels": json.dumps(labels)} if labels else facts


def _parameters(model: ir.Model) -> int:
    """The number of float values the model holds."""
    constants = [value.const_value for value in model.graph.initializers.values()]
    return sum(int(each.size) for each in constants if each is not None and each.dtype.is_floating_point())


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("edgeship")


def _plan_digests(context: StageContext) -> dict[str, str]:
    plan: dict[str, Any] = json.loads((context.inputs["quantize"] / "plan.json").read_text())
    return {"digest": str(plan["digest"]), **{str(k): str(v) for k, v in plan.get("digests", {}).items()}}


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    return {
        "name": recipe.name,
        "release": _release(recipe),
        "mode": recipe.quantize.mode,
        "targets": {name: recipe.targets[name].model_dump(mode="json") for name in targets},
        "weights": {name: recipe.quantized_model(name) for name in targets},
    }


def _models(recipe: Recipe, targets: Sequence[str]) -> Sequence[ModelOutput]:
    return [
        ModelOutput(artifact_path(name, kind), steps=kind == "model" and recipe.quantize.mode != "none", target=name)
        for name in targets
        for kind in ("fp32", "model")
    ]


STAGE = Stage(name="convert", needs=("export", "simplify", "quantize"), settings=_settings, run=run, models=_models)
