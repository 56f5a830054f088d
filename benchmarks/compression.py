"""Prints what pruning and distillation cost in accuracy and gain in speed, against dense networks of the same budget.

    EDGESHIP_DATA=... python benchmarks/compression.py --out build/compression --budget reduced
    EDGESHIP_DATA=... python benchmarks/compression.py --out build/compression --budget cpu      # hours; resumes
    EDGESHIP_DATA=... python benchmarks/compression.py --out build/compression --budget gpu
    ... --only resnet20-structured resnet20-dense          # some runs; the table shows what there is
    ... --budget gpu --compress-only                       # where no runtime is installed: no artifacts, no latency

CIFAR-10 as JPEGs, networks fine-tuned from the weights of the data folder. Each run is a deployment with a run folder
of its own under --out: what has finished is not done again, what was killed goes on. Top-1 is that of the artifacts'
float twin on the evaluation images, differences are against the dense run of the same network and seed, which learns
from the labels alone. The others learn from a ResNet-56 as well: the smaller ones of ResNet-56 from that dense run,
ResNet-20 from the network of the data folder. Channels go in three steps, a third of the way each, with trainings that
together make up the budget: two of one epoch, and the rest; blocks and channels together (`mixed`) at once, single
weights little by little over two epochs. The latter two of ResNet-56 are taught what each block gives out as well, on
images of which half are mixed with others (the unstructured one by a teacher that sees mirror images too);
`mixed-muon` (with its optimizer), `mixed-sgd` and `unstructured-unmixed` are the same on images as they are, with
labels too. All train with SGD but `mixed` and those named after Muon. `scratch` begins with random weights (`gpu`
alone).

Budgets: `reduced` (6,400 images, 2 epochs, 2,000 test images, 1 seed) shows that everything works, not what the methods
are worth; `epoch` is one epoch of all images, without what takes several; `cpu` is 5 epochs of all images, 3 seeds (1
for ResNet-56); `gpu` is 100 epochs, 3 seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH = 128
SECONDS = {"resnet20": 0.10, "resnet56": 0.25}
"""Measured for one step of training on 2 idle cores with AVX512-BF16; five times that in float32 on AVX2."""


@dataclass(frozen=True)
class Budget:
    images: int
    epochs: int
    test_images: int
    seeds: dict[str, int]


BUDGETS = {
    "reduced": Budget(6_400, 2, 2_000, {"resnet20": 1, "resnet56": 1}),
    "epoch": Budget(50_000, 1, 10_000, {"resnet20": 1, "resnet56": 1}),
    "cpu": Budget(50_000, 5, 10_000, {"resnet20": 3, "resnet56": 1}),
    "gpu": Budget(50_000, 100, 10_000, {"resnet20": 3, "resnet56": 3}),
}
TEACHER = [
    "compress.distill.teacher.source=${EDGESHIP_DATA}/models/cifar_resnet.py:resnet56",
    "compress.distill.teacher.weights=${EDGESHIP_DATA}/models/resnet56_cifar10.pt",
]
HINTS = ["compress.distill.features=hint", "compress.distill.feature_weight=5"]
HALF = ["compress.prune.macs=0.476", *TEACHER]  # 2.1x fewer
MIXED = ["compress.prune.kind=mixed", "compress.prune.round_to=16", "compress.prune.batches=4", *HALF]
FASTER = ["compress.training.lr=0.05"]
"""Where whole blocks are gone, the layers around them have farther to go."""
MUON = ["compress.training.optimizer=muon", "compress.training.lr=0.002"]
TAUGHT = [*HINTS, "compress.distill.weight=0.5"]
MIXTURES = [
    "compress.training.mixup=1.0",
    "compress.training.cutmix=1.0",
    "compress.training.mix_share=0.5",
    "compress.distill.weight=1.0",
]
"""Half the images are mixed, and all are answered by the teacher alone, which sees the mixtures."""
SOFT = [
    "compress.prune.kind=soft",
    "compress.prune.ratio=0.3",
    "compress.prune.scope=layer",
    "compress.prune.round_to=4",
    *TEACHER,
]
SPARSE = ["compress.prune.kind=unstructured", "compress.prune.ratio=0.8", "compress.prune.fade_epochs=2", *TEACHER]
SHALLOW = ["compress.prune.kind=blocks", "compress.prune.max_bytes=2100000", "compress.prune.batches=4", *TEACHER]
SCRATCH = ["compress.training.lr=0.1", "compress.training.weight_decay=5e-4"]
METHODS: dict[str, dict[str, list[str]]] = {
    "resnet56": {
        "dense": [],
        "dense-muon": MUON,
        "structured": HALF,
        "mixed": [*MIXED, *MUON, *HINTS, *MIXTURES],
        "mixed-muon": [*MIXED, *MUON, *TAUGHT],
        "mixed-sgd": [*MIXED, *FASTER, *TAUGHT],
        "soft": SOFT,
        "unstructured": [*SPARSE, *FASTER, *HINTS, *MIXTURES, "compress.distill.mirror=true"],
        "unstructured-unmixed": [*SPARSE, *FASTER, *HINTS],
        "chain": SHALLOW,
    },
    "resnet20": {
        "dense": [],
        "distilled": TEACHER,
        "structured": HALF,
        "soft": SOFT,
        "unstructured": SPARSE,
        "scratch": SCRATCH,
        "scratch-distilled": [*SCRATCH, *TEACHER],
    },
}
"""The chain takes out residual blocks, until 2.1 MB of float weights are left, and is judged by its int8 artifacts."""

GRADUAL, STEPS = ("structured",), 3
LEAST_EPOCHS = {"structured": 2, "unstructured": 2, "unstructured-unmixed": 2}
SHRUNK = ("structured", "mixed", "mixed-muon", "mixed-sgd", "soft", "chain")
"""The methods whose networks are faster."""


@dataclass(frozen=True)
class One:
    """One run: a network, a method and a seed."""

    network: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.network}-{self.method}-{self.seed}"

    def folder(self, out: Path, budget: str) -> Path:
        return out / budget / self.name

    @property
    def dense(self) -> One:
        """The run that this one is judged against."""
        return One(self.network, "scratch" if "scratch" in self.method else "dense", self.seed)

    def command(self, out: Path, budget: str, *, whole: bool = True) -> list[str]:
        """A deployment, or its first stage alone."""
        size = BUDGETS[budget]
        sets = [
            "data.training=cifar10.zip/cifar10/train",
            f"data.training_samples={size.images}",
            f"data.evaluation_samples={size.test_images}",
            f"compress.training.epochs={size.epochs}",
            f"compress.training.batch_size={BATCH}",
            f"compress.training.lr={0.05 if budget == 'gpu' else 0.02}",
            "compress.training.flip=true",
            "compress.training.shift=4",
            f"compress.training.seed={self.seed}",
            "compress.training.cuda_graphs=true",
            *METHODS[self.network][self.method],
        ]
        if self.method in GRADUAL:
            sets += [f"compress.prune.steps={STEPS}", f"compress.training.epochs={max(1, size.epochs - STEPS + 1)}"]
        if self.network == "resnet56" and TEACHER[0] in sets:
            dense = One(self.network, "dense", self.seed).folder(out, budget).resolve()
            sets.append(f"compress.distill.teacher.weights={dense / '1-compress' / 'weights.safetensors'}")
        folder = self.folder(out, budget)
        options = [part for each in sets for part in ("--set", each)]
        what = ["deploy", "--out", str(folder)] if whole else ["compress", "--out", str(folder / "1-compress")]
        return [sys.executable, "-m", "edgeship.pipeline.cli", *what, str(self._recipe(folder)), *options]

    def _recipe(self, folder: Path) -> Path:
        """The example's; from scratch, a copy of it without weights."""
        example = ROOT / "examples" / "cifar_resnet" / f"{self.network}.toml"
        if self.dense.method == "dense":
            return example
        lines = [line for line in example.read_text().splitlines() if not line.startswith("weights =")]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scratch.toml").write_text("\n".join(lines) + "\n")
        return folder / "scratch.toml"

    def steps(self, budget: str) -> int:
        return BUDGETS[budget].images // BATCH * BUDGETS[budget].epochs

    def seconds(self, budget: str) -> float:
        step = SECONDS[self.network] + (
            SECONDS["resnet56"] / 3 if "teacher" in str(self.command(Path(), budget)) else 0
        )
        return self.steps(budget) * step


def runs_of(budget: str, only: list[str]) -> list[One]:
    every = [
        One(network, method, seed)
        for network, methods in METHODS.items()
        for seed in range(BUDGETS[budget].seeds[network])
        for method in methods
        if (budget == "gpu" or "scratch" not in method) and BUDGETS[budget].epochs >= LEAST_EPOCHS.get(method, 1)
    ]
    return [run for run in every if not only or any(run.name.startswith(each) for each in only)]


def execute(runs: list[One], out: Path, budget: str, *, whole: bool) -> None:
    """Runs what has not finished; a gate that is not met (exit code 3) is a result like any other."""
    left = [run for run in runs if not (run.folder(out, budget) / "done.json").exists()]
    if budget != "gpu":
        hours = sum(run.seconds(budget) for run in left) / 3600
        print(f"{len(left)} of {len(runs)} runs to do, about {hours:.1f} hours on two idle cores", flush=True)
    for place, run in enumerate(left):
        begun = time.perf_counter()
        print(f"[{place + 1}/{len(left)}] {run.name}", flush=True)
        done = subprocess.run(run.command(out, budget, whole=whole), check=False, stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 3):
            sys.exit(f"{run.name} ended with exit code {done.returncode}; the same command goes on from there")
        seconds = time.perf_counter() - begun
        folder = run.folder(out, budget)
        (folder / "done.json").write_text(json.dumps({"seconds": round(seconds)}))
        print(f"    {seconds / 60:.1f} min", flush=True)


def read(run: One, out: Path, budget: str) -> dict[str, Any] | None:
    folder = run.folder(out, budget)
    if not (folder / "done.json").exists():
        return None
    facts = json.loads((folder / "1-compress" / "compress.json").read_text())
    report = json.loads(path.read_text()) if (path := folder / "report.json").exists() else None
    return {
        "top1": report["reference"]["accuracy"]["top1"] if report else facts["after"]["top1"],
        "targets": report["targets"] if report else None,
        "after": facts["after"],
        "before": facts["before"],
    }


def table(runs: list[One], out: Path, budget: str) -> None:
    size = BUDGETS[budget]
    print(
        f"\nbudget {budget}: {size.images:,} images x {size.epochs} epochs, batch {BATCH}, "
        f"{size.test_images:,} test images; top-1 in percent, differences in points against the dense run of the "
        "same seed: mean (smallest .. largest)\n"
    )
    print(f"{'run':<24}{'seeds':>6}{'top-1':>8}  {'fp32 - dense':<24}{'MACs':>8}{'parameters':>12}{'zlib bytes':>12}")
    for network, methods in METHODS.items():
        for method in methods:
            _row(network, method, [run for run in runs if (run.network, run.method) == (network, method)], out, budget)
    for target in ("onnxruntime", "tflite"):
        for network in METHODS:
            _int8_rows(network, target, runs, out, budget)


def _row(network: str, method: str, runs: list[One], out: Path, budget: str) -> None:
    found = [(run, facts) for run in runs if (facts := read(run, out, budget)) is not None]
    if not found:
        return
    differences = []
    for run, facts in found:
        dense = read(run.dense, out, budget)
        if dense is not None and run != run.dense:
            differences.append(facts["top1"] - dense["top1"])
    top1 = statistics.mean(facts["top1"] for _, facts in found)
    after = found[0][1]["after"]
    print(
        f"{network + ' ' + method:<24}{len(found):>6}{top1:>8.2f}  {_spread(differences):<24}"
        f"{after['macs'] / 1e6:>7.1f}M{after['parameters']:>12,}{after['compressed_bytes']:>12,}"
    )


def _int8_rows(network: str, target: str, runs: list[One], out: Path, budget: str) -> None:
    """int8 against fp32, and the artifacts of each method against the dense ones, timed in turns now."""
    base = One(network, "dense", 0)
    dense = read(base, out, budget)
    pruned = [
        run for run in runs
        if run.network == network and run.seed == 0 and run.method in SHRUNK
    ]  # fmt: skip
    pruned = [run for run in pruned if (facts := read(run, out, budget)) is not None and facts["targets"]]
    if dense is None or not dense["targets"] or not pruned:
        return
    from edgeship.pipeline.benchmark.measure import Schedule, measure
    from edgeship.pipeline.devices.worker import Subject
    from edgeship.targets.base import load

    suffix = load(target).suffix

    def artifact(run: One, kind: str) -> Path:
        return run.folder(out, budget) / "5-convert" / target / f"{kind}{suffix}"

    everything = [base, *pruned]
    subjects = [Subject(target, artifact(run, kind)) for run in everything for kind in ("fp32", "model")]
    medians = [each.median_ms for each in measure(subjects, None, Schedule(200, 20, 5))]
    print(f"\n{network}, {target}, one thread, in turns: times faster than the dense network")
    columns = (("MACs", 8), ("fp32", 8), ("int8", 8), ("fp32 -> int8", 14), ("size", 8), ("int8 top-1", 12))
    print(f"{'run':<24}{''.join(f'{name:>{width}}' for name, width in columns)}{'- dense fp32':>14}")
    whole = artifact(base, "fp32").stat().st_size
    for place, run in enumerate(everything):
        facts = read(run, out, budget)
        assert facts is not None
        fp32, int8 = medians[2 * place], medians[2 * place + 1]
        top1 = facts["targets"][target]["accuracy"]["top1"]
        print(
            f"{run.method:<24}{dense['after']['macs'] / facts['after']['macs']:>7.2f}x{medians[0] / fp32:>7.2f}x"
            f"{medians[1] / int8:>7.2f}x{medians[0] / int8:>13.2f}x"
            f"{whole / artifact(run, 'model').stat().st_size:>7.1f}x{top1:>12.2f}{top1 - dense['top1']:>+14.2f}"
        )


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):+.2f} ({min(values):+.2f} .. {max(values):+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/compression"))
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="reduced")
    parser.add_argument("--only", nargs="+", default=[], help="names, or the beginnings of names, of runs")
    parser.add_argument("--compress-only", action="store_true", help="train, and make no artifacts")
    parser.add_argument("--table", action="store_true", help="print what there is; run nothing")
    arguments = parser.parse_args()
    if "EDGESHIP_DATA" not in os.environ:
        sys.exit("set EDGESHIP_DATA to the folder with cifar10.zip and models/")
    runs = runs_of(arguments.budget, arguments.only)
    if not arguments.table:
        execute(runs, arguments.out, arguments.budget, whole=not arguments.compress_only)
    table(runs, arguments.out, arguments.budget)


if __name__ == "__main__":
    main()
