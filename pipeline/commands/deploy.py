"""Returns the command that runs a recipe's flow: deploy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeship.calibration.errors import EdgeshipError, GateError, InputError
from edgeship.pipeline.commands.files import FILE

if TYPE_CHECKING:
    from edgeship.pipeline.flow import Flow, Span
    from edgeship.pipeline.recipe import Recipe
    from edgeship.pipeline.workspace import Workspace


@click.command(short_help="Run a recipe: from the model to checked artifacts.")
@click.argument("recipe", type=FILE)
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Only this target of the recipe; repeatable.")
@click.option("--out", type=FILE, help="The run folder.  [default: build/<recipe name>]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
@click.option(
    "--device", metavar="WHERE", help="Measure parity and latency there: ssh://..., adb:SERIAL, or a [devices.NAME]."
)
@click.option(
    "--compressed", type=FILE, help="A folder that `compress` wrote: its network is taken, not trained again."
)
@click.option("--from", "start", metavar="STAGE", help="Run this stage and all after it again.")
@click.option("--to", "stop", metavar="STAGE", help="Stop after this stage.")
@click.option("--force", is_flag=True, help="Run every stage again.")
@click.option("--sign", "key", type=FILE, help="Sign the release with this private key (PEM); see docs/releases.md.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
def deploy(
    recipe: Path,
    targets: tuple[str, ...],
    out: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    compressed: Path | None,
    start: str | None,
    stop: str | None,
    force: bool,
    key: Path | None,
    as_json: bool,
) -> None:
    """Export, simplify, quantize, convert, judge and pack the model of RECIPE for its targets."""
    from edgeship.pipeline.devices.base import open_device
    from edgeship.pipeline.flow import Span, default_folder
    from edgeship.pipeline.recipe import load_recipe

    span = Span(start, stop, force)
    overrides = (*overrides, f"device={device}") if device else overrides
    loaded = load_recipe(
        recipe, [*overrides, *([] if key is None else [f"release.key={json.dumps(str(key.absolute()))}"])]
    )
    if loaded.device != "host":
        with open_device(loaded.device, loaded.devices):  # what cannot be reached is told before hours of work
            pass
    if compressed is not None and loaded.compress is None:
        raise InputError(
            f"--compressed {compressed}: {recipe.name} has no [compress] table; accepted: a recipe with one"
        )
    if compressed is not None and span.repeats("compress"):
        raise InputError(
            f"--compressed {compressed}: its network is taken as it is, --force and --from compress train it again; "
            "accepted: one of them"
        )
    folder = out or default_folder(loaded)
    deployment = Deployment(loaded, choose_targets(loaded, targets), folder, span, overrides, compressed)
    deployment.run(as_json=as_json)


@dataclass(frozen=True)
class Deployment:
    """One run of a recipe in a folder."""

    recipe: Recipe
    targets: tuple[str, ...]
    folder: Path
    span: Span
    overrides: tuple[str, ...] = ()
    compressed: Path | None = None

    def run(self, *, as_json: bool) -> None:
        """Runs the flow, writes report.json and prints it. Raises GateError after that when a gate is not met."""
        from edgeship.pipeline.compression.made import adopt
        from edgeship.pipeline.console import watch
        from edgeship.pipeline.flow import Flow
        from edgeship.pipeline.report import gates_of, remove_report, write_report
        from edgeship.pipeline.reporting.run_folder import open_run
        from edgeship.pipeline.reporting.write import write_all
        from edgeship.pipeline.summary import print_summary
        from edgeship.pipeline.workspace import Workspace

        refused: GateError | None = None
        place = Workspace(self.folder)
        Flow(self.recipe, place, self.targets, self.span).check()
        with place.held() as workspace:
            if self.compressed is not None:
                adopt(self.recipe, self.targets, self.compressed, workspace)
            remove_report(workspace)
            with watch() as events:
                flow = Flow(self.recipe, workspace, self.targets, self.span, events)
                try:
                    flow.run()
                except GateError as error:
                    refused = error
                except EdgeshipError as error:
                    self._report_failure(workspace, flow, error)
                    raise
            report = self._report(workspace, flow)
            write_report(workspace, report)
            write_all(open_run(workspace.folder), workspace.folder)
            gates = gates_of(self.recipe, workspace, self.targets, flow.results)
        if as_json:
            click.echo(json.dumps(report, indent=2, sort_keys=True))
        else:
            print_summary(report, self.folder)
        if refused:
            raise refused
        failing = [str(gate) for gate in gates if not gate.met]
        if failing:
            raise GateError("\n".join([f"a gate was not met: {failing[0]}", *(f"  - {gate}" for gate in failing[1:])]))

    def _report(self, workspace: Workspace, flow: Flow) -> dict[str, Any]:
        from edgeship.pipeline.report import make_report, run_facts

        asked = run_facts(self.recipe, self.targets, self.overrides)
        return {**make_report(self.recipe, workspace, self.targets, flow.results), **asked}

    def _report_failure(self, workspace: Workspace, flow: Flow, error: EdgeshipError) -> None:
        """Writes the page of a run that stopped, so that who was not watching can read how far it came."""
        from edgeship.pipeline.report import write_failure
        from edgeship.pipeline.reporting.run_folder import open_run
        from edgeship.pipeline.reporting.write import write_all

        try:
            write_failure(workspace, self._report(workspace, flow), flow.running, str(error))
            write_all(open_run(workspace.folder), workspace.folder)
        except EdgeshipError as second:  # a full disk, for one: what stopped the run is what must be told
            click.echo(f"edgeship: the page of the run that stopped was not written: {second}", err=True)


def choose_targets(recipe: Recipe, wanted: Sequence[str]) -> tuple[str, ...]:
    """The targets to build, in the recipe's order.

    Raises InputError for one the recipe does not have, or whose runtime is not installed.
    """
    from edgeship.pipeline.recipe_reader import did_you_mean
    from edgeship.targets.base import load

    for name in wanted:
        if name not in recipe.targets:
            raise InputError(f"--target {name}: not a target of {recipe.path.name}{did_you_mean(name, recipe.targets)}")
    chosen = tuple(name for name in recipe.targets if not wanted or name in wanted)
    for name in chosen:
        available = load(name).availability()
        if not available.installed:
            raise InputError(f"the runtime of target {name} is not installed; install it with: {available.install}")
    return chosen


COMMANDS = (deploy,)
