"""Returns what a run found as one plain value: report.json. What is printed, stored and tested is this value."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.artifacts import artifact_path, release_name
from edgeship.pipeline.gates import Gate, judge_gates, read_json, read_results
from edgeship.pipeline.workspace import Workspace, sha256_of, stage_folder_name, write_json

if TYPE_CHECKING:
    from edgeship.pipeline.flow import StageResult
    from edgeship.pipeline.recipe import Recipe

REPORT = "report.json"
QUANTIZATION = (
    "mode",
    "algorithm",
    "refinements",
    "samples",
    "data",
    "structure",
    "sensitivity",
    "mixed",
    "qat",
    "scheme",
)
"""What the report takes over of plan.json."""
FAILURE = "failure.json"
"""Beside the stages' records: what there was to report of a run that failed."""
RENDERED = ("report.html", "report.md", "junit.xml")


def make_report(
    recipe: Recipe, workspace: Workspace, targets: Sequence[str], stages: Sequence[StageResult]
) -> dict[str, Any]:
    """The report of cli.md for the stages that are done; paths in it are relative to the run folder."""
    folders = {result.name: workspace.path(result.name) for result in stages}
    report: dict[str, Any] = {
        "edgeship": importlib.metadata.version("edgeship"),
        "recipe": recipe.name,
        "model": _model_facts(recipe, folders),
        "stages": [_stage_facts(result) for result in stages],
        "reference": {},
        "targets": {},
    }
    if "quantize" in folders:
        plan = read_json(folders["quantize"] / "plan.json")
        report["quantization"] = {key: plan[key] for key in QUANTIZATION if key in plan}
        if (folders["quantize"] / "measured.json").is_file():
            report["quantization"]["measured"] = read_json(folders["quantize"] / "measured.json")
    if "accuracy" in folders:
        accuracy = read_json(folders["accuracy"] / "accuracy.json")
        report["reference"] = {"accuracy": accuracy["fp32"], "data": accuracy["data"], "labels": accuracy["labels"]}
    if "latency" in folders:
        latency = read_json(folders["latency"] / "latency.json")
        report["machine"], report["device"] = latency["machine"], latency["device"]
    if "compress" in folders:
        report["compress"] = _compress_facts(folders["compress"])
    for name in targets if "convert" in folders else ():
        report["targets"][name] = _target_facts(recipe, name, folders)
    return report


def write_report(workspace: Workspace, report: Mapping[str, Any]) -> None:
    """Replaces report.json in the run folder."""
    write_json(workspace.folder / REPORT, report)


def write_failure(workspace: Workspace, report: Mapping[str, Any], stage: str | None, error: str) -> None:
    """Keeps what a failed run has to tell, for its page; there is no report.json then."""
    write_json(workspace.internal / FAILURE, {**report, "failed": {"stage": stage, "error": error}})


def remove_report(workspace: Workspace) -> None:
    """Removes the report of an earlier run: if this one fails, none is left to be taken for its own."""
    for path in (*(workspace.folder / name for name in (REPORT, *RENDERED)), workspace.internal / FAILURE):
        path.unlink(missing_ok=True)


def run_facts(recipe: Recipe, targets: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """What was asked for: the recipe file and its digest, the targets and the overrides, and when this was written."""
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    asked = {
        "recipe_file": recipe.path.name,
        "recipe_sha256": sha256_of(recipe.path),
        "targets": list(targets),
        "overrides": list(overrides),
    }
    return {"finished": now, "run": asked}


def gates_of(recipe: Recipe, workspace: Workspace, targets: Sequence[str], stages: Sequence[StageResult]) -> list[Gate]:
    """All gates that the finished stages can tell of, for all targets."""
    folders = {result.name: workspace.path(result.name) for result in stages}
    return [gate for name in targets for gate in judge_gates(recipe, name, read_results(folders, name))]


def _compress_facts(folder: Path) -> dict[str, Any]:
    """compress.json without the raw times."""
    facts = dict(read_json(folder / "compress.json"))
    latency = {
        name: {
            key: {k: v for k, v in value.items() if k != "nanoseconds"} if isinstance(value, Mapping) else value
            for key, value in each.items()
        }
        for name, each in facts.pop("latency", {}).items()
    }
    return {**facts, **({"latency": latency} if latency else {})}


def _stage_facts(result: StageResult) -> dict[str, Any]:
    outputs = [
        {"path": f"{result.folder}/{output.path}", "sha256": output.sha256, "bytes": output.bytes}
        for output in result.outputs
    ]
    return {"name": result.name, "seconds": result.seconds, "cached": result.cached, "outputs": outputs}


def _model_facts(recipe: Recipe, folders: Mapping[str, Path]) -> dict[str, Any]:
    facts: dict[str, Any] = {"parameters": None, "macs": None}
    if "export" in folders:
        exported = read_json(folders["export"] / "export.json")
        facts["parameters"] = exported.get("parameters")
        facts["exporter"] = exported.get("exporter")
        facts["fallback_reason"] = exported.get("fallback_reason", "")
        facts["findings"] = exported.get("findings", [])
    if "convert" in folders:
        facts.update(read_json(folders["convert"] / "convert.json")["model"])
    return {"name": recipe.name, **facts}


def _target_facts(recipe: Recipe, name: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    results = read_results(folders, name)
    convert = results["convert"]
    facts: dict[str, Any] = {
        "artifact": f"{stage_folder_name('convert')}/{artifact_path(name)}",
        "sha256": convert["sha256"],
        "bytes": convert["bytes"],
        "fp32_bytes": convert["fp32_bytes"],
        "weights": convert["weights"],
    }
    if "release" in folders:
        facts["artifact"] = f"{stage_folder_name('release')}/{release_name(name, sorted(recipe.targets))}"
    if "parity" in results:
        parity = dict(results["parity"])
        facts["int8_share"] = parity.pop("int8_share")
        facts["float_layers"] = parity.pop("float_layers")
        facts["float_reasons"] = parity.pop("float_reasons")
        parity.pop("layers", None)  # they stay in parity.json
        facts["parity"] = parity
    if "accuracy" in results:
        facts["accuracy"] = results["accuracy"]
    if "latency" in results:
        facts["latency"] = _latency_facts(results["latency"])
    facts["gates"] = [gate.to_json() for gate in judge_gates(recipe, name, results)]
    return facts


def _latency_facts(latency: Mapping[str, Any]) -> dict[str, Any]:
    """The figures without the raw times and the profile, which stay in latency.json."""
    int8 = {key: value for key, value in latency["int8"].items() if key not in ("nanoseconds", "launches", "noisy")}
    return {
        **int8,
        "fp32_median_ms": latency["fp32"]["median_ms"],
        "fp32_p90_ms": latency["fp32"]["p90_ms"],
        "fp32_iqr_ms": latency["fp32"]["iqr_ms"],
        "fp32_peak_bytes": latency["fp32"]["peak_bytes"],
        "speedup": latency["speedup"],
        "speedup_interval": latency["speedup_interval"],
        "noisy": latency["noisy"],
    }
