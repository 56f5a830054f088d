"""Returns the gates as JUnit XML, which CI systems show as tests: one suite for each target, one case for each gate."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from edgeship.pipeline.reporting import sections
from edgeship.pipeline.reporting.run_folder import Run

SUITE = "edgeship"
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, escaped or not (section 2.2)."""


def render_junit(run: Run) -> str:
    """The XML document: a gate that is not met is a failure, a stage that failed an error."""
    root = ET.Element("testsuites", {"name": _clean(f"{SUITE} {run.report.text('recipe') or ''}".strip())})
    gates = sections.gates(run)
    for target in dict.fromkeys(gate.target for gate in gates):
        _suite(root, target, [gate for gate in gates if gate.target == target])
    if run.failure:
        _failed(root, run)
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, target: str, gates: list[sections.GateRow]) -> None:
    failures = sum(not gate.met for gate in gates)
    suite = _counted(root, target, tests=len(gates), failures=failures, errors=0)
    for gate in gates:
        case = ET.SubElement(suite, "testcase", {"classname": suite.get("name", ""), "name": _clean(gate.name)})
        said = f"measured {gate.measured}, accepted: {gate.limit}"
        if gate.met:
            ET.SubElement(case, "system-out").text = _clean(said)
        else:
            ET.SubElement(case, "failure", {"message": _clean(said), "type": "gate"}).text = _clean(said)


def _failed(root: ET.Element, run: Run) -> None:
    suite = _counted(root, "stages", tests=1, failures=0, errors=1)
    stage = run.failure.text("stage") or "run"
    case = ET.SubElement(suite, "testcase", {"classname": suite.get("name", ""), "name": _clean(stage)})
    error = _clean(run.failure.text("error") or "no message")
    ET.SubElement(case, "error", {"message": error.splitlines()[0], "type": "stage"}).text = error


def _counted(root: ET.Element, name: str, **counts: int) -> ET.Element:
    facts = {"name": _clean(f"{SUITE}.{name}"), **{key: str(value) for key, value in counts.items()}}
    return ET.SubElement(root, "testsuite", facts)


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
