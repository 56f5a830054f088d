"""Returns the commands for what a run leaves behind: report, verify."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeship.calibration.errors import EdgeshipError
from edgeship.pipeline.commands.files import FILE

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.command(short_help="Write the report of a run: HTML, Markdown or JUnit XML.")
@click.argument("run", type=FILE)
@click.option("-o", "--out", type=FILE, help="FILE.html, .md or .xml.  [default: all three in the run folder]")
@JSON
def report(run: Path, out: Path | None, as_json: bool) -> None:
    """Write the report of a RUN folder, finished or not: one HTML page, Markdown, or the gates as JUnit XML."""
    from edgeship.pipeline.reporting.run_folder import open_run
    from edgeship.pipeline.reporting.sections import verdict
    from edgeship.pipeline.reporting.write import write_all, write_one

    found = open_run(run)
    folder = run if run.is_dir() else run.parent
    written = write_all(found, folder) if out is None else [write_one(found, out)]
    judged = verdict(found)
    if as_json:
        files = [path.as_posix() for path in written]
        click.echo(json.dumps({"run": str(run), "verdict": judged.short, "says": judged.sentence, "files": files}))
        return
    click.echo("\n".join(f"wrote {path}" for path in written))


@click.command(short_help="Check a release against its manifest, checksums and signature.")
@click.argument("release", type=FILE)
@click.option("--key", type=FILE, help="The public key (PEM) that must have signed it.")
@JSON
def verify(release: Path, key: Path | None, as_json: bool) -> None:
    """Check a RELEASE folder against its manifest and checksums, and with --key its signature."""
    from edgeship.pipeline.releasing.verify import is_signed, verify_release

    findings = verify_release(release, key)
    if as_json:
        facts = {"release": str(release), "whole": not findings, "signature": "checked" if key else "not checked"}
        click.echo(json.dumps({**facts, "findings": [str(finding) for finding in findings]}))
    if findings:
        count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
        raise EdgeshipError("\n".join([f"{release} is not as released: {count}", *(f"  - {f}" for f in findings)]))
    if as_json:
        return
    unproven = "; its signature was not checked: --key says by whose key it must be" if is_signed(release) else ""
    signer = unproven if key is None else f", and signed by the key of {key.name}"
    click.echo(f"{release} is as it was released{signer}")


COMMANDS = (report, verify)
