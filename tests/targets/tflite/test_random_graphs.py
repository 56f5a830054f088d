"""Random graphs of shapes, layouts, broadcasting and branches, whose TFLite form computes what ONNX Runtime does.

A graph grows from a list of genes (operator, seed): any list makes a valid model, so that hypothesis can shrink it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeship.calibration.errors import EdgeshipError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.quantize import quantize_model
from edgeship.calibration.writing.qdq import output_steps
from edgeship.targets.base import ConvertOptions, IoLayout
from edgeship.targets.onnxruntime import open_float, open_reference
from edgeship.targets.tflite import TARGET
from edgeship.targets.tflite.session import TFLiteSession

Array = np.ndarray[Any, np.dtype[Any]]
Gene = tuple[str, int]
LARGEST = 4096
"""Elements of a value: larger ones are not grown further."""


class Growing:
    """A model that grows by one operator at a time; `values` are what has been computed, by name."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        shapes = ((1, 4, 8, 8), (2, 6, 5, 7), (1, 1, 6, 4), (2, 5, 6), (3, 8), (1, 4, 1, 9), (2, 3, 4, 4, 2))
        count = int(self.rng.integers(1, 3))
        self.inputs = {f"x{i}": shapes[self.rng.integers(len(shapes))] for i in range(count)}
        self.values: dict[str, tuple[int, ...]] = dict(self.inputs)

    def grow(self, gene: Gene) -> None:
        """Adds the operator of a gene to a value that can take it; nothing where none can."""
        kind, seed = gene
        self.rng = np.random.default_rng(seed)
        takers = [name for name, shape in self.values.items() if FITS[kind](shape)]
        if takers:
            latest = takers[-3:]
            MAKERS[kind](self, latest[self.rng.integers(len(latest))])

    def model(self) -> onnx.ModelProto:
        """What nobody reads is an output; a model of its input alone gets a Relu."""
        read = {name for node in self.nodes for name in node.input}
        outputs = [name for name in self.values if name not in read and name not in self.inputs]
        if not outputs:
            self.add("Relu", ["x0"], self.inputs["x0"])
            outputs = list(self.values)[-1:]
        ports = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, self.values[name]) for name in names]
            for names in (self.inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "random", *ports, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def add(self, op: str, inputs: Sequence[str], *shapes: Sequence[int], **attributes: Any) -> None:
        """Adds a node and its results' shapes."""
        names = [f"v{len(self.values) + place}" for place in range(len(shapes))]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{op}_{len(self.nodes)}", **attributes))
        self.values.update((name, tuple(int(s) for s in shape)) for name, shape in zip(names, shapes, strict=True))

    def constant(self, values: Any) -> str:
        """The name of a new constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weights(self, *shape: int) -> str:
        """The name of a new constant of normal numbers, small where many of them are summed."""
        scale = max(1.0, float(np.sqrt(np.prod(shape[1:]))))
        return self.constant((self.rng.normal(size=shape) / scale).astype(np.float32))

    def pick(self, *choices: Any) -> Any:
        """One of the choices."""
        return choices[self.rng.integers(len(choices))]

    def axis(self, shape: Sequence[int]) -> int:
        """An axis, counted from the front or from behind."""
        axis = int(self.rng.integers(len(shape)))
        return self.pick(axis, axis - len(shape))


def conv(g: Growing, x: str) -> None:
    """A Conv: grouped, strided, dilated or padded."""
    n, c, h, w = g.values[x]
    groups = g.pick(*(k for k in (1, 2, c) if c % k == 0))
    out = groups * g.pick(1, 2, 3)
    kernel, stride, dilation = [[int(g.rng.integers(1, high)) for _ in range(2)] for high in (4, 3, 3)]
    pads = [int(g.rng.integers(0, k)) for k in (*kernel, *kernel)]
    sizes = [
        (size + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilation[i] - 1) // stride[i] + 1
        for i, size in enumerate((h, w))
    ]
    if min(sizes) < 1:
        return
    inputs = [x, g.weights(out, c // groups, *kernel), *g.pick([], [g.weights(out)])]
    g.add("Conv", inputs, (n, out, *sizes), pads=pads, strides=stride, dilations=dilation, group=groups)


def pool(g: Growing, x: str) -> None:
    """A MaxPool or AveragePool."""
    n, c, h, w = g.values[x]
    k = int(g.rng.integers(2, 4))
    pads, stride = [int(g.rng.integers(0, 2)) for _ in range(4)], int(g.rng.integers(1, 3))
    sizes = [(size + pads[i] + pads[i + 2] - k) // stride + 1 for i, size in enumerate((h, w))]
    if min(sizes) < 1:
        return
    more = g.pick({}, {"count_include_pad": 1})
    op = g.pick("MaxPool", "AveragePool")
    options = {"pads": pads, "strides": [stride] * 2, **(more if op == "AveragePool" else {})}
    g.add(op, [x], (n, c, *sizes), kernel_shape=[k, k], **options)


def global_pool(g: Growing, x: str) -> None:
    """A global pooling."""
    g.add(g.pick("GlobalAveragePool", "GlobalMaxPool"), [x], (*g.values[x][:2], 1, 1))


def unary(g: Growing, x: str) -> None:
    """An operator of one value whose results stay small."""
    op = g.pick("Relu", "Sigmoid", "Tanh", "HardSwish", "Abs", "Neg", "LeakyRelu", "Clip", "Identity")
    bounds = [g.constant(np.float32(0)), g.constant(np.float32(g.pick(1, 6)))] if op == "Clip" else []
    g.add(op, [x, *bounds], g.values[x])


def binary(g: Growing, x: str) -> None:
    """An operator with a constant or another value, broadcast either way."""
    shape = g.values[x]
    others = [name for name, other in g.values.items() if _broadcast(shape, other)]
    if g.pick(True, False):
        kept = int(g.rng.integers(0, len(shape) + 1))
        other = g.weights(*(g.pick(1, size) for size in shape[len(shape) - kept :]))
        result = shape
    else:
        other = others[g.rng.integers(len(others))]
        result = np.broadcast_shapes(shape, g.values[other])
    g.add(g.pick("Add", "Sub", "Mul", "Max", "Min"), g.pick([x, other], [other, x]), result)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    if any(1 not in (m, n) and m != n for m, n in zip(a[::-1], b[::-1], strict=False)):
        return False
    return int(np.prod(np.broadcast_shapes(tuple(a), tuple(b)))) <= LARGEST


def concat(g: Growing, x: str) -> None:
    """A Concat with whatever fits."""
    shape, axis = g.values[x], g.axis(g.values[x])
    place = axis % len(shape)
    fitting = [
        name
        for name, other in g.values.items()
        if len(other) == len(shape)
        and all(a == b or i == place for i, (a, b) in enumerate(zip(shape, other, strict=True)))
    ]
    parts = [x, *(fitting[g.rng.integers(len(fitting))] for _ in range(g.pick(1, 2)))]
    total = sum(g.values[name][place] for name in parts)
    g.add("Concat", parts, (*shape[:place], total, *shape[place + 1 :]), axis=axis)


def split(g: Growing, x: str) -> None:
    """A Split in two."""
    shape, axis = g.values[x], g.axis(g.values[x])
    place = axis % len(shape)
    if shape[place] < 2:
        return
    first = int(g.rng.integers(1, shape[place]))
    parts = [(*shape[:place], part, *shape[place + 1 :]) for part in (first, shape[place] - first)]
    g.add("Split", [x, g.constant(np.array([first, shape[place] - first]))], *parts, axis=axis)


def transpose(g: Growing, x: str) -> None:
    """A Transpose."""
    shape = g.values[x]
    perm = [int(axis) for axis in g.rng.permutation(len(shape))]
    g.add("Transpose", [x], [shape[axis] for axis in perm], perm=perm)


def reshape(g: Growing, x: str) -> None:
    """A Reshape that joins neighbours, splits an axis, or lays all out anew."""
    shape = g.values[x]
    place = int(g.rng.integers(len(shape)))
    joined = (*shape[:place], int(np.prod(shape[place : place + 2])), *shape[place + 2 :])
    factor = next((k for k in (2, 3) if shape[place] % k == 0), 1)
    parted = (*shape[:place], shape[place] // factor, factor, *shape[place + 1 :])
    target = g.pick(joined, parted if len(parted) <= 5 else joined, (shape[0], -1), (-1,), joined[::-1])
    sizes = [int(np.prod(shape)) // -int(np.prod(target)) if size == -1 else size for size in target]
    g.add("Reshape", [x, g.constant(np.array(target, np.int64))], sizes)


def axes_of_one(g: Growing, x: str) -> None:
    """An Unsqueeze, or a Squeeze where there is an axis of 1."""
    shape = g.values[x]
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    if ones and g.pick(True, False):
        gone = g.pick(*ones)
        g.add("Squeeze", [x, g.constant(np.array([gone]))], (*shape[:gone], *shape[gone + 1 :]))
    elif len(shape) < 5:
        place = int(g.rng.integers(len(shape) + 1))
        g.add("Unsqueeze", [x, g.constant(np.array([place]))], (*shape[:place], 1, *shape[place:]))


def cut(g: Growing, x: str) -> None:
    """A Slice, with steps of either sign."""
    shape, axis = g.values[x], g.axis(g.values[x])
    size = shape[axis % len(shape)]
    start, step = int(g.rng.integers(size)), g.pick(1, 1, 2, -1)
    end = size if step > 0 else -size - 1
    length = len(range(size)[start::step])
    result = [length if place == axis % len(shape) else n for place, n in enumerate(shape)]
    g.add("Slice", [x, *(g.constant(np.array([v])) for v in (start, end, axis, step))], result)


def pad(g: Growing, x: str) -> None:
    """A Pad of zeros, of another number, or of edges."""
    shape = g.values[x]
    pads = [int(g.rng.integers(0, 2)) for _ in range(2 * len(shape))]
    mode = g.pick("constant", "edge")
    more = [g.constant(np.float32(g.pick(0, 1.5)))] if mode == "constant" else []
    result = [size + a + b for size, a, b in zip(shape, pads[: len(shape)], pads[len(shape) :], strict=True)]
    g.add("Pad", [x, g.constant(np.array(pads)), *more], result, mode=mode)


def reduction(g: Growing, x: str) -> None:
    """A reduction of some axes, kept or dropped."""
    shape = g.values[x]
    axes = sorted({int(axis) for axis in g.rng.integers(len(shape), size=2)})
    keep = g.pick(0, 1) if len(axes) < len(shape) else 1
    result = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
    g.add(g.pick("ReduceMean", "ReduceMax", "ReduceSum"), [x, g.constant(np.array(axes))], result, keepdims=keep)


def softmax(g: Growing, x: str) -> None:
    """A Softmax along any axis."""
    g.add("Softmax", [x], g.values[x], axis=g.axis(g.values[x]))


def product(g: Growing, x: str) -> None:
    """A MatMul with constant columns."""
    shape, columns = g.values[x], int(g.rng.integers(1, 7))
    g.add("MatMul", [x, g.weights(shape[-1], columns)], (*shape[:-1], columns))


def attention(g: Growing, x: str) -> None:
    """A MatMul of a value with its own transpose."""
    shape = g.values[x]
    perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    g.add("Transpose", [x], [shape[axis] for axis in perm], perm=perm)
    g.add("MatMul", [x, list(g.values)[-1]], (*shape[:-1], shape[-2]))


def gather(g: Growing, x: str) -> None:
    """A Gather of constant places, or of one place, whose axis goes."""
    shape, axis = g.values[x], g.axis(g.values[x])
    place = axis % len(shape)
    if g.pick(True, False) and len(shape) > 1:
        one = g.constant(np.array(int(g.rng.integers(-shape[place], shape[place]))))
        g.add("Gather", [x, one], (*shape[:place], *shape[place + 1 :]), axis=axis)
    else:
        places = g.rng.integers(-shape[place], shape[place], size=3)
        g.add("Gather", [x, g.constant(places)], (*shape[:place], 3, *shape[place + 1 :]), axis=axis)


def normalization(g: Growing, x: str) -> None:
    """A BatchNormalization."""
    shape, c = g.values[x], g.values[x][1]
    spread = g.constant(g.rng.uniform(0.5, 2, c).astype(np.float32))
    g.add("BatchNormalization", [x, *(g.weights(c) for _ in range(3)), spread], shape)


def resize(g: Growing, x: str) -> None:
    """A Resize to twice the size."""
    n, c, h, w = g.values[x]
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    options = g.pick(
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    )
    g.add("Resize", [x, "", scales], (n, c, 2 * h, 2 * w), **options)


def image(shape: Sequence[int]) -> bool:
    """Whether a value is an image that may grow."""
    return len(shape) == 4 and int(np.prod(shape)) <= LARGEST


def some(shape: Sequence[int]) -> bool:
    """Whether a value has axes, and may grow."""
    return len(shape) > 0 and int(np.prod(shape)) <= LARGEST


def matrix(shape: Sequence[int]) -> bool:
    """Whether a value is a matrix, or several."""
    return len(shape) >= 2 and int(np.prod(shape)) <= LARGEST


MAKERS: dict[str, Callable[[Growing, str], None]] = {
    function.__name__: function
    for function in (conv, pool, global_pool, normalization, resize, unary, binary, concat, split, transpose, reshape)
} | {
    function.__name__: function for function in (axes_of_one, cut, pad, reduction, softmax, product, attention, gather)
}
FITS: dict[str, Callable[[Sequence[int]], bool]] = {
    **dict.fromkeys(MAKERS, some),
    **dict.fromkeys(("conv", "pool", "global_pool", "normalization", "resize"), image),
    **dict.fromkeys(("product", "attention"), matrix),
}


def grown(seed: int, genes: Sequence[Gene]) -> onnx.ModelProto:
    """The model of a list of genes."""
    growing = Growing(seed)
    for gene in genes:
        growing.grow(gene)
    return growing.model()


SEEDS = st.integers(0, 2**32 - 1)
GENES = st.lists(st.tuples(st.sampled_from(sorted(MAKERS)), SEEDS), min_size=1, max_size=9)


def expected(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime computes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize("io_layout", [None, "nchw"])
@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, genes=GENES)
def test_random_graphs_compute_what_onnx_runtime_does(seed: int, genes: list[Gene], io_layout: IoLayout | None) -> None:
    model = grown(seed, genes)
    rng = np.random.default_rng(seed)
    feeds = {
        value.name: rng.normal(size=[d.dim_value for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(TARGET.convert(ir.from_proto(model), ConvertOptions(io_layout=io_layout)))
        seen = TFLiteSession(path).run(feeds)
    for name, values in expected(model, feeds).items():
        np.testing.assert_allclose(seen[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


@dataclass(frozen=True)
class Sample:
    """What the quantizer sees of the inputs."""

    name: str
    feeds: dict[str, Array]


def quantized(model: onnx.ModelProto) -> ir.Model:
    """The QDQ form of a float model, calibrated on noise; the example is left when nothing in it can be int8."""
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    samples = [
        Sample(str(i), {n: np.random.default_rng(i).normal(size=s).astype(np.float32) for n, s in shapes.items()})
        for i in range(3)
    ]
    try:
        _, qdq = quantize_model(ir.from_proto(model), samples, TARGET.rules, open_float, refinements=())
    except EdgeshipError:
        reject()
    return qdq


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=SEEDS, genes=st.lists(st.tuples(st.sampled_from(sorted(MAKERS)), SEEDS), min_size=1, max_size=3))
def test_random_int8_graphs_are_within_four_steps_of_their_reference(seed: int, genes: list[Gene]) -> None:
    qdq = quantized(grown(seed, genes))
    steps = output_steps(qdq)
    rng = np.random.default_rng(seed)
    feeds = {v.name: rng.normal(size=tuple(v.shape)).astype(np.float32) for v in qdq.graph.inputs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(TARGET.convert(qdq, ConvertOptions()))
        seen = TFLiteSession(path).run(feeds)
    for name, values in open_reference(to_bytes(qdq)).run(feeds).items():
        # An output behind a float operator has no step of its own: a twentieth of its span stands for it.
        most = 4 * steps[name] if steps[name] else 0.05 * max(1e-3, float(np.abs(values).max(initial=0.0)))
        assert np.abs(seen[name] - values).max(initial=0.0) <= most * 1.001, name
