"""Runs an ONNX Runtime artifact as on an x86 CPU without VNNI and compares it with its exact reference.

Such CPUs add two int8 products in 16 bits and clip. The host may have VNNI and hide it, so the artifact runs where
AVX2 is offered and nothing newer: with `cpuid` masked (masked_cpu.py: native speed; Linux on x86-64 with gcc and
objdump), or under Valgrind or QEMU's user mode (Debian: apt-get install valgrind qemu-user; some 50 times slower).

    python benchmarks/no_vnni.py ARTIFACT.onnx --data SAMPLES [--samples 8] [--emulator masked] [--layers] [--json]

SAMPLES: an .npz (keys = input names), or images when the artifact's metadata holds its preprocessing. The reference is
the same file with graph optimisations off, run natively. Exit code 0: within 2 steps (float outputs: the same
arg-max); 3: it clips.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from masked_cpu import masked

MASKED = "masked"
EMULATORS = {
    "valgrind": ["valgrind", "-q", "--tool=none"],
    "qemu": ["qemu-x86_64", "-cpu", "max,avx512f=off,avx512vnni=off,avx-vnni=off"],
}
ALLOWED_STEPS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", help="an .npz, or images when the artifact knows its preprocessing")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument(
        "--emulator", choices=(MASKED, *EMULATORS, "none"), help="default: the first that works here; none: natively"
    )
    parser.add_argument(
        "--layers", action="store_true", help="compare every quantized tensor and name the first that is off"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, type=Path, metavar=("FEEDS", "RESULTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return run_worker(arguments.artifact, *arguments.worker)
    if not arguments.data:
        parser.error("--data is needed")
    report = compare(arguments)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0 if report["clips"] is False else 3


def run_worker(artifact: Path, feeds: Path, results: Path) -> int:
    """Runs in the emulated process: plain ONNX Runtime and NumPy, nothing else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(artifact), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    with np.load(feeds, allow_pickle=False) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    count = 1 + max(int(key.split(":")[0]) for key in found)
    outputs = {}
    for index in range(count):
        feed = {key.split(":", 1)[1]: values for key, values in found.items() if key.startswith(f"{index}:")}
        outputs |= {f"{index}:{name}": values for name, values in zip(names, session.run(None, feed), strict=True)}
    np.savez(results, **outputs)
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.calibration.samples.data import Preprocessing, open_samples
    from edgeship.targets.onnxruntime import open_reference

    chosen = emulator(arguments.emulator)
    model = load_onnx(arguments.artifact)
    names = [str(value.name) for value in model.graph.inputs]
    preprocessing = Preprocessing.from_metadata(model.metadata_props)
    samples = open_samples(
        arguments.data,
        input_name=names[0],
        preprocessing=preprocessing,
        shapes={
            str(value.name): [-1 if not isinstance(d, int) else d for d in value.shape or ()]
            for value in model.graph.inputs
        },
    ).take(arguments.samples)
    tensors = quantized_tensors(model) if arguments.layers else []
    for value in tensors:
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    feeds = [dict(sample.feeds) for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "probe.onnx"
        ir.save(model, place)
        reference = open_reference(place)
        expected = [reference.run(feed) for feed in feeds]
        seen = emulated(chosen, place, feeds, Path(folder))
    scales = output_scales(model)
    rows = [difference(name, scales.get(name), expected, seen) for name in expected[0]]
    worst = [row for row in rows if row["max_steps"] is not None and row["max_steps"] > ALLOWED_STEPS]
    order = {str(value.name): place for place, value in enumerate(tensors)}
    first = next(iter(sorted((row["tensor"] for row in worst if row["tensor"] in order), key=order.__getitem__)), None)
    outputs = [row for row in rows if row["tensor"] not in order]
    return {
        "artifact": str(arguments.artifact),
        "emulator": chosen,
        "samples": len(feeds),
        "clips": bool(worst) or any(row["agreement"] < 1 for row in outputs if row["max_steps"] is None),
        "first": producer_name(model, first),
        "outputs": outputs,
        "layers": [row for row in rows if row["tensor"] in order],
    }


def emulator(name: str | None) -> str:
    if name in {"none", MASKED}:
        return str(name)
    if name is None and sys.platform == "linux" and os.uname().machine == "x86_64":
        if shutil.which("gcc") and shutil.which("objdump"):
            return MASKED
    for candidate in [name] if name else list(EMULATORS):
        if shutil.which(EMULATORS[candidate][0]):
            return candidate
    sys.exit(
        "nothing hides this CPU's VNNI: install gcc, valgrind or qemu-user (Debian: apt-get), or give --emulator none"
    )


def emulated(chosen: str, model: Path, feeds: list[dict[str, np.ndarray]], folder: Path) -> list[dict[str, np.ndarray]]:
    command = EMULATORS.get(chosen, [])
    environment = masked(folder) if chosen == MASKED else dict(os.environ)
    packed, results = folder / "feeds.npz", folder / "results.npz"
    np.savez(packed, **{f"{index}:{name}": values for index, feed in enumerate(feeds) for name, values in feed.items()})
    work = [sys.executable, str(Path(__file__).resolve()), str(model), "--worker", str(packed), str(results)]
    done = subprocess.run([*command, *work], env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not results.is_file():
        sys.exit(f"the emulated run failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    with np.load(results, allow_pickle=False) as arrays:
        found = {key: arrays[key] for key in arrays.files}
    return [
        {key.split(":", 1)[1]: values for key, values in found.items() if key.startswith(f"{index}:")}
        for index in range(len(feeds))
    ]


def quantized_tensors(model: ir.Model) -> list[ir.Value]:
    return [node.outputs[0] for node in model.graph if node.op_type == "QuantizeLinear"]


def output_scales(model: ir.Model) -> dict[str, float]:
    """The size of one step of each output: its scale, or 1 for integers."""
    scales = {}
    for value in model.graph.outputs:
        node = value.producer()
        if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8):
            scales[str(value.name)] = 1.0
        elif node is not None and node.op_type == "DequantizeLinear" and node.inputs[1] is not None:
            tensor = ir.convenience.get_const_tensor(node.inputs[1])
            if tensor is not None and tensor.size == 1:
                scales[str(value.name)] = float(tensor.numpy().reshape(()))
    return scales


def difference(
    name: str, scale: float | None, expected: list[dict[str, np.ndarray]], seen: list[dict[str, np.ndarray]]
) -> dict:
    pairs = [
        (np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)) for a, b in zip(expected, seen, strict=True)
    ]
    steps = np.concatenate([np.abs(a - b).ravel() for a, b in pairs]) / (scale or 1.0)
    same = [int(np.argmax(a)) == int(np.argmax(b)) or a.max() == a.ravel()[np.argmax(b)] for a, b in pairs]
    return {
        "tensor": name,
        "max_steps": float(np.rint(steps.max() * 100) / 100) if scale else None,
        "mean_steps": float(steps.mean()) if scale else None,
        "changed": float((np.rint(steps) > 0).mean()),
        "agreement": float(np.mean(same)),
    }


def producer_name(model: ir.Model, tensor: str | None) -> str | None:
    """The layer that computed a quantized tensor: the node before its QuantizeLinear."""
    for node in model.graph:
        if tensor is not None and node.op_type == "QuantizeLinear" and node.outputs[0].name == tensor:
            source = node.inputs[0].producer() if node.inputs[0] is not None else None
            return tensor if source is None else f"{source.op_type} {source.name}"
    return None


def print_report(report: dict) -> None:
    print(f"{report['artifact']} under {report['emulator']}, {report['samples']} samples, against its reference")
    for row in (*report["layers"], *report["outputs"]):
        steps = (
            "float" if row["max_steps"] is None else f"max {row['max_steps']:.2f} steps, mean {row['mean_steps']:.4f}"
        )
        print(f"  {row['tensor']}: {steps}, {row['changed']:.2%} changed, arg-max equal {row['agreement']:.1%}")
    print(
        f"it clips; the first layer that is off: {report['first'] or 'see --layers'}"
        if report["clips"]
        else "it does not clip"
    )


if __name__ == "__main__":
    sys.exit(main())
