"""Deploys every recipe under examples/ from nothing, then again, and prints what it costs and what comes out.

    python benchmarks/bench_recipes.py [RECIPE.toml ...]

Recipes on real models need EDGESHIP_DATA. Each deploys into a folder of its own that is removed afterwards. "cold" is
the whole command with an empty run folder, "warm" the same command once more, both with the start of Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EDGESHIP = Path(sys.executable).parent / "edgeship"
MODEL = ("recipe", "target", "top-1 fp32", "int8", "max steps", "same", "int8 share")
LATENCY = ("fp32 ms", "int8 ms", "speed-up")


def deploy(recipe: Path, folder: Path) -> tuple[float, dict[str, Any]]:
    """The seconds of one `edgeship deploy`, and its report; a gate that is not met is a result, not a failure."""
    command = [str(EDGESHIP), "deploy", str(recipe), "--out", str(folder), "--json"]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode not in (0, 3):
        raise SystemExit(f"{recipe}: edgeship deploy ended with {done.returncode}")
    return seconds, json.loads((folder / "report.json").read_text())


def row(name: str, target: str, report: dict[str, Any]) -> list[str]:
    """One line of the table."""
    facts = report["targets"][target]
    parity, latency, accuracy = facts["parity"], facts["latency"], facts["accuracy"]
    top1 = [report["reference"]["accuracy"].get("top1"), accuracy.get("top1")]
    return [
        name,
        target,
        *("-" if value is None else f"{value:.2f} %" for value in top1),
        f"{parity['max_steps']:.3g}",
        f"{100 * parity['agreement']:.2f} %",
        f"{100 * facts['int8_share']:.1f} %",
        f"{latency['fp32_median_ms']:.3f}",
        f"{latency['median_ms']:.3f}",
        f"{latency['speedup']:.2f}x" + (" noisy" if latency["noisy"] else ""),
    ]


def main(arguments: list[str]) -> None:
    """Deploys, prints the table and the times."""
    recipes = [Path(argument) for argument in arguments] or sorted(ROOT.glob("examples/*/*.toml"))
    table = Table(*MODEL, *LATENCY)
    times = []
    for recipe in recipes:
        if "EDGESHIP_DATA" in recipe.read_text() and not os.environ.get("EDGESHIP_DATA"):
            print(f"{recipe}: left out, it needs EDGESHIP_DATA", flush=True)
            continue
        if not arguments and "compress" in tomllib.loads(recipe.read_text()):
            print(f"{recipe}: left out, it trains first; name it to run it, or see compression.py", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            cold, report = deploy(recipe, Path(folder) / "run")
            warm, _ = deploy(recipe, Path(folder) / "run")
        times.append(f"{report['recipe']}: cold {cold:.1f} s, warm {warm:.1f} s")
        for target in report["targets"]:
            table.add_row(*row(report["recipe"], target, report))
    Console(width=150).print(table)
    print("\n".join(times))


if __name__ == "__main__":
    main(sys.argv[1:])
