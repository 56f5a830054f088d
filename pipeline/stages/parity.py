"""Returns how far each artifact, in its real runtime, is from the quantized reference it was made from.

The artifacts run on the recipe's device, the reference always here.
The reference is the quantized model as the target's runtime reads it, run with ONNX Runtime's graph optimisations off.
Also found here, because it is what makes an artifact leave its reference on other machines than this one: layers whose
kernels can saturate on x86 without VNNI, proved from the weights and counted by emulation on the samples, so that the
answer is the same on every host.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.compare import Comparison
from edgeship.pipeline.devices.base import open_device
from edgeship.pipeline.devices.session import open_on
from edgeship.pipeline.float_layers import explained
from edgeship.pipeline.judging import jury_digest, open_jury
from edgeship.pipeline.quantizing.forms import weights_of
from edgeship.pipeline.recipe import INTEGER_WEIGHT_MODES
from edgeship.pipeline.saturation import saturation_facts
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import write_json
from edgeship.targets.base import load

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from edgeship.calibration.samples.data import Samples
    from edgeship.calibration.types import Session
    from edgeship.pipeline.recipe import Recipe


def run(context: StageContext) -> None:
    """Writes parity.json: each target's differences, agreement, saturation and integer share as executed."""
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.calibration.writing.qdq import output_steps

    recipe = context.recipe
    jury = open_jury(recipe, context.inputs["simplify"] / "model.onnx")
    samples = jury.samples.take(recipe.parity.samples, recipe.data.seed)
    schemes = {name: recipe.quantized_model(name) for name in context.targets}
    files = {scheme: context.inputs["quantize"] / f"{scheme}.onnx" for scheme in sorted(set(schemes.values()))}
    quantized = {scheme: load_onnx(path) for scheme, path in files.items()}
    references, referred = _references({name: quantized[scheme] for name, scheme in schemes.items()})
    artifacts = {name: context.inputs["convert"] / artifact_path(name) for name in context.targets}
    device = open_device(recipe.device, recipe.devices)
    comparisons = {name: Comparison(output_steps(quantized[schemes[name]]), jury.decides) for name in context.targets}
    with device, ExitStack() as stack:
        sessions = {name: stack.enter_context(open_on(device, name, path)) for name, path in artifacts.items()}
        for done, sample in enumerate(samples):
            context.progress(done, len(samples), "samples")
            expected = {key: reference.run(sample.feeds) for key, reference in references.items()}
            for name, session in sessions.items():
                comparisons[name].update(expected[referred[name]], session.run(sample.feeds))
        context.progress(len(samples), len(samples), "samples")
    del sessions, references
    facts = {}
    for name in context.targets:
        share = load(name).integer_share(artifacts[name])
        facts[name] = {
            **_figures(comparisons[name]),
            "device": device.address,
            "data": jury.kind,
            "weights": weights_of(quantized[schemes[name]]) or recipe.weight_scheme(name),
            "saturation": saturation_facts(name, quantized[schemes[name]], samples),
            "int8_share": share.share,
            "integer_macs": share.integer_macs,
            "total_macs": share.total_macs,
            "float_layers": list(share.float_layers),
            "float_reasons": _why_float(recipe, name, share.float_layers, quantized[schemes[name]]),
            **_layers(recipe.parity.layers, files[schemes[name]], artifacts[name], samples),
        }
    write_json(context.folder / "parity.json", {"reference": "qdq", "targets": facts})


def _why_float(recipe: Recipe, target: str, layers: Sequence[str], model: ir.Model) -> list[dict[str, Any]]:
    """What is known of each layer that is float and need not be; nothing where the recipe's mode asks for float."""
    if not layers or recipe.quantize.mode not in INTEGER_WEIGHT_MODES:
        return []
    return [layer.to_json() for layer in explained(layers, model, load(target).notes(model))]


def _layers(count: int, reference: Path, artifact: Path, samples: Samples) -> dict[str, Any]:
    """Each layer's difference on the first `count` samples, on this machine; nothing where none is asked for."""
    from edgeship.pipeline.layers import LayerComparison, open_layers, to_json

    if not count:
        return {}
    comparison = LayerComparison(open_layers(reference, as_reference=True), open_layers(artifact, as_reference=False))
    for sample in itertools.islice(samples, count):
        comparison.update(sample.feeds)
    return {"layers": [to_json(layer) for layer in comparison.result()]}


def _references(models: Mapping[str, ir.Model]) -> tuple[dict[str, Session], dict[str, str]]:
    """What each target's artifact must compute, opened once where it is the same: sessions, and which is whose."""
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.targets.onnxruntime import open_reference

    sessions: dict[str, Session] = {}
    referred: dict[str, str] = {}
    for name, model in models.items():
        content = to_bytes(load(name).reference(model))
        referred[name] = hashlib.sha256(content).hexdigest()
        if referred[name] not in sessions:
            sessions[referred[name]] = open_reference(content)
    return sessions, referred


def _figures(comparison: Comparison) -> dict[str, Any]:
    """The worst output's figures, and every output's."""
    differences = comparison.differences()
    return {
        "reference": "qdq",
        "samples": comparison.samples,
        "max_steps": _finite(max(d.max_steps for d in differences.values())),
        "mean_steps": _finite(max(d.mean_steps for d in differences.values())),
        "agreement": comparison.agreement,
        "strict_agreement": comparison.strict_agreement,
        "decisions": comparison.decisions,
        "outputs": {name: difference.to_json() for name, difference in sorted(differences.items())},
    }


def _finite(steps: float) -> float | None:
    """None, which no gate accepts, for a difference from a reference that never moves: it has no step to count in."""
    return steps if math.isfinite(steps) else None


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    from edgeship.pipeline.machine import cpu_key

    return {
        "targets": list(targets),
        "data": jury_digest(recipe),
        "samples": recipe.parity.samples,
        "seed": recipe.data.seed,
        "layers": recipe.parity.layers,
        "weights": {name: recipe.quantized_model(name) for name in targets},
        "cpu": cpu_key(),
        "place": {"device": recipe.device, "devices": recipe.dump("devices")},
    }


STAGE = Stage(name="parity", needs=("simplify", "quantize", "convert"), settings=_settings, run=run)
