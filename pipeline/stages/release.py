"""Returns a folder to ship: artifacts, model card, bill of materials, a manifest of what they came from, SHA256SUMS.

Neither times, host facts nor absolute paths are in it: the same inputs give the same bytes anywhere (the card's
accuracy where kernels compute the same). A signature, where a key is given, is over all of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.calibration.errors import GateError
from edgeship.pipeline.artifacts import artifact_path, release_name
from edgeship.pipeline.gates import judge_gates, read_json, read_results
from edgeship.pipeline.inspection import inspect_model
from edgeship.pipeline.judging import jury_digest
from edgeship.pipeline.releasing.card import CARD, make_card, metrics
from edgeship.pipeline.releasing.sbom import SBOM, make_sbom, model_card
from edgeship.pipeline.releasing.signature import SIGNATURE, check_key, sign
from edgeship.pipeline.releasing.verify import MANIFEST, write_sums
from edgeship.pipeline.source_files import external_data
from edgeship.pipeline.stage import Stage, StageContext
from edgeship.pipeline.workspace import artifacts_of, sha256_of, stage_folder_name, write_atomically, write_json

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe

MAKERS = ("export", "simplify", "quantize", "convert")
"""The stages whose outputs are the same bytes on any machine; what is measured on one machine is in the report."""


MEASURED = "measured.json"
"""Times that a stage took to decide something: the decision is in its other files."""


def run(context: StageContext) -> None:
    """Writes the release. Raises GateError with every gate that is not met."""
    recipe = context.recipe
    failing = []
    for name in context.targets:
        gates = judge_gates(recipe, name, read_results(context.inputs, name))
        failing += [str(gate) for gate in gates if not gate.met]
    if failing:
        count = "a gate was" if len(failing) == 1 else f"{len(failing)} gates were"
        raise GateError(
            "\n".join([f"{count} not met, no release was made: {failing[0]}", *(f"  - {gate}" for gate in failing[1:])])
        )
    artifacts, documents = {}, list[str]()
    for name in context.targets:
        path = context.folder / release_name(name, sorted(recipe.targets))
        shutil.copyfile(context.inputs["convert"] / artifact_path(name), path)
        artifacts[path.name] = {"target": name, "sha256": sha256_of(path), "bytes": path.stat().st_size}
        if recipe.targets[name].c_array:
            for suffix in (".c", ".h"):
                made = context.inputs["convert"] / artifact_path(name)
                shutil.copyfile(made.with_suffix(suffix), path.with_suffix(suffix))
                documents.append(path.with_suffix(suffix).name)
    manifest = _manifest(context, artifacts)
    for name, text in _documents(context, manifest).items():
        write_atomically(context.folder / name, text)
        documents.append(name)
    key = recipe.signing_key
    write_json(
        context.folder / MANIFEST,
        {
            **manifest,
            "documents": {name: {"sha256": sha256_of(context.folder / name)} for name in documents},
            "signature": None if key is None else {"file": SIGNATURE, "public_key_sha256": check_key(key)},
        },
    )
    write_sums(context.folder)
    if key is not None:
        sign(context.folder, key)


def _documents(context: StageContext, manifest: dict[str, Any]) -> dict[str, str]:
    """The model card and the bill of materials, by file name."""
    exported = read_json(context.inputs["export"] / "export.json")
    inputs, outputs = exported.get("inputs", {}), exported.get("outputs", {})
    results = {name: read_results(context.inputs, name) for name in context.targets}
    samples = read_json(context.inputs["quantize"] / "plan.json").get("samples")
    facts = {**context.recipe.release.model_dump(), "labels": context.recipe.label_names, "samples": samples}
    models = {name: inspect_model(context.folder / name) for name in manifest["artifacts"]}
    cards = {
        name: model_card({"metrics": metrics(results[artifact["target"]])}, inputs, outputs)
        for name, artifact in manifest["artifacts"].items()
    }
    return {
        CARD: make_card(manifest, facts, models, results),
        SBOM: make_sbom(manifest, facts, cards),
    }


def _manifest(context: StageContext, artifacts: dict[str, Any]) -> dict[str, Any]:
    from edgeship.pipeline.flow import library_versions

    recipe = context.recipe
    stages = {
        stage_folder_name(stage): {
            output.path: output.sha256 for output in artifacts_of(context.inputs[stage]) if output.path != MEASURED
        }
        for stage in MAKERS
    }
    inputs = {role: sha256_of(path) for role, path in _input_files(recipe).items()}
    return {
        "format": 1,
        "name": recipe.name,
        "artifacts": artifacts,
        "plan": read_json(context.inputs["quantize"] / "plan.json").get("digest"),
        "inputs": {**inputs, "calibration": recipe.data_digest("calibration"), "evaluation": jury_digest(recipe)},
        "settings": json.loads(json.dumps(recipe.dump("input", "quantize", "targets", "gates"))),
        "stages": stages,
        "versions": dict(library_versions()),
    }


def _input_files(recipe: Recipe) -> dict[str, Path]:
    source = recipe.source_path
    files = {"model": source, "weights": recipe.weights_path}
    if source is not None:
        files |= {f"model data {path.name}": path for path in external_data(source)}
    return {role: path for role, path in files.items() if path is not None}


def _files(recipe: Recipe) -> list[Path]:
    """What the release reads outside the run folder; of the signing key only that it is there."""
    key = recipe.signing_key
    return [*_input_files(recipe).values(), *([] if key is None else [key])]


def _settings(recipe: Recipe, targets: Sequence[str]) -> Any:
    return {
        "targets": list(targets),
        "recipe": recipe.dump("name", "input", "quantize", "targets", "gates", "release"),
        "labels": list(recipe.label_names),
        "signer": None if recipe.signing_key is None else check_key(recipe.signing_key),
        "calibration": recipe.data_digest("calibration"),
        "evaluation": jury_digest(recipe),
    }


STAGE = Stage(
    name="release",
    needs=(*MAKERS, "parity", "accuracy", "latency"),
    settings=_settings,
    run=run,
    files=_files,
)
