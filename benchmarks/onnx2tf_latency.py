"""Latency of TFLite files made by edgeship against those that onnx2tf makes of the same ONNX models.

    python benchmarks/zoo.py --work FOLDER --models squeezenet1_1 mobilenet_v2 ...      the models and our artifacts
    python benchmarks/onnx2tf_latency.py --work FOLDER --onnx2tf ENVIRONMENT/bin/onnx2tf squeezenet1_1 mobilenet_v2 ...

onnx2tf lives in an environment of its own: pip install onnx2tf==1.29.24. It gets the exported ONNX file and quantizes
on as many images as ours was calibrated on. Both artifacts of a kind run in LiteRT with its default kernels, one
thread, each in its own process, in turns; int8 is compared with float32 at the borders, as both have it. A ratio under
1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _zoo_models as models
import numpy as np

from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.benchmark.statistics import ratio
from edgeship.pipeline.devices.worker import Subject
from edgeship.targets.tflite.flatfile import load, operator_names

SLOWER = 1.02
"""A ratio from which on ours counts as slower, when its interval leaves no doubt."""
MADE = {"fp32": "float32", "int8": "integer_quant"}
"""Our name of a kind -> the suffix of onnx2tf's file."""
SAMPLE = "calibration_image_sample_data_20x128x128x3_float32.npy"
"""Images that onnx2tf checks its own result with, and downloads where they are not in the working folder."""


def convert(name: str, options: argparse.Namespace) -> str:
    """Makes onnx2tf's files of a model, where it was not tried yet; says why a file is missing, or nothing."""
    folder, last = options.work / "onnx2tf", options.kinds[-1]
    told = folder / f"{name}.{last}.txt"
    if told.exists() or all(theirs(name, options, kind).exists() for kind in options.kinds):
        return told.read_text() if told.exists() else ""
    folder.mkdir(parents=True, exist_ok=True)
    images = Path(options.data) / "imagenet_dev"
    prepared = models.images(images, name, options.calibration_images, models.STATISTICS_IMAGES)
    np.save(folder / f"{name}.npy", prepared.transpose(0, 2, 3, 1))
    if not (folder / SAMPLE).exists():
        few = models.images(images, name, 20)
        np.save(folder / SAMPLE, few.transpose(0, 2, 3, 1)[:, ::2, ::2][:, :128, :128].clip(0, 1).astype(np.float32))
    command = [str(options.onnx2tf.resolve()), "-i", str((options.work / f"{name}.onnx").resolve()), "-o", name, "-n"]
    if last == "int8":
        command += ["-oiqt", "-cind", "input", f"{name}.npy", "0.0", "1.0"]
    path = f"{options.onnx2tf.resolve().parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    told.write_text(_run(command, folder, environment, theirs(name, options, last), options.minutes))
    return told.read_text()


def _run(command: list[str], folder: Path, environment: dict[str, str], last: Path, minutes: float) -> str:
    """Runs onnx2tf until `last` is written; what it makes after that is not compared, and takes longest.

    Gives nothing, or the last line of what it said, or that it took too long.
    """
    begin = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT) as running,
    ):
        size, late = -1, False
        while running.poll() is None:
            time.sleep(2)
            late = time.monotonic() - begin > 60 * minutes
            before, size = size, last.stat().st_size if last.exists() else -1
            if late or 0 < before == size:
                running.kill()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if last.exists():
        return ""
    return f"stopped after {minutes:g} minutes" if late else (lines or [f"exit code {running.returncode}"])[-1]


def theirs(name: str, options: argparse.Namespace, kind: str) -> Path:
    """onnx2tf's file of a kind."""
    return Path(options.work) / "onnx2tf" / name / f"{name}_{MADE[kind]}.tflite"


def compare(name: str, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Medians of both artifacts of one kind, and the ratio of ours to theirs with its interval."""
    files = [options.work / f"{name}.{kind}.tflite", theirs(name, options, kind)]
    schedule = Schedule(options.runs, options.warmup, options.launches)
    ours, other = measure([Subject("tflite", path) for path in files], None, schedule)
    found = ratio(ours, other)
    own, foreign = (operators(path) for path in files)
    return {
        "only_ours": dict(own - foreign),
        "only_theirs": dict(foreign - own),
        "model": name,
        "kind": kind,
        "ours_ms": ours.median_ms,
        "onnx2tf_ms": other.median_ms,
        "ratio": found.value,
        "interval": found.interval,
        "noisy": ours.noisy or other.noisy,
    }


def operators(path: Path) -> Counter[str]:
    """The number of operators of each kind in a file."""
    model = load(path)
    names = operator_names(model)
    return Counter(names[operator.opcodeIndex] for operator in model.subgraphs[0].operators)


def line(fact: dict[str, Any]) -> str:
    """The comparison as a line of the table."""
    interval = fact["interval"]
    limits = f"{interval[0]:.3f} .. {interval[1]:.3f}" if interval else "too few rounds"
    verdict = "slower" if interval and interval[0] > SLOWER else ""
    noise = " noisy" if fact["noisy"] else ""
    more = "".join(
        f"; {whose} more: {', '.join(f'{name} {count}' for name, count in sorted(fact[key].items()))}"
        for whose, key in (("ours", "only_ours"), ("onnx2tf's", "only_theirs"))
        if fact[key]
    )
    times = f"{fact['ours_ms']:9.2f} {fact['onnx2tf_ms']:9.2f}"
    return f"{fact['model']:28} {fact['kind']:5} {times} {fact['ratio']:6.3f}   {limits}  {verdict}{noise}{more}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="models of zoo.py's folder")
    parser.add_argument("--work", type=Path, required=True, help="zoo.py's folder")
    parser.add_argument("--onnx2tf", type=Path, required=True, help="the command in its own environment")
    parser.add_argument("--data", default=os.environ.get("EDGESHIP_DATA"), help="folder with imagenet_dev")
    parser.add_argument("--calibration-images", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=tuple(MADE), default=tuple(MADE))
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10, help="how long onnx2tf may take for a model")
    parser.add_argument("--convert-only", action="store_true", help="only make onnx2tf's files")
    parser.add_argument("--json", type=Path, help="write all facts there")
    options = parser.parse_args()
    options.kinds = [kind for kind in MADE if kind in options.kinds]
    return options


def main() -> int:
    options = arguments()
    facts: list[dict[str, Any]] = []
    print(f"{'model':28} {'kind':5} {'ours, ms':>9} {'onnx2tf':>9} {'ratio':>6}   95 % interval")
    for name in models.selected(options.models):
        error = convert(name, options)
        for kind in options.kinds:
            if not theirs(name, options, kind).exists():
                print(f"{name:28} {kind:5} onnx2tf made no file: {error[:200]}", flush=True)
            elif not options.convert_only:
                facts.append(compare(name, options, kind))
                print(line(facts[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(fact["interval"] and fact["interval"][0] > SLOWER for fact in facts))


if __name__ == "__main__":
    sys.exit(main())
