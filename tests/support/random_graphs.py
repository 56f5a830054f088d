"""Random models: what a list of genes (operator, seed) grows into, one operator at a time.

Any list makes a valid model, so that hypothesis can shrink it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from growing import LARGEST, Growing, Maker, image, matrix, some
from random_operators import MORE

Gene = tuple[str, int]


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


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        conv, pool, global_pool, normalization, resize, unary, binary, concat, split, transpose, reshape, axes_of_one,
        cut, pad, reduction, softmax, product, attention, gather,
    )
} | {name: maker for name, (maker, _) in MORE.items()}  # fmt: skip
FITS: dict[str, Callable[[Sequence[int]], bool]] = {
    **dict.fromkeys(MAKERS, some),
    **dict.fromkeys(("conv", "pool", "global_pool", "normalization", "resize"), image),
    **dict.fromkeys(("product", "attention"), matrix),
    **{name: fits for name, (_, fits) in MORE.items()},
}


def grown(seed: int, genes: Sequence[Gene]) -> onnx.ModelProto:
    """The model of a list of genes."""
    growing = Growing(seed)
    for kind, chance in genes:
        growing.grow(MAKERS[kind], FITS[kind], chance)
    return growing.model()
