"""Returns the parts of a report as plain values; page, Markdown and JUnit file each give them their form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeship.pipeline.compare import step_unit
from edgeship.pipeline.gates import LOWER_LIMITS, worst_sqnr
from edgeship.pipeline.reporting import wording as say
from edgeship.pipeline.reporting.facts import Facts
from edgeship.pipeline.reporting.run_folder import Run
from edgeship.pipeline.summary import SAME_SIZE, form_rows, times_smaller, training_rows, warnings

Tone = Literal["good", "bad", "warn", "plain"]


@dataclass(frozen=True)
class Verdict:
    """The run in one sentence."""

    tone: Tone
    short: str
    sentence: str


@dataclass(frozen=True)
class GateRow:
    """One gate of one target."""

    target: str
    name: str
    measured: str
    limit: str
    met: bool


@dataclass(frozen=True)
class Stat:
    """One figure of a target: what it is, its value, and what it means."""

    label: str
    value: str
    note: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Card:
    """One target with its figures."""

    name: str
    series: int
    artifact: str
    sha256: str
    stats: tuple[Stat, ...]


@dataclass(frozen=True)
class StageRow:
    """One stage: its time, its share of the longest stage's, and its files as (path, size, digest)."""

    name: str
    time: str
    share: float
    outputs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Remark:
    """Something a person should know before shipping."""

    tone: Tone
    text: str


def verdict(run: Run) -> Verdict:
    """Whether this can be shipped."""
    if run.failure:
        stage = run.failure.text("stage")
        where = f"failed in {stage}" if stage else "not finished"
        return Verdict("bad", f"Run {where}", (run.failure.text("error") or "no message").splitlines()[0])
    rows = gates(run)
    failing = [row for row in rows if not row.met]
    if failing:
        named = ", ".join(f"{row.name} of {row.target}" for row in failing[:3])
        more = f" and {len(failing) - 3} more" if len(failing) > 3 else ""
        return Verdict("bad", f"{len(failing)} of {say.plural(len(rows), 'gate')} not met", f"Not met: {named}{more}.")
    if rows:
        return Verdict("good", "All gates met", f"{say.plural(len(rows), 'gate')} met, none missed.")
    return Verdict("plain", "No gates set", "The recipe sets no gates, so nothing was judged.")


def gates(run: Run) -> list[GateRow]:
    """Every gate of every target, those that are not met first."""
    rows = []
    for target, facts in run.report.items("targets"):
        for gate in facts.objects("gates"):
            name, measured = gate.text("name") or say.UNKNOWN, gate.number("measured")
            relation = "at least" if name in LOWER_LIMITS else "at most"
            rows.append(
                GateRow(
                    target,
                    name,
                    _unmeasured(gate) if measured is None else say.number(measured, 5),
                    f"{relation} {say.number(gate.number('limit'), 6)}",
                    gate.flag("met"),
                )
            )
    return sorted(rows, key=lambda row: row.met)


def _unmeasured(gate: Facts) -> str:
    return "no difference" if gate.flag("met") else "not measurable"


def cards(run: Run) -> list[Card]:
    """Every target's figures."""
    reference = run.report.at("reference", "accuracy")
    return [
        Card(
            name,
            series,
            facts.text("artifact") or "",
            facts.text("sha256") or "",
            tuple(
                stat
                for stat in (
                    _size(facts),
                    _accuracy(facts.at("accuracy"), reference),
                    _latency(facts.at("latency")),
                    _parity(facts.at("parity")),
                    _share(facts),
                )
                if stat
            ),
        )
        for series, (name, facts) in enumerate(run.report.items("targets"))
    ]


def _size(facts: Facts) -> Stat | None:
    size, before = facts.number("bytes"), facts.number("fp32_bytes")
    if size is None:
        return None
    change = ""
    if before and size:
        how = times_smaller(before, size, "\N{MULTIPLICATION SIGN}")
        change = f"{how} {'as' if how == SAME_SIZE else 'than'} fp32, {say.size(before)}"
    return Stat("Size", say.size(size), change)


def noise_of(accuracy: Facts) -> float | None:
    """The signal to noise of an artifact's worst output, in dB: see `worst_sqnr`."""
    keys = ("max_abs", "sqnr_db")
    outputs = {name: {key: output.number(key) for key in keys} for name, output in accuracy.items("outputs")}
    return worst_sqnr({"outputs": outputs})


def _accuracy(facts: Facts, reference: Facts) -> Stat | None:
    top1, n = facts.number("top1"), facts.number("n")
    if top1 is None:
        agreement = facts.number("fp32_agreement")
        if agreement is not None:
            return Stat(
                "Agreement", say.share(agreement), f"decides as fp32 does, on {say.count(n)} samples without labels"
            )
        ratio = noise_of(facts)
        if ratio is None:
            return None
        seen = "equal" if ratio == math.inf else f"{ratio:.1f} dB"
        note = f"signal to noise of the worst output against fp32, on {say.count(n)} samples"
        return Stat("Outputs", seen, note)
    drop, interval = facts.number("drop"), facts.pair("drop_interval")
    within = f", 95 %: {say.signed(interval[0])} to {say.signed(interval[1])}" if interval else ""
    before = reference.number("top1")
    lost = "" if drop is None else f"drop {say.signed(drop)} points{within}; "
    return Stat("Top-1", say.percent(top1), f"{lost}fp32 {say.percent(before)}, {say.count(n)} samples")


def _latency(facts: Facts) -> Stat | None:
    median = facts.number("median_ms")
    if median is None:
        return None
    speedup, threads = facts.number("speedup"), facts.number("threads")
    interval = facts.pair("speedup_interval")
    within = f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    gain = "" if speedup is None else f"{speedup:.2f}\N{MULTIPLICATION SIGN} the speed of fp32{within}, "
    peak = facts.number("peak_bytes")
    memory = "" if peak is None else f", peak memory {say.size(peak)}"
    noisy = "; noisy" if facts.flag("noisy") else ""
    note = f"{gain}{say.plural(round(threads or 1), 'thread')}{memory}{noisy}"
    return Stat("Latency", say.milliseconds(median), note, "warn" if noisy else "plain")


def _parity(facts: Facts) -> Stat | None:
    most = facts.number("max_steps")
    if not facts:
        return None
    mean, agreement = facts.number("mean_steps"), facts.number("agreement")
    same = "" if agreement is None else f", same decision {say.share(agreement)}"
    unit = step_unit({name: output.raw() for name, output in facts.items("outputs")}, most or 0.0)
    counted = "" if unit.startswith("step") else f", {unit}"
    value = (
        "no step to count in" if most is None else say.number(most, 3) if counted else f"{say.number(most, 3)} {unit}"
    )
    note = f"largest difference from the quantized reference{counted}; mean {say.number(mean, 2)}{same}"
    return Stat("Parity", value, note)


def _share(facts: Facts) -> Stat | None:
    share = facts.number("int8_share")
    if share is None:
        return None
    left = len(facts.texts("float_layers"))
    note = "of multiply-accumulates, as the runtime executes them"
    return Stat("Integer share", say.share(share), f"{note}; {say.plural(left, 'float layer')}" if left else note)


def stages(run: Run) -> list[StageRow]:
    """The stages that finished."""
    found = run.report.objects("stages")
    longest = max((stage.number("seconds") or 0.0 for stage in found), default=0.0) or 1.0
    return [
        StageRow(
            stage.text("name") or say.UNKNOWN,
            say.seconds(stage.number("seconds")) + (" (kept)" if stage.flag("cached") else ""),
            (stage.number("seconds") or 0.0) / longest,
            tuple(
                (each.text("path") or say.UNKNOWN, say.size(each.number("bytes")), each.text("sha256") or "")
                for each in stage.objects("outputs")
            ),
        )
        for stage in found
    ]


def remarks(run: Run) -> list[Remark]:
    """Findings of the run, and what could not be read of it."""
    found = [Remark("warn", text) for text in run.remarks]
    details = (run.failure.text("error") or "").splitlines()[1:]
    found += [Remark("bad", line.strip().removeprefix("- ")) for line in details]
    try:
        found += [Remark("warn", line) for line in warnings(run.report.raw() or {})]
        found += [Remark("plain", line) for line in training_rows(run.report.raw() or {})]
        found += [Remark("plain", line) for line in form_rows(run.report.raw() or {})]
    except (KeyError, TypeError, ValueError, AttributeError):
        found.append(Remark("warn", "the report's findings have another form than this edgeship writes"))
    floats = run.detail("plan.json").raw("stays_float")
    if isinstance(floats, dict):
        found += [Remark("plain", f"{name} stays float: {reason}") for name, reason in floats.items()]
    return found


def lead(run: Run) -> list[str]:
    """What the model is and what it was judged on, in a few words each."""
    model, reference = run.report.at("model"), run.report.at("reference")
    words = []
    if model.number("parameters"):
        words.append(f"{say.count(model.number('parameters'))} parameters")
    if model.number("macs"):
        words.append(f"{(model.number('macs') or 0) / 1e6:,.1f} M multiply-accumulates")
    if reference.number("accuracy", "n"):
        words.append(f"judged on {say.count(reference.number('accuracy', 'n'))} {reference.text('data') or ''} samples")
    if run.report.text("machine", "cpu", "model"):
        device = run.report.text("device") or "host"
        place = "" if device == "host" else f", {device}"
        words.append(f"measured on {run.report.text('machine', 'cpu', 'model')}{place}")
    return words


def commands(run: Run) -> list[str]:
    """What to type to get the same again."""
    import shlex

    made = run.report.at("run")
    parts = ["edgeship", "deploy", made.text("recipe_file") or "recipe.toml"]
    for target in made.texts("targets"):
        parts += ["--target", target]
    for override in made.texts("overrides"):
        parts += ["--set", override]
    return [shlex.join(parts), "edgeship verify 9-release"]


def inputs(run: Run) -> list[tuple[str, str]]:
    """What went in, with its digest: (role, sha256)."""
    recipe = run.report.text("run", "recipe_sha256")
    found = [("recipe", recipe)] if recipe else []
    given = run.detail("manifest.json").raw("inputs")
    if isinstance(given, dict):
        found += [(str(role), str(digest)) for role, digest in given.items() if digest]
    return found


def versions(run: Run) -> Sequence[tuple[str, str]]:
    """The versions that made the artifacts: (library, version)."""
    found = run.detail("manifest.json").raw("versions") or run.report.raw("machine", "versions")
    return [(str(name), str(version)) for name, version in found.items()] if isinstance(found, dict) else []
