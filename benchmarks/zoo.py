"""Takes one model per family of torchvision or timm through simplify, quantize and convert, and judges every artifact.

    python benchmarks/zoo.py --work FOLDER                        all of torchvision's, 50 images each
    python benchmarks/zoo.py --work FOLDER --models timm-        all of timm's
    python benchmarks/zoo.py --work FOLDER --models resnet vit --images 8 --skip-int8
    python benchmarks/zoo.py --work FOLDER --export-only
    python benchmarks/zoo.py --work FOLDER --times               conversion alone, of what is there, on a quiet machine

Needs EDGESHIP_DATA (or --data) with a folder of images, and torchvision 0.28.0; the published wheel does not fit a
CPU-only torch, so it may live apart: pip install --no-deps --target SITE torchvision==0.28.0, then --torchvision SITE
(or the environment variable TORCHVISION_SITE); timm with huggingface_hub and pyyaml likewise. Every step is a process
of its own; a model that fails does not stop the others. What is in FOLDER already and newer than its source is used
again (--refresh STEP starts over from there).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _zoo_models as models
import _zoo_steps as steps

from edgeship.calibration.errors import EdgeshipError
from edgeship.pipeline.isolation import GIB, Limits, run_isolated
from edgeship.targets.base import load

LIMITS = Limits(seconds=1800.0, memory=20 * GIB)
CALIBRATION_IMAGES = 16
FLOAT_RELATIVE = 1e-3
INT8_MEAN_STEPS = 0.5
OWN_NOISE = 1.5
"""Of what one pixel's step does to the reference itself: a mean difference within it is no error of the converter."""
LAYER_STEPS = 2.0
OVERHEAD = 0.03
PEAK_RATIO = 4.0
STEPS = ("export", "simplify", "quantize", "convert")


@dataclass
class Row:
    """What is known of one model: facts by step, and why steps failed."""

    model: str
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def get(self, step: str, name: str) -> Any:
        """A fact, or None."""
        return self.facts.get(step, {}).get(name)

    def verdicts(self, *, int8: bool) -> dict[str, bool]:
        """Each demand and whether it is met; a fact that is missing because a step failed meets nothing."""
        convolutional = self.model in models.CONVOLUTIONAL
        found: dict[str, bool] = {}
        for kind in ("fp32", "int8") if int8 else ("fp32",):
            step = f"convert {kind}"
            found[f"{kind} overhead"] = self._below(step, "overhead", OVERHEAD)
            found[f"{kind} memory"] = self._below(step, "peak_ratio", PEAK_RATIO)
            if self.model in models.TORCHVISION:  # it is known of these how many they need
                found[f"{kind} TRANSPOSE"] = step in self.facts and (transposes(self, kind) or 0) <= fewest(self, kind)
        found["fp32 values"] = self._below("compare fp32", "relative", FLOAT_RELATIVE)
        if int8:
            own = self.get("compare int8", "own_steps") or 0.0
            found["int8 values"] = self._below("compare int8", "mean_steps", INT8_MEAN_STEPS)
            found["int8 values or own"] = self._below(
                "compare int8", "mean_steps", max(INT8_MEAN_STEPS, OWN_NOISE * own)
            )
            found["int8 layers"] = self._below("layers int8", "max_steps", LAYER_STEPS + 1e-3)
            if convolutional:
                found["int8 all MACs"] = (self.get("convert int8", "integer_share") or 0.0) == 1.0
        return found

    def _below(self, step: str, name: str, bound: float) -> bool:
        value = self.get(step, name)
        return value is not None and value < bound


def _in_short(message: str) -> str:
    """The message on one line; a list of findings as how often each operator breaks each rule."""
    found = collections.Counter(re.findall(r"- (\w+) '[^']*': ([^;\n]*)", message))
    if found:
        return "; ".join(f"{operator} x{count}: {rule}" for (operator, rule), count in found.most_common())
    return " ".join(message.split())[:600]


def transposes(row: Row, kind: str) -> int | None:
    """TRANSPOSE operators of the artifact; None when there is none."""
    operators = row.get(f"convert {kind}", "operators")
    return None if operators is None else int(operators.get("TRANSPOSE", 0))


def fewest(row: Row, kind: str) -> int:
    """Transposes that the network itself needs: those of its channel shuffles, and two for every attention.

    Heads become a stack of matrices before attention's two products, and features again after them.
    """
    shuffles = models.CHANNEL_SHUFFLES.get(row.model, 0)
    attentions = 0 if row.model in models.CONVOLUTIONAL else 2
    return shuffles + attentions * int((row.get(f"convert {kind}", "operators") or {}).get("SOFTMAX", 0))


@dataclass
class Course:
    """The way of one model through the steps; a step that fails is noted, and what needs it is left out."""

    name: str
    options: argparse.Namespace
    row: Row

    def step(self, label: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> bool:
        """Runs a step in a process of its own; whether it succeeded."""
        try:
            self.row.facts[label] = run_isolated(function, *arguments, limits=LIMITS)
        except EdgeshipError as error:
            self.row.failures[label] = _in_short(str(error))
        return label in self.row.facts

    def made(self, label: str, source: Path | None, path: Path, function: Callable[..., Any], *arguments: Any) -> bool:
        """Whether `path` is there in the end: from an earlier run and newer than `source`, or made now."""
        fresh = self.options.refresh and STEPS.index(label) >= STEPS.index(self.options.refresh)
        stale = source is not None and path.exists() and path.stat().st_mtime < source.stat().st_mtime
        if path.exists() and not stale and not fresh:
            return True
        return self.step(label, function, *arguments)

    def judged(self, kind: str, source: Path, compare: Callable[..., dict[str, Any]], trial: steps.Trial) -> None:
        """Converts and compares one kind of artifact."""
        path = self.path(f"{kind}{load(trial.target).suffix}")
        if not self.step(f"convert {kind}", steps.convert, source, path, trial):
            return
        self.step(f"compare {kind}", compare, source, path, trial)
        if kind == "int8" and trial.target == "tflite":
            self.step("layers int8", steps.compare_layers, source, path, trial)

    def path(self, kind: str) -> Path:
        """The model's file of a kind."""
        return Path(self.options.work) / f"{self.name}.{kind}"


def run_model(name: str, options: argparse.Namespace) -> Row:
    """All steps of one model, as far as they come."""
    course = Course(name, options, Row(name))
    trial = steps.Trial(name, options.target, options.images_folder, options.calibration_images, options.images)
    exported, simple, qdq = (course.path(kind) for kind in ("onnx", "simple.onnx", f"{options.target}.qdq.onnx"))
    export = (name, options.images_folder, exported, options.torchvision)
    if options.times:
        for kind, source in (("fp32", simple), ("int8", qdq)):
            target = course.path(f"{kind}.times{load(trial.target).suffix}")
            course.step(f"convert {kind}", steps.convert, source, target, trial)
            target.unlink(missing_ok=True)
        return course.row
    if not course.made("export", None, exported, models.export, *export) or options.export_only:
        return course.row
    if not course.made("simplify", exported, simple, steps.simplify, exported, simple, trial):
        return course.row
    course.judged("fp32", simple, steps.compare_float, trial)
    if not options.skip_int8 and course.made("quantize", simple, qdq, steps.quantize, simple, qdq, trial):
        course.judged("int8", qdq, steps.compare_int8, trial)
    return course.row


# What is printed ------------------------------------------------------------------------------------------------------

COLUMNS = (
    f"{'model':29} {'fp32: relative':>14} {'s':>6} {'peak':>6} {'over':>6} {'transp':>6}"
    f" | {'int8: mean':>10} {'own':>6} {'max':>6} {'layer':>6} {'agree':>6} {'MACs':>6}"
    f" {'s':>6} {'peak':>6} {'over':>6} {'transp':>6} {'Q':>4}"
)


def line(row: Row, *, int8: bool) -> str:
    """The model's line of the table."""
    parts = [f"{row.model:29}", _cell(row, "compare fp32", "relative", 14, ".1e"), *_conversion(row, "fp32")]
    if int8:
        quantize = (row.get("convert int8", "operators") or {}).get("QUANTIZE", 0) if row.facts else 0
        parts += [
            "|",
            _cell(row, "compare int8", "mean_steps", 10, ".3f"),
            _cell(row, "compare int8", "own_steps", 6, ".3f"),
            _cell(row, "compare int8", "max_steps", 6, ".1f"),
            _cell(row, "layers int8", "max_steps", 6, ".1f"),
            _cell(row, "compare int8", "agreement", 6, ".0%"),
            _cell(row, "convert int8", "integer_share", 6, ".1%"),
            *_conversion(row, "int8"),
            f"{quantize:4d}",
        ]
    return " ".join(parts)


def _conversion(row: Row, kind: str) -> list[str]:
    count = transposes(row, kind)
    return [
        _cell(row, f"convert {kind}", "seconds", 6, ".2f"),
        _cell(row, f"convert {kind}", "peak_ratio", 6, ".1f"),
        _cell(row, f"convert {kind}", "overhead", 6, ".1%"),
        f"{'-' if count is None else count:>6}",
    ]


def _cell(row: Row, step: str, name: str, width: int, form: str) -> str:
    value = row.get(step, name)
    return f"{'-' if value is None else format(value, form):>{width}}"


def print_summary(rows: Sequence[Row], *, int8: bool) -> bool:
    """Prints each demand with the models that miss it, medians and failed steps; gives whether all demands are met."""
    demands: dict[str, list[str]] = {}
    asked: dict[str, int] = {}
    for row in rows:
        for demand, met in row.verdicts(int8=int8).items():
            asked[demand] = asked.get(demand, 0) + 1
            demands.setdefault(demand, []).extend([] if met else [row.model])
    print()
    for demand, missed in demands.items():
        failing = f"   not: {', '.join(missed)}" if missed else ""
        print(f"{demand:20} {asked[demand] - len(missed):3d} of {asked[demand]:3d}{failing}")
    moving = [(row, ours) for row in rows if (ours := transposes(row, "fp32"))]
    for row, ours in moving:
        theirs = row.get("convert fp32", "onnx_transposes")
        needs = f"the network needs {fewest(row, 'fp32')}, " if row.model in models.TORCHVISION else ""
        print(f"{row.model}: {ours} TRANSPOSE; {needs}its ONNX graph has {theirs}")
    print_times(rows, int8=int8)
    for row in rows:
        for step, why in row.failures.items():
            print(f"{row.model}: {step} failed: {why}")
    return not any(demands.values()) and not any(row.failures for row in rows)


def print_times(rows: Sequence[Row], *, int8: bool) -> None:
    """Prints how long conversions took, and the artifacts' overhead."""
    for kind in ("fp32", "int8") if int8 else ("fp32",):
        seconds = [value for row in rows if (value := row.get(f"convert {kind}", "seconds")) is not None]
        processor = [value for row in rows if (value := row.get(f"convert {kind}", "cpu_seconds")) is not None]
        if seconds:
            print(
                f"conversion {kind}: median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s;"
                f" of processor time {statistics.median(processor):.2f} s and {max(processor):.2f} s"
            )
        beyond = [value for row in rows if (value := row.get(f"convert {kind}", "over_weights")) is not None]
        if beyond:
            print(
                f"{kind}: files are {min(beyond):.1%} to {max(beyond):.1%} larger than the weights and biases alone;"
                " what int8 needs beyond those, scales and zero points per channel, is not in the column 'over'"
            )


def print_operators(rows: Sequence[Row]) -> None:
    """Prints for each kind of operator how its layers' int8 outputs differ from the reference's on the same inputs."""
    totals: dict[str, list[float]] = {}
    for row in rows:
        for name, (layers, elements, signed, off, worst) in (row.get("layers int8", "operators") or {}).items():
            entry = totals.setdefault(name, [0, 0, 0.0, 0.0, 0.0])
            entry[:4] = (a + b for a, b in zip(entry[:4], (layers, elements, signed, off), strict=True))
            entry[4] = max(entry[4], worst)
    if totals:
        print(f"\n{'operator':24} {'layers':>7} {'off by a step':>14} {'mean error':>11} {'largest of a layer':>19}")
    for name, (layers, elements, signed, off, worst) in sorted(
        totals.items(), key=lambda item: -item[1][3] / item[1][1]
    ):
        print(f"{name:24} {layers:7.0f} {off / elements:14.4%} {signed / elements:+11.5f} {worst:19.4f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and artifacts")
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGESHIP_DATA"), help="folder with imagenet_dev")
    parser.add_argument(
        "--torchvision", default=os.environ.get("TORCHVISION_SITE"), help="where torchvision is installed"
    )
    parser.add_argument("--models", nargs="*", default=[], help="names or their beginnings; default: torchvision's")
    parser.add_argument("--images", type=int, default=50, help="images that artifacts are compared on")
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES)
    parser.add_argument("--target", default="tflite")
    parser.add_argument("--skip-int8", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="only make the ONNX files")
    parser.add_argument("--times", action="store_true", help="only time the conversions of the models that are there")
    parser.add_argument("--refresh", choices=STEPS, help="do not use what this step and later ones left before")
    parser.add_argument("--json", type=Path, help="write all facts there")
    parser.add_argument("--list", action="store_true", help="name the models and stop")
    options = parser.parse_args()
    if not options.list and options.data is None:
        parser.error("set EDGESHIP_DATA or give --data: a folder with imagenet_dev/*.jpg")
    return options


def main() -> int:
    options = arguments()
    names = models.selected(options.models)
    if options.list:
        print("\n".join(names))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.images_folder = Path(options.data) / "imagenet_dev"
    options.work.mkdir(parents=True, exist_ok=True)
    int8 = not options.skip_int8
    print(COLUMNS if int8 else COLUMNS.split(" | ", maxsplit=1)[0])
    rows = []
    for name in names:
        rows.append(run_model(name, options))
        print(line(rows[-1], int8=int8), flush=True)
        if options.json:
            facts = [{"model": row.model, **row.facts, "failures": row.failures} for row in rows]
            options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.times:
        print_times(rows, int8=int8)
        return int(any(row.failures for row in rows))
    if options.export_only:
        failed = [row for row in rows if row.failures]
        for row in failed:
            print(f"{row.model}: {row.failures}")
        return int(bool(failed))
    met = print_summary(rows, int8=int8)
    print_operators(rows)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
