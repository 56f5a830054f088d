"""Returns the stage that turns the recipe's model into ONNX: 2-export/model.onnx, golden.npz and export.json.

golden.npz records what the model computed before anything was done to it, in PyTorch or from the original ONNX file, on
calibration samples (seeded random inputs where the recipe has none); every later model is checked against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeship.calibration.errors import InputError, StageError
from edgeship.calibration.samples.preprocessing import channels_of
from edgeship.calibration.types import Array, Session
from edgeship.pipeline.source_files import source_files
from edgeship.pipeline.stage import ModelOutput, Stage, StageContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.torch_export import TorchSession

MODEL = "model.onnx"
FURTHER_SAMPLES = 12
"""On how many real samples, besides the golden ones, an export is compared with the PyTorch model."""


@dataclass(frozen=True)
class Export:
    """The ONNX model, recorded inputs and outputs (a mapping by name for each sample), and facts about the export."""

    model: ir.Model
    feeds: Sequence[Mapping[str, Array]]
    outputs: Sequence[Mapping[str, Array]]
    facts: Mapping[str, Any]


def export_model(recipe: Recipe, compressed: Path | None = None) -> Export:
    """The recipe's model as ONNX with opset 17 or later, checked against the original.

    `compressed` is the compress stage's folder: its network is exported instead of the recipe's.
    Raises InputError for what the recipe names wrongly, StageError when no faithful export can be made.
    """
    path = recipe.source_path
    if path is not None and path.suffix == ".onnx":
        return _from_onnx(recipe, path)
    return _from_torch(recipe, compressed)


def export_recipe(recipe: Recipe, out: Path) -> Export:
    """The export of the recipe's model, written to the file `out`, which is replaced only by a complete new one."""
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.workspace import write_atomically

    result = export_model(recipe)
    write_atomically(out, to_bytes(result.model))
    return result


def _from_torch(recipe: Recipe, compressed: Path | None) -> Export:
    from edgeship.calibration.samples.checks import to_json
    from edgeship.pipeline.models import open_torch_source
    from edgeship.pipeline.torch_export import export_torch

    session = open_torch_source(recipe) if compressed is None else _open_compressed(recipe, compressed)
    shapes = {info.name: info.shape for info in session.inputs}
    feeds = _golden_feeds(recipe, shapes)
    outputs = _run(session, feeds)
    exported = export_torch(session, [*feeds, *_further_feeds(recipe, shapes)])
    facts = {
        "exporter": exported.exporter,
        "fallback_reason": exported.reason,
        "largest_error": exported.largest_error,
        "findings": to_json(exported.notes()),
    }
    return _finished(recipe, exported.model, feeds, _with_own_indices(exported.model, feeds, outputs), facts)


def _further_feeds(recipe: Recipe, inputs: Mapping[str, Sequence[int]]) -> list[Mapping[str, Array]]:
    """Real samples, besides the golden ones, that the export must compute as the original does.

    Calibration's, or evaluation's where there are none; none where the recipe has neither.
    """
    if recipe.data.calibration is not None:
        samples = recipe.calibration_samples(inputs)
        golden = set(samples.take(recipe.golden.samples, recipe.data.seed).names)
        wanted = samples.take(FURTHER_SAMPLES + len(golden), recipe.data.seed)
        return [sample.feeds for sample in wanted if sample.name not in golden][:FURTHER_SAMPLES]
    evaluation = recipe.evaluation_samples(inputs)
    if evaluation is None:
        return []
    return [sample.feeds for sample in evaluation.take(FURTHER_SAMPLES, recipe.data.seed)]


def _with_own_indices(
    model: ir.Model, feeds: Sequence[Mapping[str, Array]], outputs: Sequence[Mapping[str, Array]]
) -> Sequence[Mapping[str, Array]]:
    """The outputs with indices as ONNX Runtime chooses them among equal values: later models are run there."""
    from edgeship.pipeline.index_outputs import IndexOutputs

    chosen = IndexOutputs(model)
    if not chosen.names:
        return outputs
    return [
        {**each, **{name: values for name, values in chosen.run(given, {}).items() if name in chosen.names}}
        for given, each in zip(feeds, outputs, strict=True)
    ]


def _open_compressed(recipe: Recipe, folder: Path) -> TorchSession:
    from edgeship.pipeline.compression.saved import restore
    from edgeship.pipeline.torch_export import open_torch

    return open_torch(restore(recipe, folder), recipe.input.shape, recipe.input.name)


def _from_onnx(recipe: Recipe, path: Path) -> Export:
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.calibration.samples.checks import to_json
    from edgeship.pipeline.onnx_source import notes_on, read_source, upgrade
    from edgeship.targets.onnxruntime import open_reference

    if recipe.weights_path is not None:
        raise InputError(f"{recipe.path.name}: model.weights is set, but {path.name} holds its own weights")
    source = read_source(path, recipe.input.shape, recipe.input.name, recipe.input.others)
    shapes = {
        str(value.name): tuple(size if isinstance(size, int) else -1 for size in value.shape or ())
        for value in source.model.graph.inputs
    }
    feeds = _golden_feeds(recipe, shapes, source.pixels)
    _check_pixels(recipe, path, source.pixels, feeds)
    written = open_reference(path, 1)
    session = open_reference(to_bytes(source.model), 1) if source.half else written
    outputs = _run(session, feeds)
    rounding = _largest_difference(outputs, [written.run(each) for each in feeds]) if source.half else 0.0
    model, error = upgrade(source.model, feeds)
    facts = {
        "exporter": "onnx",
        "original_opset": source.model.opset_imports[""],
        "largest_error": error,
        "findings": to_json(notes_on(source, rounding)),
    }
    return _finished(recipe, model, feeds, outputs, facts)


def _check_pixels(recipe: Recipe, path: Path, pixels: Sequence[str], feeds: Sequence[Mapping[str, Array]]) -> None:
    """Raises InputError for samples that are no pixels where the model, which scales them itself, takes pixels."""
    given = [
        f"input.{name}" for name, value in (("mean", 0), ("std", 1)) if set(getattr(recipe.input, name)) != {value}
    ]
    if given and _main_name(recipe, feeds) in pixels:
        raise InputError(
            f"{recipe.path.name}: {' and '.join(given)}: {path.name} takes pixels (uint8) and scales them itself; "
            "accepted: neither mean nor std"
        )
    for name, feed in ((name, feed[name]) for feed in feeds for name in pixels):
        if feed.min() < 0 or feed.max() > 255 or np.any(feed != np.rint(feed)):
            raise InputError(
                f"input {name!r} of {path.name} takes pixels (uint8), and samples hold {feed.min():.4g} .. "
                f"{feed.max():.4g}; accepted: whole numbers, 0..255"
            )


def _main_name(recipe: Recipe, feeds: Sequence[Mapping[str, Array]]) -> str:
    """The input that [input] is about."""
    return recipe.input.name or next(iter(feeds[0]))


def _largest_difference(ours: Sequence[Mapping[str, Array]], others: Sequence[Mapping[str, Array]]) -> float:
    """The largest difference of any output, as a share of its largest magnitude, where both are finite."""
    worst = 0.0
    for one, other in zip(ours, others, strict=True):
        for name, values in one.items():
            finite = np.isfinite(other[name])
            if finite.any():
                off = np.abs(values - other[name])[finite].max() / max(float(np.abs(values).max()), 1e-6)
                worst = max(worst, float(off))
    return worst


def _golden_feeds(
    recipe: Recipe, inputs: Mapping[str, Sequence[int]], pixels: Sequence[str] = ()
) -> list[Mapping[str, Array]]:
    """The first calibration samples, or seeded random inputs where there are none: whole numbers where pixels go in."""
    count = recipe.golden.samples
    if recipe.data.calibration is not None:
        samples = recipe.calibration_samples(inputs)
        return [sample.feeds for sample in islice(samples.take(count, recipe.data.seed), count)]
    generator = np.random.default_rng(recipe.data.seed)
    sizes = {
        name: [1 if place == 0 else abs(size) for place, size in enumerate(shape)] for name, shape in inputs.items()
    }

    def draw(name: str, shape: Sequence[int]) -> Array:
        drawn = generator.integers(0, 256, shape) if name in pixels else generator.standard_normal(shape)
        return drawn.astype(np.float32)

    return [{name: draw(name, shape) for name, shape in sizes.items()} for _ in range(count)]


def _run(session: Session, feeds: Sequence[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
    outputs: list[Mapping[str, Array]] = [session.run(each) for each in feeds]
    for place, each in enumerate(outputs):
        for name, values in each.items():
            if not np.isfinite(values).all():
                raise StageError(
                    f"the original model's output {name!r} has {np.count_nonzero(~np.isfinite(values))} values "
                    f"that are NaN or infinite on golden sample {place}; accepted: finite numbers"
                )
    return outputs


def _finished(
    recipe: Recipe,
    model: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    outputs: Sequence[Mapping[str, Array]],
    facts: Mapping[str, Any],
) -> Export:
    model.metadata_props.update(_preprocessing_facts(recipe, model))
    parameters = sum(
        value.const_value.size
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    )
    described = {
        **facts,
        "opset": model.opset_imports[""],
        "inputs": {str(value.name): _sizes(value) for value in model.graph.inputs},
        "outputs": {str(value.name): _sizes(value) for value in model.graph.outputs},
        "parameters": int(parameters),
        "golden_samples": len(feeds),
    }
    return Export(model, feeds, outputs, described)


def _sizes(value: ir.Value) -> list[int | str]:
    return [size if isinstance(size, int) else str(size) for size in value.shape or ()]


def _preprocessing_facts(recipe: Recipe, model: ir.Model) -> dict[str, str]:
    """How an image becomes the input, for the model's metadata; nothing for arrays, which come preprocessed."""
    name = recipe.input.name
    value = next((each for each in model.graph.inputs if each.name == name), model.graph.inputs[0])
    sizes = [size if isinstance(size, int) else -1 for size in value.shape or ()]
    if len(sizes) != 4 or (recipe.data.calibration or "").lower().endswith(".npz"):
        return {}
    fits = channels_of(recipe.input.color) in (sizes[1], sizes[3])
    return recipe.preprocessing(sizes).to_metadata() if fits else {}


def _settings(recipe: Recipe, _targets: Sequence[str]) -> Any:
    return {
        **recipe.dump("model", "input", "golden"),
        "seed": recipe.data.seed,
        "calibration": None if recipe.data.calibration is None else recipe.data_digest("calibration"),
        **_evaluation(recipe),
    }


def _evaluation(recipe: Recipe) -> dict[str, Any]:
    """The evaluation samples where `_further_feeds` takes them."""
    path = recipe.source_path
    taken = recipe.data.calibration is None and (path is None or path.suffix != ".onnx")
    return {"evaluation": recipe.data_digest("evaluation")} if taken and recipe.data.evaluation is not None else {}


def _write(context: StageContext) -> None:
    from edgeship.calibration.graph.onnx_file import to_bytes

    result = export_model(context.recipe, context.inputs.get("compress"))
    (context.folder / MODEL).write_bytes(to_bytes(result.model))
    arrays = {f"input:{name}": np.concatenate([each[name] for each in result.feeds]) for name in result.feeds[0]}
    arrays |= {f"output:{name}": _stacked(name, result.outputs) for name in result.outputs[0]}
    np.savez(context.folder / "golden.npz", allow_pickle=False, **arrays)
    text = json.dumps(dict(result.facts), indent=2) + "\n"
    (context.folder / "export.json").write_text(text, "utf-8")


def _stacked(name: str, outputs: Sequence[Mapping[str, Array]]) -> Array:
    """The output of all golden samples, along the first axis. Raises StageError where it has no place there."""
    shape = outputs[0][name].shape
    if not shape:
        raise StageError(
            f"output {name!r} of the model has the shape [], one number for the whole batch; "
            "accepted: outputs whose first axis is the batch, such as [1, 1]"
        )
    if 0 in shape:
        raise StageError(
            f"output {name!r} of the model has the shape {list(shape)}, which holds no values; "
            "accepted: outputs with values (leave this one out of what the model returns)"
        )
    for place, each in enumerate(outputs):
        if each[name].shape != shape:
            raise StageError(
                f"output {name!r} of the model has the shape {list(shape)} on golden sample 0 and "
                f"{list(each[name].shape)} on sample {place}; accepted: the same shape for every input"
            )
    return np.concatenate([each[name] for each in outputs])


def _models(_recipe: Recipe, _targets: Sequence[str]) -> Sequence[ModelOutput]:
    return [ModelOutput(MODEL)]


STAGE = Stage("export", ("compress",), _settings, _write, files=source_files, models=_models)
