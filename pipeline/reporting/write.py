"""Returns where a run's report was written: the page, the Markdown and the JUnit file, or one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgeship.calibration.errors import InputError
from edgeship.pipeline.report import RENDERED
from edgeship.pipeline.reporting.junit import render_junit
from edgeship.pipeline.reporting.markdown import render_markdown
from edgeship.pipeline.reporting.page import render_page
from edgeship.pipeline.reporting.run_folder import Run
from edgeship.pipeline.workspace import write_atomically

FORMS: Mapping[str, Callable[[Run], str]] = {".html": render_page, ".md": render_markdown, ".xml": render_junit}


def write_all(run: Run, folder: Path) -> list[Path]:
    """The report in every form, in the run folder."""
    return [write_one(run, folder / name) for name in RENDERED]


def write_one(run: Run, path: Path) -> Path:
    """The report in the form that the file's name asks for. Raises InputError for a name that asks for none."""
    render = FORMS.get(path.suffix.lower())
    if render is None:
        raise InputError(f"{path}: a report is written as {', '.join(FORMS)}; seen: {path.suffix or 'no suffix'}")
    write_atomically(path, render(run))
    return path
