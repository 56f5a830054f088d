"""Prints what range algorithms and refinements make of a recipe's model: accuracy in simulation, time and memory.

    python benchmarks/algorithms.py --recipe examples/mobilenet_v1/recipe.toml --model 3-simplify/model.onnx
        [--algorithms minmax,mse] [--refine "none;bias_correction;equalize,bias_correction"] [--per-tensor]
        [--weights full|pair_limited] [--samples 400] [--peer]

`--model` is the simplified float model of the recipe's run folder. Each row is a process of its own. The accuracy is
that of the QDQ graph with graph optimisations off (the reference that artifacts are compared with), on the recipe's
evaluation samples; agreement and SQNR compare its first output with the float model's. Seconds are those from the
loaded model to the plan, decoding included, by the clock and of processors (which other programs change less); the peak
is the process's, less what it was before calibration.

`--peer` adds ONNX Runtime's own quantize_static (S8S8, per channel, min-max), simulated alike; as executed on x86
without VNNI it clips. silu_cifar.py trains a SiLU/HardSwish network to try it on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

NONE = "none"
REFINE = f"{NONE};bias_correction;gptq,bias_correction;equalize,gptq,bias_correction"
PEER = "onnxruntime"


@dataclass(frozen=True)
class Row:
    """One way to quantize."""

    algorithm: str
    refine: str
    per_tensor: bool
    weights: str
    samples: int | None

    @property
    def refinements(self) -> tuple[str, ...]:
        """The refinements by name."""
        return () if self.refine == NONE else tuple(self.refine.split(","))


def main() -> None:
    """Prints the table."""
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(Row(**json.loads(arguments.child)), arguments.recipe, arguments.model)))
        return
    print(
        f"{'algorithm':15} {'refinements':42} {'top-1':>6} {'fp32':>6} {'agree':>6} {'SQNR dB':>7} {'s':>6} "
        f"{'CPU s':>6} {'MB':>5}",
        flush=True,
    )
    rows = list(product(arguments.algorithms.split(","), arguments.refine.split(";")))
    for algorithm, refine in [*rows, *([(PEER, NONE)] if arguments.peer else [])]:
        row = Row(algorithm, refine, arguments.per_tensor, arguments.weights, arguments.samples)
        seen = in_child(arguments, row)
        print(
            f"{algorithm:15} {refine:42} {seen['top1']:6.2f} {seen['fp32']:6.2f} {seen['agreement']:6.2f} "
            f"{seen['sqnr']:7.2f} {seen['seconds']:6.2f} {seen['cpu_seconds']:6.2f} {seen['megabytes']:5.0f}",
            flush=True,
        )


def parse() -> argparse.Namespace:
    """The command line."""
    from edgeship.calibration import algorithms

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the simplified float model of the recipe")
    parser.add_argument("--algorithms", default=",".join(algorithms.names()))
    parser.add_argument("--refine", default=REFINE, help=f"lists of refinements, apart by ';' ({NONE}: none)")
    parser.add_argument("--per-tensor", action="store_true", help="one weight scale per tensor")
    parser.add_argument("--weights", choices=["full", "pair_limited"], default="full")
    parser.add_argument("--samples", type=int, help="judge with the first so many of the evaluation samples")
    parser.add_argument("--peer", action="store_true", help="add a row of ONNX Runtime's quantize_static")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_child(arguments: argparse.Namespace, row: Row) -> dict[str, float]:
    """What `measure` returns, measured in a process of its own."""
    command = [sys.executable, __file__, "--recipe", str(arguments.recipe), "--model", str(arguments.model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--child", json.dumps(asdict(row))], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(row: Row, recipe_path: Path, model: Path) -> dict[str, float]:
    """Top-1 in percent of the quantized and the float model, agreement, SQNR, seconds and megabytes."""
    import edgeship.targets.onnxruntime
    from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
    from edgeship.pipeline.artifacts import input_shapes
    from edgeship.pipeline.quantizing.calibrated import quantize_model
    from edgeship.pipeline.recipe import load_recipe
    from edgeship.targets.base import load

    recipe = load_recipe(recipe_path)
    graph, shapes = load_onnx(model), input_shapes(model)
    samples = recipe.calibration_samples(shapes)
    before, start, worked = peak(), time.perf_counter(), time.process_time()
    if row.algorithm == PEER:
        content = by_peer(model, samples)
    else:
        result = quantize_model(
            graph,
            samples,
            [load(name).rules for name in sorted(recipe.targets)],
            algorithm=row.algorithm,
            refinements=row.refinements,
            schemes=(row.weights,),  # type: ignore[arg-type]  # one of argparse's choices
            per_tensor=row.per_tensor,
        )
        content = to_bytes(next(iter(result.models.values())))
    cost = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - worked,
        "megabytes": peak() - before,
    }
    reference = edgeship.targets.onnxruntime.open_reference(content)
    judged = judge(reference, edgeship.targets.onnxruntime.open_float(to_bytes(graph)), recipe, shapes, row.samples)
    return judged | cost


def by_peer(model: Path, samples: Any) -> bytes:
    """The QDQ model that ONNX Runtime's quantize_static makes of the same samples."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    feeds = iter(dict(sample.feeds) for sample in samples)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> Any:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.onnx"
        quantize_static(
            model, place, Reader(), per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8
        )
        return place.read_bytes()


def judge(quantized: Any, exact: Any, recipe: Any, shapes: Any, count: int | None) -> dict[str, float]:
    """Top-1 of both, their agreement, and the SQNR of the first output in dB."""
    samples = recipe.evaluation_samples(shapes)
    right, right_exact, same, total, signal, noise = 0, 0, 0, 0, 0.0, 0.0
    name = exact.outputs[0].name
    for sample in samples:
        if count is not None and total == count:
            break
        ours, theirs = quantized.run(sample.feeds)[name], exact.run(sample.feeds)[name]
        right += int(ours.argmax()) == sample.label
        right_exact += int(theirs.argmax()) == sample.label
        same += int(ours.argmax()) == int(theirs.argmax())
        signal += float((theirs.astype(np.float64) ** 2).sum())
        noise += float(((theirs.astype(np.float64) - ours) ** 2).sum())
        total += 1
    share = 100 / total
    sqnr = 10 * np.log10(signal / noise) if noise else float("inf")
    return {"top1": right * share, "fp32": right_exact * share, "agreement": same * share, "sqnr": sqnr}


def peak() -> float:
    """The process's peak memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
