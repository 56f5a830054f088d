"""Prints what a recipe's artifacts keep of the float model as an x86 CPU without VNNI executes them, and how fast.

    python benchmarks/as_executed.py RECIPE.toml --out FOLDER [--ways default,reconstruct,per_tensor] [--no-times]
        [--runs 40] [--launches 5]

Each way is one `edgeship deploy --to convert` of the recipe into a folder of its own under FOLDER (the same command
again goes on where it was; unchanged stages are not run again):

    default        the recipe as it is
    reconstruct    quantize.refine = ["reconstruct"]
    per_tensor     one weight scale per tensor, quantize.refine = ["equalize", "gptq", "bias_correction"]

Then the artifacts run on all evaluation samples with `cpuid` masked (masked_cpu.py: AVX2 and nothing newer, native
speed). `lost` is the drop of top-1 in points. `agree` is the share of samples with the float model's decision, where a
tie of the two largest integers counts as agreement if one of them is the float model's; `first` counts the first of a
tie only. `clipped` are the sums of two products that leave 16 bits in ONNX Runtime's kernels, counted by emulation over
all evaluation samples. `speed-up` is the float median over the int8 median of ONNX Runtime on the masked CPU, one
thread, each run in a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masked_cpu import masked

WAYS = {
    "default": (),
    "reconstruct": ('quantize.refine=["reconstruct"]',),
    "per_tensor": ("quantize.per_tensor=true", 'quantize.refine=["equalize","gptq","bias_correction"]'),
}
WARM_UP = 10


def main() -> None:
    """Prints the table."""
    arguments = parse()
    if arguments.child:
        work, *given = json.loads(arguments.child)
        print(json.dumps({"judge": judge, "time": timed}[work](*given)))
        return
    print(f"{'way':12} {'target':12} {'top-1':>6} {'fp32':>6} {'lost':>6} {'agree':>6} {'first':>6} {'clipped':>10}")
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**masked(Path(folder)), "OMP_NUM_THREADS": "1"}
        for way in arguments.ways.split(","):
            run = (arguments.out / way).absolute()
            deploy(arguments.recipe, run, WAYS[way])
            seen = in_child(environment, "judge", str(arguments.recipe.absolute()), str(run))
            for target, facts in seen.items():
                print(
                    f"{way:12} {target:12} {facts['top1']:6.2f} {facts['fp32']:6.2f} {facts['lost']:+6.2f} "
                    f"{facts['agree']:6.2f} {facts['first']:6.2f} {facts['clipped']:>10}",
                    flush=True,
                )
            if not arguments.no_times:
                times[way] = in_turns(environment, run, arguments.launches, arguments.runs)
    for way, (exact, quantized) in times.items():
        print(f"{way:12} onnxruntime  fp32 {exact:.2f} ms, int8 {quantized:.2f} ms, speed-up {exact / quantized:.2f}x")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--runs", type=int, default=40, help="timed inferences of a launch")
    parser.add_argument("--launches", type=int, default=5, help="processes of each model, in turns")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child:
        unknown = [way for way in arguments.ways.split(",") if way not in WAYS]
        if arguments.recipe is None or arguments.out is None or unknown:
            parser.error(f"a recipe and --out are needed; ways are {', '.join(WAYS)}")
    return arguments


def deploy(recipe: Path, run: Path, settings: tuple[str, ...]) -> None:
    """Brings the run folder up to date."""
    command = [sys.executable, "-m", "edgeship.pipeline.cli", "deploy", str(recipe), "--to", "convert"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run([*command, "--out", str(run)], check=True, stdout=subprocess.DEVNULL)


def in_child(environment: Mapping[str, str], *work: Any) -> Any:
    """What the function makes of its arguments on the masked CPU."""
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def judge(recipe_path: str, run: str) -> dict[str, dict[str, float]]:
    """What each target's artifact decides, against the float model and the labels."""
    from edgeship.pipeline.artifacts import artifact_path, input_shapes
    from edgeship.pipeline.compare import Comparison
    from edgeship.pipeline.recipe import load_recipe
    from edgeship.pipeline.scoring import Score, class_scores, drop_of
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_float

    recipe, folder = load_recipe(recipe_path), Path(run)
    simplified = folder / "3-simplify/model.onnx"
    samples = recipe.evaluation_samples(input_shapes(simplified))
    if samples is None or not samples.has_labels:
        sys.exit(f"{recipe_path}: data.evaluation must have labels")
    sessions = {name: load(name).open(folder / "5-convert" / artifact_path(name)) for name in sorted(recipe.targets)}
    exact = open_float(simplified.read_bytes())
    scores = {name: Score() for name in ("", *sessions)}
    comparisons = {name: Comparison() for name in sessions}
    for sample in samples:
        outputs = {"": exact.run(sample.feeds), **{name: each.run(sample.feeds) for name, each in sessions.items()}}
        for name, values in outputs.items():
            classes = class_scores(values)
            if classes is None or sample.label is None:
                sys.exit(f"{recipe_path}: the model has no output of classes")
            scores[name].update(classes, sample.label)
            if name:
                comparisons[name].update(outputs[""], values)
    return {
        name: {
            "top1": scores[name].top1,
            "fp32": scores[""].top1,
            "lost": drop_of(scores[name], scores[""])["drop"],
            "agree": 100 * (comparisons[name].agreement or 0.0),
            "first": 100 * (comparisons[name].strict_agreement or 0.0),
            "clipped": clipped(name, folder, recipe, samples),
        }
        for name in sessions
    }


def clipped(target: str, folder: Path, recipe: Any, samples: Any) -> int:
    """The sums that leave 16 bits on all samples, in the kernels of this target."""
    from edgeship.calibration.diagnosis.saturation import saturation
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_float

    if load(target).weights != "pair_limited":
        return 0
    model = load_onnx(folder / "4-quantize" / f"{recipe.quantized_model(target)}.onnx")
    return sum(layer.clipped for layer in saturation(model, samples, open_float))


def in_turns(environment: Mapping[str, str], run: Path, launches: int, runs: int) -> tuple[float, float]:
    """The medians in milliseconds of ONNX Runtime's float and int8 model."""
    models = [run / "3-simplify/model.onnx", run / "5-convert/onnxruntime/model.onnx"]
    taken: list[list[float]] = [[], []]
    for _ in range(launches):
        for times, model in zip(taken, models, strict=True):
            times.extend(in_child(environment, "time", str(model), runs))
    return statistics.median(taken[0]), statistics.median(taken[1])


def timed(model: str, runs: int) -> list[float]:
    """The milliseconds of each inference on random values, after a warm-up."""
    import numpy as np

    from edgeship.targets.onnxruntime import OnnxSession

    session = OnnxSession(Path(model))
    generator = np.random.default_rng(0)
    feeds = {
        value.name: generator.normal(size=[max(side, 1) for side in value.shape]).astype(np.float32)
        for value in session.inputs
    }
    times = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1000 * (time.perf_counter() - start))
    return times[WARM_UP:]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
