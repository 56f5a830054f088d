"""Prints time and peak memory of calibrating on 50, 100, 200, 400 images: edgeship's algorithms and ONNX Runtime's.

    python benchmarks/calibration.py --model mobilenet.onnx --data imagenet_dev [--counts 50,100] [--repeats 3]
        [--algorithms minmax,percentile,entropy] [--no-peer]

The model takes one image input (1, 3, S, S) of pixels / 127.5 - 1; `--data` is a folder of JPEGs, whose short side is
at least S. Each measurement is a process of its own, both with their default threads; the time includes
decoding, the peak is the process's. edgeship finds ranges only; a last row adds what its default refinements collect.
ONNX Runtime has minmax, percentile and entropy; its histograms keep every activation of every image, so that 400 images
of MobileNetV1 take 4 GB: `--no-peer` leaves it out. Last comes how far each method's peaks lie apart over the counts:
the largest by the smallest, for memory that does not grow with the images next to nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

OURS, PEER, REFINED = "edgeship", "onnxruntime", "edgeship, refinements"
LIBRARIES = (
    "onnxruntime.quantization", "PIL.JpegImagePlugin", "threadpoolctl",
    "edgeship.calibration.quantize", "edgeship.targets.onnxruntime",
)  # fmt: skip
PEERS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a float ONNX model, as 3-simplify/model.onnx")
    parser.add_argument("--data", type=Path, required=True, help="a folder of JPEG images")
    parser.add_argument("--counts", default="50,100,200,400")
    parser.add_argument(
        "--repeats", type=int, default=3, help="the fastest of so many runs counts, and their median peak"
    )
    parser.add_argument("--algorithms", default="minmax,moving_average,percentile,entropy,mse")
    parser.add_argument("--no-peer", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, algorithm, count = arguments.child.split(":")
        print(json.dumps(measure(method, algorithm, arguments.model, arguments.data, int(count))))
        return
    wanted = arguments.algorithms.split(",")
    rows = [(method, each) for each in wanted for method in (OURS, PEER) if method == OURS or each in PEERS]
    rows = [row for row in rows if row[0] == OURS or not arguments.no_peer] + [(REFINED, wanted[0])]
    print(f"{'images':>7}  {'method':22} {'algorithm':15} {'seconds':>8} {'peak MB':>8} {'against peer':>12}")
    peaks: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    for count in (int(text) for text in arguments.counts.split(",")):
        found = {row: best(arguments, *row, count) for row in rows}
        for (method, algorithm), (seconds, peak) in found.items():
            peer = found.get((PEER, algorithm))
            ratio = f"{peer[0] / seconds:.1f}x" if peer and method != PEER else ""
            print(f"{count:7}  {method:22} {algorithm:15} {seconds:8.2f} {peak:8.0f} {ratio:>12}", flush=True)
            peaks[method, algorithm].append(peak)
    print(f"\n{'method':22} {'algorithm':15} {'largest peak over the smallest':>30}")
    for (method, algorithm), seen in peaks.items():
        print(f"{method:22} {algorithm:15} {100 * (max(seen) / min(seen) - 1):+28.1f} %")


def best(arguments: argparse.Namespace, method: str, algorithm: str, count: int) -> tuple[float, float]:
    """Seconds, the least of the repeats, and megabytes, their median."""
    runs = [in_child(arguments, f"{method}:{algorithm}:{count}") for _ in range(arguments.repeats)]
    return min(run["seconds"] for run in runs), statistics.median(run["peak_mb"] for run in runs)


def in_child(arguments: argparse.Namespace, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", str(arguments.model), "--data", str(arguments.data)]
    done = subprocess.run([*command, "--child", what], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(method: str, algorithm: str, model: Path, data: Path, count: int) -> dict[str, float]:
    """Seconds from the loaded libraries to the ranges, and the peak memory of this process."""
    for library in LIBRARIES:
        importlib.import_module(library)
    name, side = input_of(model)
    start = time.perf_counter()
    if method == PEER:
        with_onnxruntime(PEERS[algorithm], model, feeds(data, count, name, side))
    else:
        with_edgeship(algorithm, model, data, count, name, side, refined=method == REFINED)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def with_edgeship(  # noqa: PLR0913, PLR0917 - what, on what, how
    algorithm: str, model: Path, data: Path, count: int, name: str, side: int, *, refined: bool
) -> None:
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.calibration.quantize import REFINEMENTS, calibrate
    from edgeship.calibration.samples.data import Preprocessing, open_samples
    from edgeship.calibration.types import strictest
    from edgeship.targets.onnxruntime import TARGET, open_float

    graph = load_onnx(model)
    preprocessing = Preprocessing(shape=(1, 3, side, side), mean=(127.5,), std=(127.5,), crop=side)
    samples = open_samples(data, input_name=name, preprocessing=preprocessing).take(count, 0)
    refinements = REFINEMENTS if refined else ()
    seen = calibrate(
        graph, samples, strictest([TARGET.rules]), open_float, algorithm=algorithm, refinements=refinements
    )
    for observer in seen.observers.values():
        observer.range()


def with_onnxruntime(algorithm: str, model: Path, images: Iterator[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> Any:
            return next(images, None)

    with tempfile.TemporaryDirectory() as folder:
        augmented = Path(folder) / "augmented.onnx"
        calibrator = create_calibrator(
            model, augmented_model_path=str(augmented), calibrate_method=CalibrationMethod[algorithm]
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()


def input_of(model: Path) -> tuple[str, int]:
    import onnx

    value = onnx.load(model, load_external_data=False).graph.input[0]
    return value.name, value.type.tensor_type.shape.dim[3].dim_value


def feeds(data: Path, count: int, name: str, side: int) -> Iterator[dict[str, np.ndarray]]:
    from PIL import Image

    for path in sorted(data.glob("*.jpg"))[:count]:
        image = np.asarray(Image.open(path).convert("RGB"), np.float32)
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        crop = image[top : top + side, left : left + side] / 127.5 - 1
        yield {name: np.ascontiguousarray(crop.transpose(2, 0, 1)[np.newaxis])}


if __name__ == "__main__":
    main()
