"""Prints what quantization-aware training brings: int8 as executed against fp32, before and after training.

    EDGESHIP_DATA=... python benchmarks/qat.py --out build/qat [--only resnet20] [--table]

ResNet-20 learns from labels: one epoch of a quarter of CIFAR-10's training images; 10,000 test images judge.
MobileNetV1 0.75 with one weight scale per tensor learns without labels, from its float outputs for the 100 calibration
images, mirrored and moved; 400 others judge. Both begin with the plan that the refinements made: without them a
deployment of such a MobileNetV1 ends in the quantize stage, whose outputs have nothing to do with the float model's.
All targets get the same integers, so each run trains once.

Every seed is one `edgeship deploy` into a folder of its own under --out: what has finished is not done again, what was
killed goes on. `kept` counts the seeds whose trained plan was better on the samples held out (the others keep the plan
before it); `steps` is how far at most the trained graph was from the QDQ model that ships, on 20 samples: any value by
itself, and the outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EDGESHIP = Path(sys.executable).parent / "edgeship"
REFINED = 'quantize.refine=["equalize","gptq","bias_correction"]'


@dataclass(frozen=True)
class Case:
    """A plan of a network, trained once per seed under `qat`, or not at all."""

    recipe: str
    sets: tuple[str, ...]
    qat: str | None = None
    seeds: int = 1


RESNET = ("data.evaluation_samples=10000", "quantize.weights=shared")
MOBILENET = ("quantize.per_tensor=true", "quantize.weights=shared", "parity.samples=100")
LABELS = 'objective="labels", data="training", epochs=1, batch_size=128, flip=true, shift=4'
QUARTER = ("data.training=cifar10.zip/cifar10/train", "data.training_samples=12500")
CASES = {
    "resnet20": Case("cifar_resnet/resnet20.toml", RESNET),
    "resnet20-qat": Case("cifar_resnet/resnet20.toml", (*RESNET, *QUARTER), LABELS, 3),
    "mobilenet": Case("mobilenet_v1/recipe.toml", (*MOBILENET, REFINED)),
    "mobilenet-qat": Case("mobilenet_v1/recipe.toml", (*MOBILENET, REFINED), "flip=true, shift=8", 3),
}


def command(case: Case, seed: int, folder: Path) -> list[str]:
    """One deployment."""
    trained = () if case.qat is None else (f"quantize.qat={{{case.qat}, seed={seed}}}",)
    options = [part for each in (*case.sets, *trained) for part in ("--set", each)]
    recipe = ROOT / "examples" / case.recipe
    return [str(EDGESHIP), "deploy", str(recipe), "--out", str(folder), "--to", "accuracy", "--json", *options]


def execute(cases: dict[str, Case], out: Path) -> None:
    """Runs what has not finished, seed by seed; a gate that is not met (exit code 3) is a result like any other."""
    most = max(case.seeds for case in cases.values())
    runs = [(name, case, seed) for seed in range(most) for name, case in cases.items() if seed < case.seeds]
    for name, case, seed in runs:
        folder = out / f"{name}-{seed}"
        if (folder / "done.json").exists():
            continue
        print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
        done = subprocess.run(command(case, seed, folder), stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 3):
            sys.exit(f"{name}: edgeship deploy ended with {done.returncode}; the same command goes on from there")
        (folder / "done.json").write_text(json.dumps({"exit": done.returncode}))


def reports(name: str, case: Case, out: Path) -> list[dict[str, Any]]:
    """The reports of the seeds that have finished."""
    folders = [out / f"{name}-{seed}" for seed in range(case.seeds)]
    return [json.loads((each / "report.json").read_text()) for each in folders if (each / "done.json").exists()]


def row(name: str, found: list[dict[str, Any]]) -> list[str]:
    """Mean (smallest .. largest) over the seeds."""
    float_top1 = found[0]["reference"]["accuracy"]["top1"]
    cells = [name, str(len(found)), f"{float_top1:.2f} %"]
    for target in ("onnxruntime", "tflite"):
        top1 = [report["targets"][target]["accuracy"]["top1"] for report in found]
        cells.append(f"{_spread(top1, '.2f')} %\n{_spread([each - float_top1 for each in top1], '+.2f')}")
    trained = [facts for report in found for facts in report["quantization"].get("qat", {}).values()]
    if not trained:
        return [*cells, "", "", "", ""]
    for measure, form in (("sqnr_db", ".2f"), ("loss", ".4f")):
        pairs = [[facts["held_out"][when].get(measure) for when in ("before", "after")] for facts in trained]
        known = all(value is not None for pair in pairs for value in pair)
        sides = [_spread([pair[side] for pair in pairs], form) for side in (0, 1)] if known else []
        cells.append("\n-> ".join(sides))
    kept = sum(facts["kept"] == "trained" for facts in trained)
    found_apart = [facts["agreement"] for facts in trained if facts["agreement"]]
    apart = [max(each[key] for each in found_apart) for key in ("layer_max_steps", "max_steps") if found_apart]
    return [*cells, f"{kept} of {len(trained)}", ", ".join(f"{each:.0f}" for each in apart)]


def _spread(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    same = len(values) == 1 or max(values) == min(values)
    return mean if same else f"{mean} ({min(values):{form}} .. {max(values):{form}})"


def main() -> None:
    """Deploys what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/qat"), help="where the run folders are kept")
    parser.add_argument("--only", nargs="+", default=[], help="cases, or the beginnings of their names")
    parser.add_argument("--table", action="store_true", help="print what there is; run nothing")
    arguments = parser.parse_args()
    if "EDGESHIP_DATA" not in os.environ:
        sys.exit("set EDGESHIP_DATA to the folder with cifar10.zip, imagenet_dev/ and models/")
    wanted = {n: case for n, case in CASES.items() if not arguments.only or n.startswith(tuple(arguments.only))}
    table = Table(
        "plan", "seeds", "fp32", "onnxruntime", "tflite", "SQNR held out, dB", "loss held out", "kept", "steps"
    )
    if wanted and not arguments.table:
        execute(wanted, arguments.out)
    for name, case in wanted.items():
        found = reports(name, case, arguments.out)
        if found:
            table.add_row(*row(name, found))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
