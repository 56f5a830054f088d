from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree as ET

from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.reporting.junit import render_junit
from edgeship.pipeline.reporting.run_folder import Run


def test_each_gate_is_a_case_and_those_missed_are_failures(make_run: Callable[..., Run]) -> None:
    root = ET.fromstring(render_junit(make_run()))
    assert root.attrib == {"name": "edgeship digits", "tests": "3", "failures": "2", "errors": "0"}
    (suite,) = root
    failing = {case.get("name"): case.find("failure") for case in suite}
    assert failing["parity.max_steps"] is None
    failure = failing["accuracy.max_drop"]
    assert failure is not None
    assert failure.get("message") == "measured 0.5, accepted: at most 0.1"


def test_a_failed_stage_is_an_error_with_its_whole_text() -> None:
    run = Run(Facts({"recipe": "r", "failed": {"stage": "quantize", "error": "no data\n  - a\x00b"}}), {})
    root = ET.fromstring(render_junit(run))
    assert root.get("errors") == "1"
    error = root.find("testsuite/testcase/error")
    assert error is not None
    assert error.get("message") == "no data"
    assert error.text == "no data\n  - a\N{REPLACEMENT CHARACTER}b"


def test_names_that_xml_cannot_hold_are_replaced(make_run: Callable[..., Run]) -> None:
    root = ET.fromstring(render_junit(make_run(name="<a>\x01\ud800", gate="\x1b[31m<&")))
    assert root.get("name") == "edgeship <a>\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert "\N{REPLACEMENT CHARACTER}[31m<&" in {case.get("name") for case in root.iter("testcase")}
