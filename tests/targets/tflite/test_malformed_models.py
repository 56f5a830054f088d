"""Models that break ONNX's rules, made of valid ones by a seeded fuzzer: an EdgeshipError every time, never a crash.

A child process converts them (run this file with a seed and a count), since a native crash would end this one. What is
converted in spite of the damage, and runs in ONNX Runtime too, must compute the same.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgeship.calibration.errors import EdgeshipError
from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.base import ConvertOptions
from edgeship.targets.tflite import TARGET

Array = np.ndarray[Any, np.dtype[Any]]
COUNT = 150
SECONDS = 240
MEMORY = 8 << 30
INTEGERS = (0, 1, -1, 2, 3, 7, -7, 255, 100_000, 2**31, -(2**31), 2**62)


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_models_are_refused_or_converted_right(seed: int) -> None:
    command = [sys.executable, "-W", "ignore", __file__, str(seed), str(COUNT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert "refused" in result.stdout
    assert "agreed" in result.stdout


def test_constants_too_large_to_compute_are_refused_before_they_are_computed(model_of: Any) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["large"], name="enormous"),
        helper.make_node("Add", ["x", "large"], ["y"]),
    ]
    model = model_of(nodes, {"x": (1, 1)}, ["y"], {"sizes": np.array([2**20, 2**20])})
    findings = TARGET.check(ir.from_proto(model))
    assert any("enormous" in finding.where for finding in findings)


def test_a_declared_shape_that_is_not_what_follows_is_refused(model_of: Any) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"], name="lying")], {"x": (1, 4)}, ["y"])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    (finding,) = TARGET.check(ir.from_proto(model))
    assert finding.where == "Relu 'lying'"
    assert "[1, 5]" in str(finding)


def test_a_bias_that_is_empty_is_refused(model_of: Any) -> None:
    node = helper.make_node("LayerNormalization", ["x", "scale", "bias"], ["y"], name="rows")
    constants = {"scale": np.ones(4, np.float32), "bias": np.zeros(0, np.float32)}
    (finding,) = TARGET.check(ir.from_proto(model_of([node], {"x": (2, 4)}, ["y"], constants)))
    assert finding.where == "LayerNormalization 'rows'"


# The fuzzer -----------------------------------------------------------------------------------------------------------


def damage(model: onnx.ModelProto, chance: random.Random) -> None:
    """Breaks one thing of the model, or of one of its nodes."""
    breaks: list[Callable[[], None]] = [
        *(lambda kind=kind: _damage_node(model.graph, kind, chance) for kind in range(6)),
        lambda: _damage_constants(model.graph, chance),
        lambda: _damage_input(chance.choice(model.graph.input).type.tensor_type, chance),
        lambda: setattr(model.opset_import[0], "version", chance.choice([1, 5, 7, 9, 11, 13, 17, 21, 26, 99])),
    ]
    chance.choice(breaks)()
    if chance.random() < 0.5:
        del model.graph.value_info[:]


def _damage_node(graph: onnx.GraphProto, kind: int, chance: random.Random) -> None:
    node = chance.choice(graph.node)
    values = [name for n in graph.node for name in n.output] + [value.name for value in graph.input]
    names = [*values, *(tensor.name for tensor in graph.initializer), "", "nowhere"]
    if kind == 0:
        node.op_type = chance.choice([s.name for s in onnx.defs.get_all_schemas() if not s.domain])
    elif kind in (1, 2) and not node.input:
        node.input.append(chance.choice(names))
    elif kind == 1:
        node.input[chance.randrange(len(node.input))] = chance.choice(names)
    elif kind == 2:
        del node.input[chance.randrange(len(node.input))]
    elif kind == 3:
        node.input.append(chance.choice(names))
    elif kind == 4:
        node.output[0] = chance.choice(names)
    elif node.attribute:
        _damage_attribute(node, chance)


def _damage_input(kind: onnx.TypeProto.Tensor, chance: random.Random) -> None:
    if chance.random() < 0.5 or not kind.shape.dim:
        kind.elem_type = chance.randrange(24)
    else:
        chance.choice(kind.shape.dim).dim_value = chance.choice(INTEGERS)


def _damage_constants(graph: onnx.GraphProto, chance: random.Random) -> None:
    if graph.initializer and chance.random() < 0.8:
        _damage_constant(chance.choice(graph.initializer), chance)
    elif graph.initializer:
        graph.initializer.remove(chance.choice(graph.initializer))


def _damage_attribute(node: onnx.NodeProto, chance: random.Random) -> None:
    attribute = chance.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = chance.choice(INTEGERS)
    elif attribute.ints:
        attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(INTEGERS)
    else:
        node.attribute.remove(attribute)


def _damage_constant(tensor: onnx.TensorProto, chance: random.Random) -> None:
    values = numpy_helper.to_array(tensor).copy()
    kind = chance.randrange(4)
    if kind == 0:
        values = values.reshape(-1)
    elif kind == 1:
        values = values.astype(chance.choice([np.int64, np.float64, np.int8, np.bool_, np.float16]))
    elif kind == 2:
        values = values[:0] if values.ndim else values
    elif values.size:
        other = INTEGERS if values.dtype.kind == "i" else (np.nan, np.inf, -1e30, 0.0)
        values.reshape(-1)[chance.randrange(values.size)] = chance.choice(other)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def scrambled(content: bytes, chance: random.Random) -> bytes:
    """The bytes with some of them changed."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def verdict(content: bytes, path: Path, rng: np.random.Generator) -> str:
    """What became of a model: refused, agreed, not run. Raises AssertionError where the results differ."""
    path.write_bytes(content)
    try:
        artifact = TARGET.convert(load_onnx(path), ConvertOptions())
    except EdgeshipError:
        return "refused"
    ran = _in_onnx_runtime(content, rng)
    if ran is None:
        return "not run"
    from edgeship.targets.tflite.session import TFLiteSession

    feeds, expected = ran
    path.with_suffix(".tflite").write_bytes(artifact)
    seen = TFLiteSession(path.with_suffix(".tflite")).run(feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
    return "agreed"


def _in_onnx_runtime(content: bytes, rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Feeds and what ONNX Runtime makes of them; None where it refuses the model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
        feeds = {i.name: rng.normal(size=i.shape).astype(types.get(i.type, np.int64)) for i in session.get_inputs()}
        if not all(feed.size for feed in feeds.values()):
            return None  # a size of 0 is read as one left open, and XNNPACK runs nothing empty
        names = [output.name for output in session.get_outputs()]
        return feeds, dict(zip(names, session.run(None, feeds), strict=True))
    except Exception:  # a native library's verdict on a broken model, of many types
        return None


def test_an_attribute_that_the_standard_demands_is_missed(model_of: Callable[..., onnx.ModelProto]) -> None:
    model = model_of([helper.make_node("Concat", ["x", "x"], ["y"], name="joined", axis=1)], {"x": (1, 4)}, ["y"])
    del model.graph.node[0].attribute[:]
    (finding,) = TARGET.check(ir.from_proto(model))
    assert finding.where == "Concat 'joined'"
    assert "axis" in finding.seen


def main(arguments: Sequence[str]) -> int:
    """Tries damaged models of one seed; prints how often each verdict fell, or the first failure."""
    import resource

    sys.path.append(str(Path(__file__).parents[2] / "support"))
    from random_graphs import MAKERS, grown

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seed, count = (int(argument) for argument in arguments)
    verdicts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            genes = [(chance.choice(sorted(MAKERS)), chance.getrandbits(32)) for _ in range(chance.randint(2, 10))]
            model = grown(chance.getrandbits(32), genes)
            for _ in range(chance.randint(1, 2)):
                damage(model, chance)
            content = model.SerializeToString()
            content = scrambled(content, chance) if chance.random() < 0.2 else content
            try:
                verdicts[verdict(content, Path(folder) / "model.onnx", np.random.default_rng(number))] += 1
            except Exception as error:  # whatever is raised that is no EdgeshipError is the failure
                sys.stdout.write(f"model {number} of seed {seed}: {type(error).__name__}: {error}\n")
                return 1
    sys.stdout.write(f"{dict(verdicts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
