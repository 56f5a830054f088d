"""Returns what there is to report of a run folder: its report, or what is left of a run that did not finish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeship.calibration.errors import InputError
from edgeship.pipeline.report import FAILURE, REPORT
from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.stage import ORDER
from edgeship.pipeline.workspace import INTERNAL, sha256_of, stage_folder_name

DETAILS = {
    "quantize": ("plan.json", "histograms.json"),
    "parity": ("parity.json",),
    "accuracy": ("accuracy.json",),
    "latency": ("latency.json",),
    "release": ("manifest.json",),
}
"""The files of the stages that hold more than report.json does."""


@dataclass(frozen=True)
class Run:
    """A run's report and its stages' own records by file name; `remarks` say what could not be used, and why."""

    report: Facts
    details: Mapping[str, Facts]
    remarks: tuple[str, ...] = ()

    def detail(self, name: str) -> Facts:
        """What a stage's file holds; nothing where the stage did not run."""
        return self.details.get(name, Facts())

    @property
    def failure(self) -> Facts:
        """Which stage failed and the error's text; nothing where none did."""
        return self.report.at("failed")


def open_run(folder: Path) -> Run:
    """The run in `folder` (or beside its report.json). Raises InputError where nothing of a run can be read."""
    folder = folder.parent if folder.name == REPORT else folder
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}; accepted: the folder that `edgeship deploy --out` wrote")
    for path in (folder / REPORT, folder / INTERNAL / FAILURE):
        if path.exists():
            return _with_details(folder, _read_object(path))
    stages = _recorded_stages(folder)
    if not stages:
        raise InputError(f"{folder} is no run folder: it has no {REPORT} and no finished stage")
    unfinished = {"recipe": folder.name, "stages": stages, "failed": {"stage": None, "error": "the run did not finish"}}
    return _with_details(folder, unfinished)


def _with_details(folder: Path, report: Mapping[str, Any]) -> Run:
    """The report with the records of those stages that it speaks of, if they are still the same."""
    facts = Facts(report)
    digests = {
        output.text("path"): output.text("sha256")
        for stage in facts.objects("stages")
        for output in stage.objects("outputs")
    }
    details, remarks = {}, []
    for stage, names in DETAILS.items():
        for name in names:
            path = folder / stage_folder_name(stage) / name
            expected = digests.get(f"{stage_folder_name(stage)}/{name}")
            if expected is None:
                continue
            try:
                if sha256_of(path) == expected:
                    details[name] = Facts(json.loads(path.read_text()))
                else:
                    remarks.append(f"{stage_folder_name(stage)}/{name} was changed since the run and is not shown")
            except (OSError, ValueError):
                remarks.append(f"{stage_folder_name(stage)}/{name} is gone or damaged and is not shown")
    return Run(facts, details, tuple(remarks))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no report: expected an object, seen {type(value).__name__}")
    return value


def _recorded_stages(folder: Path) -> list[dict[str, Any]]:
    """The stages that finished, as report.json would have them."""
    stages = []
    for name in ORDER:
        try:
            record = Facts(json.loads((folder / INTERNAL / f"{name}.json").read_text()))
        except (OSError, ValueError):
            continue
        outputs = [
            {**output, "path": f"{stage_folder_name(name)}/{output.get('path')}"}
            for output in record.raw("outputs") or ()
            if isinstance(output, Mapping)
        ]
        stages.append({"name": name, "seconds": record.number("seconds"), "cached": False, "outputs": outputs})
    return stages
