"""Returns a report as text for a person: where the time went, and what each target's artifact is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.pipeline.compare import step_unit
from edgeship.pipeline.compress_summary import compress_rows
from edgeship.pipeline.gates import figure, worst_sqnr
from edgeship.pipeline.mixed_summary import mixed_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 110
PAGE = "report.html"


def print_summary(report: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """Prints the report of the run in `folder` on stdout."""
    from rich.markup import escape  # names of files, nodes and folders may have brackets

    out = console or _stdout()
    out.print()
    out.print(_headline(report), highlight=False)
    out.print()
    out.print(stage_table(report["stages"]))
    compressed = compress_rows(report["compress"]) if "compress" in report else []
    for lines in (compressed, mixed_rows(report), training_rows(report)):
        if lines:
            out.print()
        for line in lines:
            out.print(line, markup=False, soft_wrap=True)
    if report["targets"]:
        out.print()
        out.print(target_table(report))
        out.print()
        for name, facts in report["targets"].items():
            out.print(f"{name:<14} {_short(folder / facts['artifact'])}", markup=False, soft_wrap=True)
    if (folder / PAGE).exists():
        out.print(f"{'report':<14} {_short(folder / PAGE)}", markup=False, soft_wrap=True)
    notes = warnings(report)
    if notes:
        out.print()
    for line in notes:
        out.print(f"[yellow]![/] {escape(line)}", soft_wrap=True)


def _stdout() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=WIDTH, highlight=False)


def _headline(report: Mapping[str, Any]) -> str:
    model = report["model"]
    facts = [f"[bold]{report['recipe']}[/]"]
    if model.get("parameters"):
        facts.append(f"{model['parameters']:,} parameters")
    if model.get("macs"):
        facts.append(f"{model['macs'] / 1e6:,.1f} M multiply-accumulates")
    if report.get("device", "host") != "host":
        facts.append(f"parity and latency on {report['device']}")
    return "  ".join(facts)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Each stage with its time and what it made."""
    table = _table("stage", "time", "made")
    table.columns[1].justify = "right"
    for stage in stages:
        made = ", ".join(f"{_inside(output['path'])} {size(output['bytes'])}" for output in _models(stage["outputs"]))
        seconds = "[dim]up to date[/]" if stage["cached"] else f"{stage['seconds']:.1f} s"
        table.add_row(stage["name"], seconds, f"[dim]{made}[/]")
    return table


def training_rows(report: Mapping[str, Any]) -> list[str]:
    """What quantization-aware training brought on samples held out, a line for each weight scheme, and what is kept."""
    lines = []
    for scheme, facts in report.get("quantization", {}).get("qat", {}).items():
        by, held_out = facts["judged_by"], facts["held_out"]
        numbers = [f"SQNR {_change(held_out, 'sqnr_db', '.2f')} dB"]
        if by == "loss":
            numbers.append(f"loss {_change(held_out, 'loss', '.4g')}{_with_error(held_out)}")
        lines.append(
            f"qat {scheme}: on {held_out['samples']} samples held out {', '.join(numbers)}; {_kept(facts)}"
            f"{_agreement(facts['agreement'])}"
        )
    return lines


def _with_error(held_out: Mapping[str, Any]) -> str:
    difference, error = held_out["loss_difference"], held_out["standard_error"]
    return "" if difference is None or error is None else f" ({difference:+.2g}, standard error {error:.2g})"


def _kept(facts: Mapping[str, Any]) -> str:
    on_classes = facts["judged_by"] == "loss"
    if facts["kept"] == "trained":
        return f"{'not worse' if on_classes else 'better'}: the trained plan is kept"
    return f"{'worse' if on_classes else 'no better'}: the plan before it is kept"


def _agreement(facts: Mapping[str, Any] | None) -> str:
    """What a reader must know; that both agree goes without saying."""
    if facts is None or facts["layer_max_steps"] <= 1:
        return ""
    return f"; layers of what was trained and of the QDQ model are up to {facts['layer_max_steps']:.0f} steps apart"


def _change(held_out: Mapping[str, Any], key: str, form: str) -> str:
    values = (held_out[when][key] for when in ("before", "after"))
    return " -> ".join("not finite" if value is None else format(value, form) for value in values)


def target_table(report: Mapping[str, Any]) -> Table:
    """One column for each target, one row for each thing one wants to know of it."""
    targets = {name: {**facts, "form": decisions(report).get(name)} for name, facts in report["targets"].items()}
    table = _table("", *targets)
    reference = report.get("reference", {}).get("accuracy", {})
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "form": form,
        "size": size_change,
        "accuracy": lambda facts: accuracy(facts.get("accuracy"), reference),
        "parity": lambda facts: parity(facts.get("parity")),
        "latency": lambda facts: latency(facts.get("latency")),
        "int8 share": share,
        "gates": lambda facts: gates(facts["gates"]),
    }
    for name, render in rows.items():
        cells = [render(facts) for facts in targets.values()]
        if any(cells):
            table.add_row(f"[bold]{name}[/]", *cells)
    return table


def _models(outputs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The model files that go on: not the records, nor the fp32 artifacts that are only compared with."""
    names = [(output, Path(output["path"]).name) for output in outputs]
    skipped = (".json", ".npz", "SHA256SUMS")
    return [output for output, name in names if not name.endswith(skipped) and not name.startswith("fp32")]


def _inside(path: str) -> str:
    return "/".join(Path(path).parts[1:])


def decisions(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `quantize.scheme = "auto"` decided, by target, each with the times it was decided by."""
    quantization = report.get("quantization", {})
    times = quantization.get("measured", {}).get("scheme", {})
    made = quantization.get("scheme", {}).get("targets", {})
    return {name: {**decision, "times": times.get(name, [])} for name, decision in made.items()}


def form(facts: Mapping[str, Any]) -> str:
    """The form that was chosen by measurement, among how many, and how much faster than float it was then."""
    decision = facts["form"]
    if not decision:
        return ""
    times = {each["name"]: each for each in decision["times"]}
    chosen = times.get(decision["chosen"])
    gain = f", {times['fp32']['median_ms'] / chosen['median_ms']:.2f}x float's speed" if chosen else ""
    return f"{decision['chosen']}{gain}\nfastest here of {len(decision['tried'])} tried"


def form_rows(report: Mapping[str, Any]) -> list[str]:
    """Every form that was tried for each target, and why it lost."""
    return [
        f"{target}: {each['form']}: {each['lost'] or 'chosen'}"
        for target, decision in decisions(report).items()
        for each in decision["tried"]
    ]


def size_change(facts: Mapping[str, Any]) -> str:
    """Bytes of the fp32 artifact and of this one, and their ratio."""
    before, after = facts["fp32_bytes"], facts["bytes"]
    return f"{size(before)} -> {size(after)}  ({times_smaller(before, after)})"


SAME_SIZE = "as large"


def times_smaller(before: float, after: float, times: str = "x") -> str:
    """How many times smaller or larger a file became; SAME_SIZE below a twentieth."""
    ratio = max(before, after) / min(before, after)
    if ratio < 1.05:
        return SAME_SIZE
    return f"{ratio:.1f}{times} {'smaller' if after < before else 'larger'}"


def accuracy(facts: Mapping[str, Any] | None, reference: Mapping[str, Any]) -> str:
    """Top-1 before and after with the drop's interval, or agreement with the float model."""
    if not facts:
        return ""
    agreement = facts.get("fp32_agreement")
    agrees = "" if agreement is None else f"decides as fp32: {percent(agreement)}"
    if "top1" not in facts:
        ratio = worst_sqnr(facts)
        noise = "" if ratio is None else "equal to fp32" if ratio == math.inf else f"against fp32: SQNR {ratio:.1f} dB"
        found = "\n".join(text for text in (agrees, noise) if text)
        return f"{found or 'no decisions to compare'}\nn = {facts['n']}, no labels"
    low, high = facts["drop_interval"]
    return (
        f"top-1 {reference['top1']:.2f} % -> {facts['top1']:.2f} %\n"
        f"drop {facts['drop']:+.2f} points, 95 %: {low:+.2f} .. {high:+.2f}\nn = {facts['n']}, {agrees}"
    )


def parity(facts: Mapping[str, Any] | None) -> str:
    """Steps away from the quantized reference."""
    if not facts:
        return ""
    most, mean, agreement = facts["max_steps"], facts["mean_steps"], facts["agreement"]
    unit = step_unit(facts.get("outputs", {}))
    steps = "no step to count in" if most is None else f"max {most:.3g} {unit}, mean {mean:.2g}"
    equal = "" if agreement is None else f"\nsame decision: {percent(agreement)} of {facts['decisions']:,}"
    return f"{steps}{equal}"


def latency(facts: Mapping[str, Any] | None) -> str:
    """Median before and after, and the speed-up."""
    if not facts:
        return ""
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    noisy = " [yellow]noisy[/]" if facts["noisy"] else ""
    interval, p90 = facts.get("speedup_interval"), facts["p90_ms"]
    within = "" if interval is None else f"95 %: {interval[0]:.2f} .. {interval[1]:.2f}x, "
    tail = "" if p90 is None else f", p90 {milliseconds(p90)}"
    return (
        f"{milliseconds(facts['fp32_median_ms'])} -> {milliseconds(facts['median_ms'])}  "
        f"([bold]{facts['speedup']:.2f}x[/]){noisy}\n"
        f"{within}{threads}, {facts['runs']} runs{tail}"
    )


def share(facts: Mapping[str, Any]) -> str:
    """The share of multiply-accumulates that integer kernels execute."""
    return "" if "int8_share" not in facts else f"{figure(100 * facts['int8_share'], 100)} % of MACs, as executed"


def gates(values: Sequence[Mapping[str, Any]]) -> str:
    """Each gate, met or not."""
    lines = []
    for gate in sorted(values, key=lambda gate: bool(gate["met"])):
        mark = "[green]met[/]" if gate["met"] else "[red]NOT MET[/]"
        nothing = "no difference" if gate["met"] else "not measurable"
        seen = nothing if gate["measured"] is None else figure(gate["measured"], gate["limit"])
        lines.append(f"{mark} {gate['name']}: {seen} (limit {gate['limit']:g})")
    return "\n".join(lines)


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a person should know before shipping."""
    parts = {"model": report["model"], **report.get("quantization", {})}
    lines = [
        f"{note['where']}: {note['rule']}{': ' + note['seen'] if note['seen'] else ''}{_cure(part, note)}"
        for part in ("model", "data", "structure")
        for note in parts.get(part, {}).get("findings", [])
    ]
    for name, facts in report["targets"].items():
        saturation = facts.get("parity", {}).get("saturation") or {}
        layers = saturation.get("layers", [])
        if layers:
            named = ", ".join(f"{layer['layer']} ({layer['channels']} channels)" for layer in layers[:3])
            more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
            lines.append(
                f"{name}: {len(layers)} layers can clip on x86 without VNNI: {named}{more}; "
                f'{saturation["layers_clipping"]} do on the samples; quantize.weights = "auto" prevents it'
            )
        lines += [f"{name}: executed in float: {text}" for text in _floats(facts)]
        times = {each["name"]: each for each in decisions(report).get(name, {}).get("times", [])}
        if any(each["noisy"] for each in times.values()):
            lines.append(
                f"{name}: the form was chosen by times that scatter by more than a tenth; on a quiet machine and into "
                "another run folder it is measured again"
            )
        if report.get("quantization", {}).get("mode") != "none":
            lines += _slower(name, facts.get("latency", {}))
        if facts.get("latency", {}).get("noisy"):
            lines.append(f"{name}: the times scatter by more than a tenth; measure again on a quiet machine")
    return lines


def _slower(target: str, latency: Mapping[str, Any]) -> list[str]:
    """That the artifact takes longer than its float twin, where the whole interval of their ratio says so."""
    low, high = latency.get("speedup_interval") or (0.0, 1.0)
    if high >= 1:
        return []
    return [
        f"{target}: the quantized model is slower than the float one on this machine ({low:.2f} .. {high:.2f}x); "
        "`edgeship bench FILE --profile` names the operators that take the time"
    ]


def _floats(facts: Mapping[str, Any]) -> list[str]:
    """The layers that run in float for one reason each, with the reason."""
    if "float_reasons" not in facts:  # a report of an edgeship that did not ask why
        return [_first_of(facts["float_layers"])] if facts.get("float_layers") else []
    by_reason: dict[str | None, dict[str, None]] = {}
    for each in facts["float_reasons"]:
        by_reason.setdefault(each["reason"], {})[each["node"] or each["layer"]] = None
    return [f"{_first_of(list(names))}{'' if why is None else f': {why}'}" for why, names in by_reason.items()]


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _cure(part: str, note: Mapping[str, Any]) -> str:
    """What a person can do about a finding on the model or its structure."""
    return f"; accepted: {note['accepted']}" if part in ("model", "structure") and note["accepted"] else ""


def size(count: int) -> str:
    """Bytes as a person says them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def percent(share: float) -> str:
    """A share as a percentage that says 100 only where it is all of it."""
    text = f"{100 * share:.2f} %"
    return "> 99.99 %" if share < 1 and text == "100.00 %" else text


def milliseconds(value: float) -> str:
    """Milliseconds with three digits that matter, in microseconds below a tenth."""
    return f"{value * 1000:.1f} us" if value < 0.1 else f"{value:.3g} ms"


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
