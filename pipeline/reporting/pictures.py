"""Returns the report's pictures and the tables beside them, for whatever the run has records of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from edgeship.pipeline.mixed_summary import mixed_heading, mixed_table
from edgeship.pipeline.reporting import wording as say
from edgeship.pipeline.reporting.distribution import Times, latency_chart, outside, silhouette_chart
from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.reporting.run_folder import Run
from edgeship.pipeline.reporting.sections import noise_of
from edgeship.pipeline.reporting.tradeoff import Question, Variant, pareto_front, tradeoff_chart

MOST_HISTOGRAMS = 400
MOST_ROWS = 400


@dataclass(frozen=True)
class Picture:
    """A drawing with its caption."""

    caption: str
    svg: Markup


Judge = Literal["top1", "agreement", "sqnr"]
AXES: Mapping[Judge, str] = {
    "top1": "top-1 accuracy, %",
    "agreement": "decides as fp32, %",
    "sqnr": "signal to noise against fp32, dB",
}
HEADINGS: Mapping[Judge, str] = {
    "top1": "top-1",
    "agreement": "decides as fp32",
    "sqnr": "signal to noise against fp32",
}


NAMES = {"static": "int8", "dynamic": "dynamic int8", "int16": "int16", "float16": "fp16", "none": "artifact"}
"""What the artifacts of each `quantize.mode` are called."""


@dataclass(frozen=True)
class VariantRow:
    """One variant in numbers, and whether no other beats it in latency and in size."""

    name: str
    quality: str
    latency: str
    size: str
    best: str


@dataclass(frozen=True)
class Table:
    """Rows under headings; `shares` are the lengths of a bar in each row, 0..1."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class _Kind:
    target: str
    series: int
    is_float: bool
    size: float | None
    latency: float | None
    quality: float | None
    interval: tuple[float, float] | None
    mode: str

    @property
    def name(self) -> str:
        return f"{self.target} {'fp32' if self.is_float else self.mode}"


def _mode(run: Run) -> str:
    """What artifacts that are not the float model are called."""
    return NAMES.get(run.report.text("quantization", "mode") or "", "int8")


def judged_by(run: Run) -> Judge:
    """What the artifacts' quality is: top-1, or agreement of decisions, or the noise of outputs that decide nothing."""
    if run.report.number("reference", "accuracy", "top1") is not None:
        return "top1"
    decided = [facts.number("accuracy", "fp32_agreement") for _, facts in run.report.items("targets")]
    return "sqnr" if decided and all(each is None for each in decided) else "agreement"


def _quality(accuracy: Facts, judge: Judge) -> float | None:
    """An artifact's quality: in percent, or in dB; None where it was not measured, or nothing differs from fp32."""
    if judge == "top1":
        return accuracy.number("top1")
    if judge == "agreement":
        agreement = accuracy.number("fp32_agreement")
        return None if agreement is None else 100 * agreement
    noise = noise_of(accuracy)
    return noise if noise is not None and math.isfinite(noise) else None


def _kinds(run: Run) -> Iterator[_Kind]:
    """Every variant of the run. The float model's accuracy is that of all fp32 artifacts; it has no noise."""
    reference, judge = run.report.at("reference", "accuracy"), judged_by(run)
    labelled = judge == "top1"
    for series, (target, facts) in enumerate(run.report.items("targets")):
        accuracy = facts.at("accuracy")
        yield _Kind(
            target,
            series,
            False,
            facts.number("bytes"),
            facts.number("latency", "median_ms"),
            _quality(accuracy, judge),
            accuracy.pair("interval") if labelled else None,
            _mode(run),
        )
        if facts.number("fp32_bytes") is not None:
            yield _Kind(
                target,
                series,
                True,
                facts.number("fp32_bytes"),
                facts.number("latency", "fp32_median_ms"),
                reference.number("top1") if labelled else 100.0 if judge == "agreement" else None,
                reference.pair("interval") if labelled else None,
                _mode(run),
            )


def tradeoffs(run: Run) -> list[Picture]:
    """Accuracy against latency and against size."""
    quality = AXES[judged_by(run)]
    limits = (-math.inf, math.inf) if judged_by(run) == "sqnr" else (0.0, 100.0)
    largest = max((kind.size or 0.0 for kind in _kinds(run)), default=0.0)
    size_unit, size_name = (1024.0, "KiB") if largest < 4 * 1024**2 else (1024.0**2, "MiB")
    questions = {
        "latency": Question("Accuracy against latency", "median latency, ms", quality, 1.0, limits),
        "size": Question("Accuracy against size", f"size, {size_name}", quality, size_unit, limits),
    }
    found = {attribute: _as_variants(_kinds(run), attribute) for attribute in questions}
    return [
        Picture(question.title, tradeoff_chart(found[attribute], question))
        for attribute, question in questions.items()
        if found[attribute]
    ]


def _as_variants(kinds: Iterable[_Kind], attribute: str) -> list[Variant]:
    """The kinds whose cost (`latency` or `size`) and quality are known."""
    return [
        Variant(kind.name, kind.series, kind.is_float, cost, kind.quality, kind.interval)
        for kind, cost in ((kind, getattr(kind, attribute)) for kind in kinds)
        if cost is not None and kind.quality is not None
    ]


def variants(run: Run) -> list[VariantRow]:
    """The same in numbers."""
    kinds = list(_kinds(run))
    shown = say.decibels if judged_by(run) == "sqnr" else say.percent
    best = {
        attribute: {each.name for each in pareto_front(_as_variants(kinds, attribute))}
        for attribute in ("latency", "size")
    }
    return [
        VariantRow(
            kind.name,
            shown(kind.quality),
            say.milliseconds(kind.latency),
            say.size(kind.size),
            ", ".join(word for word in ("latency", "size") if kind.name in best[word]) or say.UNKNOWN,
        )
        for kind in kinds
    ]


def latencies(run: Run) -> list[Picture]:
    """The distribution of inference times, a picture for each target."""
    pictures = []
    for series, (target, facts) in enumerate(run.detail("latency.json").items("targets")):
        rows = [
            Times(kind if kind == "fp32" else _mode(run), kind == "fp32", series, [ns / 1e6 for ns in times])
            for kind in ("fp32", "int8")
            if len(times := facts.numbers(kind, "nanoseconds")) > 1
        ]
        if rows:
            pictures.append(Picture(target, latency_chart(rows, f"Inference times of {target}")))
    return pictures


def histograms(run: Run) -> list[Picture]:
    """Each calibrated tensor's values with its chosen range, those that lose most to clipping first."""
    activations = run.detail("plan.json").at("activations")
    found = []
    for name, values in run.detail("histograms.json").items():
        chosen, scale = activations.pair(name, "range"), activations.number(name, "scale")
        lost = outside(values, chosen, scale or 0.0) if chosen else None
        cut = "stays float" if chosen is None else f"{_lost(lost)} clipped, scale {say.number(scale, 3)}"
        picture = Picture(f"{name}\n{cut}", silhouette_chart(name, values, chosen))
        found.append((-(lost or 0.0), _natural(name), picture))
    return [picture for *_, picture in sorted(found, key=lambda each: each[:2])[:MOST_HISTOGRAMS]]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts conv_2 before conv_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _lost(share: float | None) -> str:
    if not share:
        return "none"
    return "< 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def layer_tables(run: Run) -> list[Table]:
    """Layer by layer: how far each target is from the reference, what each adds, what went back, and sensitivity."""
    tables = []
    for target, facts in run.detail("parity.json").items("targets"):
        rows = facts.objects("layers")
        if rows:
            tables.append(_errors(target, rows))
    tables += _mixed(run.report)
    sensitive = run.report.at("quantization", "sensitivity")
    if sensitive.objects("layers"):
        tables.append(_sensitivity(sensitive))
    return tables


def _errors(target: str, rows: list[Facts]) -> Table:
    most = max((row.number("own", "max_steps") or row.number("max_steps") or 0.0 for row in rows), default=0.0) or 1.0
    return Table(
        f"Error of each layer: {target}",
        "In quantization steps against the quantized reference: what has accumulated up to the layer's output, and the "
        "layer's own, computed from what the artifact's layer saw. The bar is the layer's own.",
        ("layer", "operator", "accumulated max", "mean", "own max", "SQNR, dB"),
        tuple(
            (
                row.text("name") or say.UNKNOWN,
                row.text("operator") or say.UNKNOWN,
                say.number(row.number("max_steps"), 3),
                say.number(row.number("mean_steps"), 2),
                say.number(row.number("own", "max_steps"), 3),
                "equal" if row.number("max_abs") == 0 else say.number(row.number("sqnr_db"), 3),
            )
            for row in rows[:MOST_ROWS]
        ),
        tuple((row.number("own", "max_steps") or row.number("max_steps") or 0.0) / most for row in rows[:MOST_ROWS]),
    )


def _mixed(report: Facts) -> list[Table]:
    """The steps of mixed precision, where there are any that can be read; the bar is the noise that is left."""
    facts = report.at("quantization", "mixed")
    if not facts.objects("steps"):
        return []
    try:
        heading, (names, *rows) = mixed_heading(facts.raw()), mixed_table(report.raw())
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    noise = [step.number("noise") or 0.0 for step in facts.objects("steps")]
    return [
        Table(
            f"{heading[0].upper()}{heading[1:]}",
            "Each layer that went back is the one that helped most beside those before, on the calibration samples; "
            "figures and times are of the model up to there. The bar is the noise that is left at the outputs.",
            names,
            tuple(rows),
            tuple(each / (max(noise) or 1.0) for each in noise),
        )
    ]


def _sensitivity(facts: Facts) -> Table:
    unit = facts.text("unit") or "cost"
    key = "loss" if any(row.number("loss") for row in facts.objects("layers")) else "noise"
    rows = sorted(facts.objects("layers"), key=lambda row: -(row.number(key) or 0.0))[:MOST_ROWS]
    costs = [max(row.number(key) or 0.0, 0.0) for row in rows]
    return Table(
        "Sensitivity of each layer",
        f"What quantizing that layer alone costs ({unit}), and the noise it adds to the outputs, relative to their "
        "power; the dearest first.",
        ("layer", "operator", "drop", "loss", "noise"),
        tuple(
            (
                row.text("layer") or say.UNKNOWN,
                row.text("operator") or say.UNKNOWN,
                *(say.number(row.number(figure), 3) for figure in ("drop", "loss", "noise")),
            )
            for row in rows
        ),
        tuple(cost / (max(costs) or 1.0) for cost in costs),
    )


def profiles(run: Run) -> list[Table]:
    """Where the time goes in each artifact that was profiled, operator by operator, the slowest first."""
    tables = []
    for target, facts in run.detail("latency.json").items("targets"):
        rows = sorted(facts.objects("profile"), key=lambda row: -(row.number("us") or 0.0))
        times = [row.number("us") or 0.0 for row in rows]
        total = sum(times)
        if not total:
            continue
        cells = tuple(
            (
                row.text("name") or say.UNKNOWN,
                row.text("operator") or say.UNKNOWN,
                say.number(us, 3),
                say.share(us / total),
            )
            for row, us in zip(rows, times, strict=True)
        )
        tables.append(
            Table(
                f"Operators of {target}",
                "From the runtime's own profiler.",
                ("output", "operator", "\N{MICRO SIGN}s", "share"),
                cells[:MOST_ROWS],
                tuple(us / times[0] for us in times[:MOST_ROWS]),
            )
        )
    return tables
