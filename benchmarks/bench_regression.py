"""How far a benchmark's ratio moves from run to run, and how often the regression gate is wrong, on a loaded machine.

    python benchmarks/bench_regression.py [--runs 10] [--no-load] [--keep RUNS.json]

1. Spread: the digits example is benchmarked RUNS times as `deploy` does (all artifacts and the reference workload in
   turns) while other processes of ours use the cores on and off (--no-load: without them). Told for each runtime: the
   speed-up of int8 over fp32 in each run, their spread (standard deviation in percent of the mean), beside the spread
   of the ratio of plain medians over all times, which is what one gets without rounds.
2. The gate, on the very times of 1: of each of 50 pairs of runs one is the baseline and the other the build. Unchanged,
   an alarm is false; with the build's times 10 % longer, no alarm is a miss. The limit is 5 %.
3. The gate with a model that really is slower: the float model with more work added, against a baseline of the float
   model; and the float model itself once more.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeship.pipeline.artifacts import artifact_path
from edgeship.pipeline.benchmark.baseline import Baseline
from edgeship.pipeline.benchmark.measure import Schedule, measure
from edgeship.pipeline.benchmark.statistics import Measurement, Ratio, ratio
from edgeship.pipeline.devices.worker import REFERENCE, Subject

RECIPE = Path(__file__).parents[1] / "examples" / "digits" / "recipe.toml"
TARGETS = ("onnxruntime", "tflite")
SIMULATED, CHANGE, LIMIT = 50, 1.10, 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no-load", action="store_true", help="without other processes of ours")
    parser.add_argument("--keep", type=Path, help="also write the measurements there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            str(Path(sys.executable).with_name("edgeship")),
            "deploy",
            str(RECIPE),
            "--out",
            name,
            "--to",
            "convert",
        ]
        subprocess.run(command, check=True, capture_output=True)
        with load_on_and_off(0 if options.no_load else os.cpu_count() or 1):
            runs = [measured(folder, place, options.runs) for place in range(options.runs)]
            tell_spread(runs)
            tell_gate(runs)
            tell_slowed(folder)
    if options.keep:
        options.keep.write_text(json.dumps([[one.to_json() for one in run] for run in runs]))
    return 0


@contextmanager
def load_on_and_off(processes: int) -> Iterator[None]:
    """That many processes, each busy and idle for random times of up to half a second and a second."""
    started = [multiprocessing.Process(target=_busy, args=(seed,), daemon=True) for seed in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def _busy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.random((128, 128)).astype(np.float32)
    while True:
        end = time.monotonic() + generator.uniform(0, 0.5)
        while time.monotonic() < end:
            values = np.tanh(values @ values)
        time.sleep(generator.uniform(0, 1.0))


def measured(folder: Path, place: int, count: int) -> list[Measurement]:
    """The reference and, for each target, fp32 and int8."""
    convert = folder / "5-convert"
    subjects = [Subject(REFERENCE, None)]
    subjects += [Subject(name, convert / artifact_path(name, kind)) for name in TARGETS for kind in ("fp32", "model")]
    print(f"  run {place + 1} of {count}", file=sys.stderr, flush=True)
    return measure(subjects, None, Schedule())


def tell_spread(runs: Sequence[Sequence[Measurement]]) -> None:
    machine = runs[0][0].machine
    busy = [run[0].machine["busy"] for run in runs]
    print(f"{machine['cpu']['model']}, {machine['cpu']['cores']} cores, busy {min(busy):.0%} .. {max(busy):.0%}")
    for place, name in enumerate(TARGETS):
        pairs = [(run[1 + 2 * place], run[2 + 2 * place]) for run in runs]
        found = [ratio(*pair) for pair in pairs]
        plain = [fp32.median_ms / int8.median_ms for fp32, int8 in pairs]
        values = [one.value for one in found]
        print(
            f"{name:<12} speed-up {', '.join(f'{value:.3f}' for value in values)}: spread {_spread(values):.2f} % "
            f"(plain medians {_spread(plain):.2f} %), mean half interval {_half(found):.2f} %, "
            f"noisy by its IQR {sum(a.noisy or b.noisy for a, b in pairs)} of {len(pairs)}"
        )


def _spread(values: Sequence[float]) -> float:
    return float(100 * np.std(values, ddof=1) / np.mean(values))


def _half(found: Sequence[Ratio]) -> float:
    return float(np.mean([50 * (one.interval[1] - one.interval[0]) / one.value for one in found if one.interval]))


def tell_gate(runs: Sequence[Sequence[Measurement]]) -> None:
    pairs = list(itertools.permutations(range(len(runs)), 2))
    chosen = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:SIMULATED]]
    for place, name in enumerate(TARGETS):
        for kind, subject in (("fp32", 1 + 2 * place), ("int8", 2 + 2 * place)):
            decisions: dict[float, list[str]] = {1.0: [], CHANGE: []}
            for then, now in chosen:
                baseline = Baseline({"m": runs[then][subject]}, runs[then][0], runs[then][0].machine)
                for factor, taken in decisions.items():
                    change = baseline.judge("m", slowed(runs[now][subject], factor), runs[now][0], LIMIT)
                    taken.append(change.decision if change else "")
            print(
                f"{name:<12} {kind}: of {len(chosen)} pairs {decisions[1.0].count('slower')} false alarms, "
                f"{sum(one != 'slower' for one in decisions[CHANGE])} misses of a true change of {CHANGE - 1:.0%} "
                f"(limit {LIMIT:g} %; unchanged: {decisions[1.0].count('within')} within, "
                f"{decisions[1.0].count('undecided')} undecided)"
            )


def slowed(one: Measurement, factor: float) -> Measurement:
    return dataclasses.replace(one, nanoseconds=tuple(round(factor * value) for value in one.nanoseconds))


def tell_slowed(folder: Path) -> None:
    model = folder / "5-convert" / artifact_path("onnxruntime", "fp32")
    more = folder / "slower.onnx"
    more.write_bytes(with_more_work(onnx.load(model)).SerializeToString())
    subjects = [Subject(REFERENCE, None), Subject("onnxruntime", model)]
    reference, before = measure(subjects, None, Schedule())
    baseline = Baseline({"m": before}, reference, reference.machine)
    for label, path in (("the same model", model), ("with more work", more)):
        fixed, now = measure([Subject(REFERENCE, None), Subject("onnxruntime", path)], None, Schedule())
        change = baseline.judge("m", now, fixed, LIMIT)
        print(f"{label}: {change.decision if change else ''}: {change}")


def with_more_work(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a matrix product of its input added, times zero, to its output."""
    graph = model.graph
    shape = [dimension.dim_value for dimension in graph.input[0].type.tensor_type.shape.dim]
    weight = np.random.default_rng(0).random((int(np.prod(shape)), 2048)).astype(np.float32)
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before_more" if name == output else name for name in node.output]
    constants = {"more_weight": weight, "more_zero": np.float32(0), "more_shape": np.array([1, -1])}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items())
    graph.node.extend(
        [
            helper.make_node("Reshape", [graph.input[0].name, "more_shape"], ["more_flat"]),
            helper.make_node("MatMul", ["more_flat", "more_weight"], ["more_product"]),
            helper.make_node("ReduceMax", ["more_product"], ["more_max"], keepdims=0),
            helper.make_node("Mul", ["more_max", "more_zero"], ["more_nothing"]),
            helper.make_node("Add", ["before_more", "more_nothing"], [output]),
        ]
    )
    return model


if __name__ == "__main__":
    sys.exit(main())
