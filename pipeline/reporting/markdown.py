"""Returns the report as Markdown, short enough for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeship.pipeline.reporting import pictures, sections
from edgeship.pipeline.reporting import wording as say
from edgeship.pipeline.reporting.run_folder import Run

MOST_REMARKS = 20
_MARKS = {"good": "\N{WHITE HEAVY CHECK MARK}", "bad": "\N{CROSS MARK}"}


def render_markdown(run: Run) -> str:
    """Verdict, artifacts, gates, variants, findings and stages; names cannot become markup."""
    verdict = sections.verdict(run)
    mark = f"{_MARKS[verdict.tone]} " if verdict.tone in _MARKS else ""
    parts = [
        f"## {_plain(run.report.text('recipe') or say.UNKNOWN)}: {mark}{_plain(verdict.short)}",
        _plain(verdict.sentence),
        _plain(" \N{MIDDLE DOT} ".join(sections.lead(run))),
        _artifacts(sections.cards(run)),
        _gates(sections.gates(run)),
        _variants(run),
        _remarks(sections.remarks(run)),
        _stages(sections.stages(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _artifacts(cards: Sequence[sections.Card]) -> str:
    labels = list(dict.fromkeys(stat.label for card in cards for stat in card.stats))
    rows = []
    for label in labels:
        found = [next((stat for stat in card.stats if stat.label == label), None) for card in cards]
        rows.append([label, *(f"{stat.value} ({stat.note})" if stat and stat.note else "" for stat in found)])
    return _table(["", *(card.name for card in cards)], rows)


def _gates(gates: Sequence[sections.GateRow]) -> str:
    rows = [
        [f"{_MARKS['good']} met" if g.met else f"{_MARKS['bad']} not met", g.name, g.measured, g.limit, g.target]
        for g in gates
    ]
    return _table(["", "gate", "measured", "limit", "target"], rows)


def _variants(run: Run) -> str:
    rows = [[row.name, row.quality, row.latency, row.size] for row in pictures.variants(run)]
    return _table(["variant", "accuracy", "median latency", "size"], rows)


def _remarks(remarks: Sequence[sections.Remark]) -> str:
    lines = [f"- {_plain(remark.text)}" for remark in remarks[:MOST_REMARKS]]
    more = len(remarks) - MOST_REMARKS
    return "\n".join([*lines, *([f"- and {more} more in the report"] if more > 0 else [])])


def _stages(stages: Sequence[sections.StageRow]) -> str:
    return _table(["stage", "time"], [[stage.name, stage.time] for stage in stages])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) if cell != '---' else cell for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that no renderer takes for markup: one line, every mark of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&@])", r"\\\1", " ".join(text.split()))
