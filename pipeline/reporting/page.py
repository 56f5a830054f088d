"""Returns the report as one HTML page that loads nothing: no script, no font, no picture from anywhere else."""

from __future__ import annotations

from importlib import resources

from edgeship.pipeline.reporting import pictures, sections
from edgeship.pipeline.reporting import wording as say
from edgeship.pipeline.reporting.run_folder import Run

TITLES = {
    "cards": ("summary", "Artifacts"),
    "gates": ("gates", "Gates"),
    "tradeoffs": ("tradeoff", "Trade-off"),
    "latencies": ("latency", "Latency"),
    "layers": ("layers", "Layers"),
    "histograms": ("calibration", "Calibration"),
    "remarks": ("findings", "Findings"),
    "stages": ("stages", "Stages"),
    "commands": ("reproduce", "Reproduce"),
}
"""What the navigation leads to, where there is something to show."""


def render_page(run: Run) -> str:
    """The page's HTML; every name and text of the run is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    files = resources.files("edgeship.pipeline.reporting")
    environment = Environment(
        loader=FunctionLoader(lambda name: files.joinpath(name).read_text()),
        autoescape=True,
        undefined=StrictUndefined,
    )
    parts = {
        "cards": sections.cards(run),
        "gates": sections.gates(run),
        "tradeoffs": pictures.tradeoffs(run),
        "latencies": pictures.latencies(run),
        "layers": pictures.layer_tables(run),
        "histograms": pictures.histograms(run),
        "remarks": sections.remarks(run),
        "stages": sections.stages(run),
        "commands": sections.commands(run),
    }
    return environment.get_template("page.html.j2").render(
        parts,
        name=run.report.text("recipe") or say.UNKNOWN,
        edgeship=run.report.text("edgeship") or "",
        finished=run.report.text("finished"),
        verdict=sections.verdict(run),
        lead=sections.lead(run),
        sections=[TITLES[part] for part, content in parts.items() if content],
        quality=pictures.HEADINGS[pictures.judged_by(run)],
        variants=pictures.variants(run),
        profiles=pictures.profiles(run),
        inputs=sections.inputs(run),
        versions=sections.versions(run),
        style=Markup(files.joinpath("style.css").read_text()),  # noqa: S704 - our own file
    )
