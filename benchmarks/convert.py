"""Conversion time, size and TRANSPOSE count of ONNX -> TFLite, and the error against ONNX Runtime.

    python benchmarks/convert.py MODEL.onnx [...] [--runs 5]

A float or QDQ model each. Seconds are the median of the runs in process, after one warm-up; the error is against ONNX
Runtime with graph optimisations off, on seeded noise: relative to the largest output for a float model, in quantization
steps where an output is quantized.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeship.calibration.writing.qdq import output_steps
from edgeship.targets.base import ConvertOptions
from edgeship.targets.onnxruntime.session import open_reference
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.flatfile import load, operator_names


def operators(path: Path) -> Counter[str]:
    model = load(path)
    names = operator_names(model)
    return Counter(names[operator.opcodeIndex] for operator in model.subgraphs[0].operators)


def error(source: Path, artifact: Path, model: ir.Model) -> str:
    reference, session = open_reference(source), TARGET.open(artifact)
    rng = np.random.default_rng(0)
    feeds = {
        info.name: rng.normal(size=[max(size, 1) for size in info.shape]).astype(info.dtype) for info in session.inputs
    }
    expected, seen, steps = reference.run(feeds), session.run(feeds), output_steps(model)
    parts = []
    for name, values in expected.items():
        worst = float(np.abs(values - seen[name]).max())
        step = steps.get(name, 0.0)
        parts.append(f"{name} {worst / step:.1f} steps" if step else f"{name} {worst / np.abs(values).max():.1e}")
    return ", ".join(parts)


def measure(source: Path, runs: int) -> str:
    seconds = []
    for _ in range(runs + 1):
        model = ir.load(source)
        start = time.perf_counter()
        content = TARGET.convert(model, ConvertOptions())
        seconds.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model.tflite"
        artifact.write_bytes(content)
        counts, share = operators(artifact), TARGET.integer_share(artifact)
        worst = error(source, artifact, model)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    return (
        f"{source.name:28} {statistics.median(seconds[1:]):7.3f} s  {len(content):9} bytes"
        f" ({len(content) / weights:.3f} x weights)"
        f"  {counts.total():4} operators, {counts['TRANSPOSE']} TRANSPOSE  int8 {share.share:.0%}  {worst}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    for source in arguments.models:
        print(measure(source, arguments.runs), flush=True)


if __name__ == "__main__":
    main()
