"""Prints what learned integers bring to a recipe: the default refinements, reconstruction, and training after either.

    python benchmarks/learned.py RECIPE.toml --out FOLDER [--set KEY=VALUE ...]

Each way is one `edgeship deploy --to accuracy` into a folder of its own under FOLDER: the same command again goes on
where it was killed. SQNR is that of the outputs against the float model's on the calibration samples that training does
not see (of a plan that is not trained, as the training after it found it); top-1 (without labels: the share of
decisions as fp32's) is that of the evaluation samples, as executed. Choose by the former, report the latter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EDGESHIP = Path(sys.executable).parent / "edgeship"
PLANS = {"default": (), "reconstruct": ('quantize.refine=["reconstruct"]',)}
TRAINED = 'quantize.qat={objective="distill"}'


def deploy(recipe: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The report of the run; a gate that is not met is a result, not a failure."""
    wanted = [part for override in overrides for part in ("--set", override)]
    command = [str(EDGESHIP), "deploy", str(recipe), "--out", str(folder), "--to", "accuracy", "--json", *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{recipe}: edgeship deploy ended with {done.returncode}")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def held_out(trained: dict[str, Any], when: str) -> str:
    """The SQNR by weight scheme before or after training, and what was kept."""
    parts = []
    for scheme, facts in trained["quantization"]["qat"].items():
        value = facts["held_out"][when]["sqnr_db"]
        rejected = " (not kept)" if when == "after" and facts["kept"] == "start" else ""
        parts.append(f"{scheme} {'not finite' if value is None else f'{value:.2f} dB'}{rejected}")
    return "\n".join(parts)


def evaluation(facts: dict[str, Any]) -> str:
    """Top-1 in percent, and the share of decisions that are the float model's."""
    accuracy = facts["accuracy"]
    agreement = accuracy.get("fp32_agreement")
    same = "" if agreement is None else f"as fp32 {100 * agreement:.2f} %"
    return ", ".join(part for part in (f"{accuracy['top1']:.2f} %" if "top1" in accuracy else "", same) if part)


def main() -> None:
    """Deploys four times and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where the run folders are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all four runs")
    arguments = parser.parse_args()
    table: Table | None = None
    for name, plan in PLANS.items():
        start = deploy(arguments.recipe, arguments.out / name, [*arguments.set, *plan])
        trained = deploy(arguments.recipe, arguments.out / f"{name}-qat", [*arguments.set, *plan, TRAINED])
        targets = list(start["targets"])
        if table is None:
            top1 = start["reference"]["accuracy"].get("top1")
            title = None if top1 is None else f"fp32: top-1 {top1:.2f} %"
            table = Table("plan", "SQNR, held out", *targets, title=title)
        for label, report, when in ((name, start, "before"), (f"{name}, qat", trained, "after")):
            table.add_row(label, held_out(trained, when), *(evaluation(report["targets"][key]) for key in targets))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
