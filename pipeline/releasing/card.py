"""Returns a release's model card as Markdown: what it is, how to feed it, how good it is, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeship.calibration.samples.preprocessing import Preprocessing
from edgeship.pipeline.compare import step_unit
from edgeship.pipeline.gates import worst_sqnr
from edgeship.pipeline.inspection import ModelFacts, port_line

CARD = "MODEL_CARD.md"
_ARRAYS = ("The samples came as arrays: the inputs' values are those that the model was trained with.",)


def make_card(
    manifest: Mapping[str, Any],
    facts: Mapping[str, Any],
    models: Mapping[str, ModelFacts],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """The card of a release with this manifest; `models` are the artifacts' facts, `results` the targets' figures.

    `facts`: the recipe's [release] table, the `labels`, and how many `samples` the ranges were chosen on.
    """
    lines = [f"# {_line(facts.get('title') or manifest['name'])}", ""]
    if facts.get("description"):
        lines += [_line(facts["description"]), ""]
    known = {key: facts.get(key) for key in ("version", "author", "license")}
    said = [f"- {key}: {_line(value)}" for key, value in known.items() if value]
    lines += [*said, ""] if said else []
    lines += [
        "## Artifacts",
        "",
        "| file | target | bytes | accuracy | parity | integer share |",
        "|---|---|---|---|---|---|",
    ]
    for name, artifact in sorted(manifest["artifacts"].items()):
        found = results.get(artifact["target"], {})
        row = (name, artifact["target"], f"{artifact['bytes']:,}", _accuracy(found), _parity(found), _share(found))
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "Accuracy and parity are those of the artifact in its runtime, on the recipe's evaluation data.", ""]
    lines += ["## Input and output", ""]
    for name, model in sorted(models.items()):
        lines += [f"- input of {name}: {port_line(port)}" for port in model.inputs]
        lines += [f"- output of {name}: {port_line(port)}" for port in model.outputs]
    from_images = any(Preprocessing.from_metadata(model.metadata) for model in models.values())
    lines += ["", *(_preprocessing(manifest["settings"]["input"]) if from_images else _ARRAYS)]
    labels = facts.get("labels") or ()
    if labels:
        shown = ", ".join(_line(label) for label in labels[:20])
        lines += ["", f"Classes ({len(labels)}): {shown}{', ...' if len(labels) > 20 else ''}"]
    lines += ["", "## Quantization", "", *_quantization(manifest, facts.get("samples"))]
    lines += [
        "",
        "## Provenance",
        "",
        *(f"- {role}: `{digest}`" for role, digest in manifest["inputs"].items() if digest),
    ]
    lines += ["", "Check this folder with `edgeship verify`, or its checksums with `sha256sum --check SHA256SUMS`.", ""]
    return "\n".join(lines)


def metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a target that hold wherever the artifact runs on this kind of processor."""
    accuracy, parity = results.get("accuracy", {}), results.get("parity", {})
    return {
        "top-1 accuracy, %": accuracy.get("top1"),
        "top-5 accuracy, %": accuracy.get("top5"),
        "same decision as fp32": accuracy.get("fp32_agreement"),
        "largest difference from the quantized reference, steps": parity.get("max_steps"),
        "integer share of multiply-accumulates": parity.get("int8_share"),
    }


def _accuracy(results: Mapping[str, Any]) -> str:
    found = results.get("accuracy", {})
    if found.get("top1") is not None:
        return f"top-1 {found['top1']:.2f} % (n = {found['n']})"
    agreement = found.get("fp32_agreement")
    if agreement is not None:
        return f"decides as fp32: {100 * agreement:.2f} %"
    ratio = worst_sqnr(found)
    equal = ratio is not None and math.isinf(ratio)
    return "not measured" if ratio is None else "as fp32" if equal else f"SQNR {ratio:.1f} dB against fp32"


def _parity(results: Mapping[str, Any]) -> str:
    parity = results.get("parity", {})
    most = parity.get("max_steps")
    return "not measured" if most is None else f"at most {most:.3g} {step_unit(parity.get('outputs', {}), most)}"


def _share(results: Mapping[str, Any]) -> str:
    share = results.get("parity", {}).get("int8_share")
    return "not measured" if share is None else f"{100 * share:.4g} %"


def _preprocessing(given: Mapping[str, Any]) -> list[str]:
    steps = []
    if given.get("resize"):
        how = given.get("interpolation", "bilinear") + (
            ", antialiased" if given.get("antialias", True) else ", without antialiasing"
        )
        steps.append(f"resize to {given['resize']} (the shorter side, or height and width), {how}")
    if given.get("crop"):
        steps.append(f"centre crop of {given['crop']}")
    steps.append(f"channels {given.get('color')}")
    steps.append(f"(pixel - {given.get('mean')}) / {given.get('std')}, pixels 0..255")
    return ["Images become an input so:", "", *(f"{place}. {step}" for place, step in enumerate(steps, 1))]


def _quantization(manifest: Mapping[str, Any], samples: int | None) -> list[str]:
    given = manifest["settings"]["quantize"]
    ranges = "" if samples is None else f", ranges: {given['algorithm']}, {samples} calibration samples"
    refined = [] if samples is None else [f"- refinements: {', '.join(given['refine']) or 'none'}"]
    return [f"- mode: {given['mode']}{ranges}", *refined, f"- plan: `{manifest['plan']}`"]


def _line(text: Any) -> str:
    return " ".join(str(text).split())
