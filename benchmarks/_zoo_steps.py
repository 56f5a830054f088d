"""The steps a zoo model goes through, each a function of files that runs in a process of its own.

simplify and quantize are the product's own; convert is measured from the ONNX file to the artifact's bytes, with the
memory it takes beyond what the process had before; compare runs the artifact's real runtime against ONNX Runtime.
"""

from __future__ import annotations

import collections
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _zoo_models as zoo
import numpy as np
import onnx_ir as ir

ALGORITHM = "minmax"
LAYER_IMAGES = 4
PIXEL_STEP = 0.03
"""A little more than one 8-bit step of an image after ImageNet's preprocessing."""


@dataclass(frozen=True)
class Trial:
    """What a model is tried with: its name, the target, and images to calibrate on and, after those, to compare on."""

    name: str
    target: str
    folder: Path
    calibration: int
    images: int

    def calibration_images(self) -> Any:
        """float32 (count, 3, H, W), none of them used for BatchNorm's statistics."""
        return zoo.images(self.folder, self.name, self.calibration, skip=zoo.STATISTICS_IMAGES)

    def test_images(self) -> Any:
        """float32 (count, 3, H, W), none of them used before."""
        return zoo.images(self.folder, self.name, self.images, skip=zoo.STATISTICS_IMAGES + self.calibration)


def simplify(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """Writes the model as the pipeline's stages leave it: simplified, and with what its input's pixels become among its
    metadata; gives the operators before and after.
    """
    from edgeship.calibration.graph.onnx_file import to_bytes
    from edgeship.pipeline.simplification.simplifier import simplify_model

    result = simplify_model(source.read_bytes(), feeds=[{"input": trial.calibration_images()[:1]}])
    result.model.metadata_props.update(zoo.preprocessing(trial.name).to_metadata())
    _write(path, to_bytes(result.model))
    return {"before": dict(result.before), "after": dict(result.after), "notes": list(result.notes)}


def quantize(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """Writes the QDQ model under the target's rules, calibrated on images; gives what stays float and why."""
    from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
    from edgeship.calibration.observing.collect import collect
    from edgeship.calibration.planning.plan import make_plan, tensors_to_observe
    from edgeship.calibration.samples.data import Sample
    from edgeship.calibration.writing.exact import exact
    from edgeship.calibration.writing.qdq import apply_plan
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_float

    model, rules = load_onnx(source), load(trial.target).rules
    samples = [Sample(str(index), {"input": image[None]}) for index, image in enumerate(trial.calibration_images())]
    observers = collect(model, samples, tensors_to_observe(model, rules), ALGORITHM, open_float)
    plan = make_plan(model, rules, observers)
    _write(path, to_bytes(exact(apply_plan(model, plan))))
    return {"int8_nodes": len(plan.int8_nodes), "stays_float": dict(plan.stays_float)}


def convert(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """Writes the artifact; gives seconds, peak memory and sizes in bytes, operators and the integer share."""
    from edgeship.targets.base import ConvertOptions, load

    target = load(trial.target)
    begin = time.perf_counter()
    target.convert(_tiny_model(), ConvertOptions())
    first = time.perf_counter() - begin
    before = _memory("VmRSS")
    _reset_peak()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    _write(path, target.convert(ir.load(source), ConvertOptions()))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = _memory("VmHWM") - before
    weights, needed = _weight_bytes(source)
    size = path.stat().st_size
    share = target.integer_share(path)
    return {
        "first_seconds": first,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak,
        "peak_ratio": peak / source.stat().st_size,
        "bytes": size,
        "weight_bytes": weights,
        "needed_bytes": needed,
        "overhead": size / needed - 1,
        "over_weights": size / weights - 1,
        "operators": _operators(path) if path.suffix == ".tflite" else {},
        "onnx_transposes": sum(node.op_type == "Transpose" for node in ir.load(source).graph),
        "integer_share": share.share,
        "float_layers": list(share.float_layers),
    }


def compare_float(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """The largest difference from ONNX Runtime over the images, relative to the largest absolute output."""
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_reference

    reference, session = open_reference(source), load(trial.target).open(path)
    worst = largest = 0.0
    for image in trial.test_images():
        want, got = reference.run({"input": image[None]}), session.run({"input": image[None]})
        if set(want) != set(got):
            raise ValueError(f"the artifact has the outputs {sorted(got)}; the model has {sorted(want)}")
        for output, values in want.items():
            if got[output].shape != values.shape or not np.isfinite(got[output]).all():
                raise ValueError(f"output {output!r}: shape {got[output].shape} (want {values.shape}), or not finite")
            worst = max(worst, float(np.abs(got[output] - values).max()))
            largest = max(largest, float(np.abs(values).max()))
    return {"relative": worst / largest, "largest": largest, "images": trial.images}


def compare_int8(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """The artifact against the QDQ model in float arithmetic, in steps of the output, over the images."""
    from edgeship.calibration.graph.onnx_file import load_onnx, to_bytes
    from edgeship.calibration.writing.qdq import output_steps
    from edgeship.pipeline.compare import Comparison
    from edgeship.targets.base import load
    from edgeship.targets.onnxruntime import open_reference

    target, model = load(trial.target), load_onnx(source)
    reference, session = open_reference(to_bytes(target.reference(model))), target.open(path)
    comparison = Comparison(output_steps(model))
    own = 0.0
    for count, image in enumerate(trial.test_images()):
        expected = reference.run({"input": image[None]})
        comparison.update(expected, session.run({"input": image[None]}))
        if count < LAYER_IMAGES:
            nudged = Comparison(output_steps(model))
            nudged.update(expected, reference.run({"input": _nudged(image)[None]}))
            own = max(own, *(d.mean_steps for d in nudged.differences().values()))
    differences = list(comparison.differences().values())
    return {
        "mean_steps": max(d.mean_steps for d in differences),
        "max_steps": max(d.max_steps for d in differences),
        "sqnr_db": min(d.sqnr_db for d in differences),
        "step_kinds": sorted({d.step_kind for d in differences}),
        "own_steps": own,
        "agreement": comparison.agreement,
        "images": trial.images,
    }


def _nudged(image: Any) -> Any:
    """The image with one channel of its middle pixel moved by a step or two.

    What the reference makes of so little is the noise that any two correct runtimes end in: one rounding that falls
    the other way, as float sums of another order give now and then, does no less.
    """
    changed = image.copy()
    changed[0, image.shape[1] // 2, image.shape[2] // 2] += PIXEL_STEP
    return changed


def compare_layers(source: Path, path: Path, trial: Trial) -> dict[str, Any]:
    """Every layer of the artifact against the QDQ model's on the same inputs, in steps, over the first images."""
    from _layer_check import layer_differences

    images = [image[None] for image in trial.test_images()[:LAYER_IMAGES]]
    rows, unseen = layer_differences(source, path, images, path.parent)
    kinds: dict[str, list[float]] = {}
    for row in rows:
        entry = kinds.setdefault(row.operator, [0, 0, 0.0, 0.0, 0.0])
        entry[:2] = entry[0] + 1, entry[1] + row.elements
        entry[2:4] = entry[2] + row.signed_steps * row.elements, entry[3] + row.off * row.elements
        entry[4] = max(entry[4], abs(row.signed_steps))
    return {
        "operators": kinds,
        "max_steps": max((row.max_steps for row in rows), default=float("nan")),
        "layers": len(rows),
        "not_found": unseen,
        "worst": [[row.name, row.operator, row.max_steps, row.mean_steps] for row in rows[:20]],
        "images": len(images),
    }


def _tiny_model() -> ir.Model:
    """One Relu, to have the libraries loaded that every conversion needs."""
    import onnx

    make = onnx.helper.make_tensor_value_info
    ports = [make(name, onnx.TensorProto.FLOAT, (1, 3, 4, 4)) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], "relu")], "tiny", ports[:1], ports[1:])
    opset = onnx.helper.make_opsetid("", zoo.OPSET)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _memory(field: str) -> int:
    """Bytes of this process, as Linux counts them under `field` (VmRSS: now, VmHWM: at most)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM to what is in memory now


ZERO_POINT_BYTES = 8
"""TFLite's zero points are int64."""


def _weight_bytes(source: Path) -> tuple[int, int]:
    """Bytes of the model's constants, equal ones once; and with what makes int8 weights per channel ones.

    A TFLite file needs a scale for each channel of weights and of biases, and as many zero points: LiteRT refuses a
    file with fewer zero points ("Must have same number"), and runs a convolution whose bias has no scales outside
    XNNPACK, at half the speed. Equal vectors count once. Scales of activations, shapes, names and operators are
    overhead.
    """
    import onnx

    graph = onnx.load(source).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    used, scales, channels = set(), set(), set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            used.update(node.input)
            continue
        used.add(node.input[0])
        if node.input[0] in constants and constants[node.input[1]].size > 1:
            scales.add(node.input[1])
            channels.add(constants[node.input[1]].size)

    def size(names: set[str]) -> int:
        contents = (constants[name].tobytes() for name in names & set(constants))
        return sum({hashlib.sha256(content).digest(): len(content) for content in contents}.values())

    return max(1, size(used)), max(1, size(used) + size(scales) + ZERO_POINT_BYTES * sum(channels))


def _operators(path: Path) -> dict[str, int]:
    """How many operators of each kind a TFLite file has."""
    from ai_edge_litert import schema_py_generated as schema

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    codes = [
        max(model.OperatorCodes(i).BuiltinCode(), model.OperatorCodes(i).DeprecatedBuiltinCode())
        for i in range(model.OperatorCodesLength())
    ]
    counts: collections.Counter[str] = collections.Counter()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        counts.update(names[codes[graph.Operators(i).OpcodeIndex()]] for i in range(graph.OperatorsLength()))
    return dict(counts.most_common())
