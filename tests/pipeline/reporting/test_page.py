"""The page: complete, closed against the network and hostile names, and there for runs of any age and end."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeship.calibration.errors import InputError
from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.reporting.junit import render_junit
from edgeship.pipeline.reporting.markdown import render_markdown
from edgeship.pipeline.reporting.page import render_page
from edgeship.pipeline.reporting.run_folder import Run, open_run
from edgeship.pipeline.reporting.tradeoff import Question, Variant, tradeoff_chart

HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7*7 }} |&amp;"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """The elements of a page: their tags, attributes and texts; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(run: Run) -> Page:
    return Page(render_page(run))


def test_artifacts_that_decide_nothing_are_drawn_by_their_noise(run_folder: Path, plain_report: dict[str, Any]) -> None:
    """A picture or an embedding has neither top-1 nor decisions; fp32 has no noise to draw."""
    outputs = {name: {"max_abs": 0.1, "sqnr_db": ratio} for name, ratio in (("mask", 31.25), ("depth", 40.0))}
    plain_report["reference"] = {"accuracy": {"n": 400}, "data": "evaluation"}
    plain_report["targets"]["tflite"]["accuracy"] = {"n": 400, "fp32_agreement": None, "outputs": outputs}
    (run_folder / "report.json").write_text(json.dumps(plain_report))
    page = page_of(open_run(run_folder))
    assert "signal to noise against fp32, dB" in page.texts
    assert "31.2 dB" in page.texts
    assert not [text for text in page.texts if "decides as fp32" in text]


@pytest.mark.parametrize(
    ("mode", "name"),
    [("static", "int8"), ("dynamic", "dynamic int8"), ("int16", "int16"), ("float16", "fp16"), ("none", "artifact")],
)
def test_artifacts_are_called_what_they_are(
    mode: str, name: str, run_folder: Path, plain_report: dict[str, Any]
) -> None:
    plain_report["quantization"] = {**plain_report.get("quantization", {}), "mode": mode}
    (run_folder / "report.json").write_text(json.dumps(plain_report))
    texts = page_of(open_run(run_folder)).texts
    assert f"tflite {name}" in texts
    assert "tflite fp32" in texts
    assert (mode == "static") == ("tflite int8" in texts)


def test_noise_below_0_and_above_100_db_keeps_its_place() -> None:
    def heights(qualities: tuple[float, float], **more: Any) -> list[float]:
        question = Question("Noise", "size", "SQNR, dB", 1.0, **more)
        drawn = tradeoff_chart([Variant(str(n), n, False, 1.0, each) for n, each in enumerate(qualities)], question)
        return [float(each) for each in re.findall(r'cy="([0-9.]+)"', drawn)]

    apart = heights((-20.0, 150.0), limits=(-math.inf, math.inf))
    within = heights((0.0, 90.0))
    assert apart[0] - apart[1] == pytest.approx(within[0] - within[1], rel=0.1)


def test_the_page_says_on_which_device_it_was_measured(run_folder: Path, plain_report: dict[str, Any]) -> None:
    (run_folder / "report.json").write_text(json.dumps({**plain_report, "device": "ssh://pi@board"}))
    assert [text for text in page_of(open_run(run_folder)).texts if text.endswith(", ssh://pi@board")]


def test_a_finding_is_told_once(run_folder: Path) -> None:
    """The plan holds it too, in other words."""
    told = [text for text in page_of(open_run(run_folder)).texts if "odd" in text]
    assert told == ["digits: odd: 1"]


def test_the_page_shows_every_record_there_is(run_folder: Path) -> None:
    page = page_of(open_run(run_folder))
    anchors = {value for key, value in page.attributes if key == "href"}
    expected = ["summary", "gates", "tradeoff", "latency", "layers", "calibration", "findings", "stages", "reproduce"]
    assert anchors == {f"#{name}" for name in expected}
    assert {value for key, value in page.attributes if key == "id"} == set(expected)
    text = " ".join(page.texts)
    for shown in (
        "99.00 %",
        "CONV_2D",
        "conv_1",
        "its output is an index",
        "ab" * 32,
        "onnx==1.23.2",
        "not measurable",
    ):
        assert shown in text
    assert "2 of 3 gates not met" in text


def test_the_page_loads_nothing_and_runs_nothing(run_folder: Path) -> None:
    html = render_page(open_run(run_folder))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in {"src", "srcset", "action"}]
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert not re.search(r"https?:|url\(|@import|@font-face", html)


def test_every_picture_and_table_can_be_read_without_seeing_it(run_folder: Path) -> None:
    html = render_page(open_run(run_folder))
    pictures = re.findall(r"<svg[^>]*>", html)
    assert len(pictures) > 5
    assert all('role="img" aria-label="' in each or 'aria-hidden="true"' in each for each in pictures)
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        assert '<th scope="col"' in table
        assert '<th scope="row"' in table


def test_hostile_names_stay_text(make_run: Callable[..., Run]) -> None:
    run = make_run(name=HOSTILE, tensor=HOSTILE, gate=HOSTILE)
    plain, hostile = page_of(make_run()), page_of(run)
    assert hostile.tags == plain.tags
    assert [key for key, _ in hostile.attributes] == [key for key, _ in plain.attributes]
    assert HOSTILE in "".join(hostile.texts)
    markdown = render_markdown(run)
    assert "<script" not in markdown.replace("\\<", "")
    assert all(re.sub(r"\\.", "", line).count("|") in {0, 3, 5, 6} for line in markdown.splitlines())


def test_a_report_without_any_key_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    run = open_run(tmp_path)
    assert "No gates set" in "".join(page_of(run).texts)
    assert "No gates set" in render_markdown(run)
    assert render_junit(run)


def _paths(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [so_far, *(path for key, each in inner for path in _paths(each, (*so_far, key)))]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_of_a_wrong_kind_breaks_the_page(plain_report: dict[str, Any], data: st.DataObject) -> None:
    report = copy.deepcopy(plain_report)
    path = data.draw(st.sampled_from(_paths(report)[1:]))
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(
            st.sampled_from([None, "text", -1, 1e300, [], {}, [[]], [{}], True, [None], {"a": 1}])
        )
    else:
        del place[path[-1]]
    run = Run(Facts(report), {})
    assert render_page(run)
    assert render_markdown(run)
    assert render_junit(run)


def test_records_that_changed_since_the_run_are_not_shown(run_folder: Path) -> None:
    (run_folder / "8-latency/latency.json").write_text("{}")
    (run_folder / "6-parity/parity.json").unlink()
    run = open_run(run_folder)
    assert len(run.remarks) == 2
    text = "".join(page_of(run).texts)
    assert "8-latency/latency.json was changed since the run" in text
    assert "6-parity/parity.json is gone" in text
    assert "CONV_2D" not in text


def test_a_killed_run_is_reported_by_its_finished_stages(tmp_path: Path) -> None:
    (tmp_path / ".edgeship").mkdir()
    output = {"path": "model.onnx", "sha256": "ef" * 32, "bytes": 10}
    record = {"name": "export", "key": "k", "outputs": [output], "seconds": 2.0}
    (tmp_path / ".edgeship/export.json").write_text(json.dumps(record))
    text = "".join(page_of(open_run(tmp_path)).texts)
    assert "Run not finished" in text
    assert "2-export/model.onnx" in text


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is no run folder"), ("[]", "holds no report"), ("{", "cannot be read")]
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=said):
        open_run(tmp_path)
    with pytest.raises(InputError, match="there is no run folder"):
        open_run(tmp_path / "nowhere")
