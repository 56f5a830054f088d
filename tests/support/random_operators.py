"""Operators of random models beyond the usual ones of `random_graphs`.

Normalizations have a large epsilon: a small one makes differences of rows that are all but equal large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from growing import Growing, Maker, image, matrix, some

LARGE_EPSILON = 0.1


def conv_transpose(g: Growing, x: str) -> None:
    """A ConvTranspose: grouped, strided, padded."""
    n, c, h, w = g.values[x]
    groups = g.pick(*(k for k in (1, 2, c) if c % k == 0))
    out = g.pick(1, 2, 3)
    kernel, stride = ([int(g.rng.integers(1, high)) for _ in range(2)] for high in (4, 4))
    pads = [int(g.rng.integers(0, k)) for k in (*kernel, *kernel)]
    more = [int(g.rng.integers(0, s)) for s in stride]
    sizes = [(size - 1) * stride[i] + kernel[i] + more[i] - pads[i] - pads[i + 2] for i, size in enumerate((h, w))]
    if min(sizes) < 1:
        return
    inputs = [x, g.weights(c, out, *kernel), *g.pick([], [g.weights(out * groups)])]
    options = {"pads": pads, "strides": stride, "output_padding": more, "group": groups}
    g.add("ConvTranspose", inputs, (n, out * groups, *sizes), **options)


def conv_other(g: Growing, x: str) -> None:
    """A Conv in one dimension or in three."""
    n, c, *space = g.values[x]
    kernel = [int(g.rng.integers(1, min(3, size) + 1)) for size in space]
    stride = [int(g.rng.integers(1, 3)) for _ in space]
    pads = [int(g.rng.integers(0, k)) for k in (*kernel, *kernel)]
    groups = g.pick(*(k for k in (1, c) if c % k == 0))
    out = groups * g.pick(1, 2)
    sizes = [(size + pads[i] + pads[i + len(space)] - kernel[i]) // stride[i] + 1 for i, size in enumerate(space)]
    weights = g.weights(out, c // groups, *kernel)
    g.add("Conv", [x, weights], (n, out, *sizes), pads=pads, strides=stride, group=groups)


def odd_pool(g: Growing, x: str) -> None:
    """A pooling that rounds up, is dilated, or takes the root of a sum of squares."""
    n, c, h, w = g.values[x]
    op, k, stride = g.pick("MaxPool", "AveragePool", "LpPool"), 2, int(g.rng.integers(1, 3))
    dilation = 1 if op == "LpPool" else int(g.rng.integers(1, 3))
    spans = [size - (k - 1) * dilation - 1 for size in (h, w)]
    ceil = 0 if op == "LpPool" else g.pick(0, 1)
    if min(spans) < 0:
        return
    sizes = [-(-span // stride) + 1 if ceil else span // stride + 1 for span in spans]
    sizes = [size - (ceil and (size - 1) * stride >= side) for size, side in zip(sizes, (h, w), strict=True)]
    options = {} if op == "LpPool" else {"ceil_mode": ceil, "dilations": [dilation] * 2}
    g.add(op, [x], (n, c, *sizes), kernel_shape=[k, k], strides=[stride] * 2, **options)


def curve(g: Growing, x: str) -> None:
    """An activation or another function whose results stay small."""
    op = g.pick("Elu", "Selu", "Celu", "Softplus", "Softsign", "Mish", "Gelu", "Erf", "HardSigmoid", "Sin", "Floor")
    g.add(op, [x], g.values[x])


def slopes(g: Growing, x: str) -> None:
    """A PRelu of each channel."""
    shape = g.values[x]
    g.add("PRelu", [x, g.weights(shape[1], *[1] * (len(shape) - 2))], shape)


def row_normalization(g: Growing, x: str) -> None:
    """A LayerNormalization from some axis on."""
    shape, axis = g.values[x], g.axis(g.values[x])
    parts = [g.weights(*shape[axis % len(shape) :]) for _ in range(g.pick(1, 2))]
    g.add("LayerNormalization", [x, *parts], shape, axis=axis, epsilon=LARGE_EPSILON)


def instance_normalization(g: Growing, x: str) -> None:
    """An InstanceNormalization."""
    shape = g.values[x]
    inputs = [x, *(g.weights(shape[1]) for _ in range(2))]
    g.add("InstanceNormalization", inputs, shape, epsilon=LARGE_EPSILON)


def choice(g: Growing, x: str) -> None:
    """A Where by a constant, or by which of two values is larger."""
    shape = g.values[x]
    other = g.weights(*(g.pick(1, size) for size in shape))
    if g.pick(True, False):
        condition = g.constant(g.rng.random([g.pick(1, size) for size in shape]) < 0.5)
    else:
        condition = g.hidden(g.pick("Greater", "Less"), [x, other])
    g.add("Where", [condition, *g.pick([x, other], [other, x])], shape)


def tile(g: Growing, x: str) -> None:
    """A Tile, or an Expand of an axis of one."""
    shape = g.values[x]
    if 1 in shape and g.pick(True, False):
        wider = [g.pick(1, 3) if size == 1 else size for size in shape]
        lead = g.pick([], [2]) if len(shape) < 5 else []
        g.add("Expand", [x, g.constant(np.array([*lead, *wider]))], (*lead, *wider))
        return
    repeats = [int(g.rng.integers(1, 3)) for _ in shape]
    g.add("Tile", [x, g.constant(np.array(repeats))], [size * r for size, r in zip(shape, repeats, strict=True)])


def blocks(g: Growing, x: str) -> None:
    """A DepthToSpace or SpaceToDepth."""
    n, c, h, w = g.values[x]
    if c % 4 == 0 and g.pick(True, False):
        g.add("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=g.pick("DCR", "CRD"))
    elif h % 2 == w % 2 == 0:
        g.add("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2)


def top(g: Growing, x: str) -> None:
    """The values of a TopK."""
    shape, axis = g.values[x], g.axis(g.values[x])
    place = axis % len(shape)
    count = int(g.rng.integers(1, shape[place] + 1))
    result = [count if i == place else size for i, size in enumerate(shape)]
    g.add("TopK", [x, g.constant(np.array([count]))], result, unread=1, axis=axis, largest=g.pick(0, 1))


def running_sum(g: Growing, x: str) -> None:
    """A CumSum."""
    shape, axis = g.values[x], g.axis(g.values[x])
    options = {"exclusive": g.pick(0, 1), "reverse": g.pick(0, 1)}
    g.add("CumSum", [x, g.constant(np.array(axis))], shape, **options)


def scattered(g: Growing, x: str) -> None:
    """A ScatterND of rows, a GatherND of them, or a GatherElements."""
    shape = g.values[x]
    rows = g.rng.permutation(shape[0])[: g.pick(1, 2)][:, None]
    kind = g.pick("ScatterND", "GatherND", "GatherElements")
    if kind == "ScatterND":
        g.add(kind, [x, g.constant(rows), g.weights(len(rows), *shape[1:])], shape)
    elif kind == "GatherND":
        g.add(kind, [x, g.constant(rows)], (len(rows), *shape[1:]))
    else:
        axis = g.axis(shape)
        places = g.rng.integers(-shape[axis], shape[axis], size=[max(1, size - 1) for size in shape])
        g.add(kind, [x, g.constant(places)], places.shape, axis=axis)


def gemm(g: Growing, x: str) -> None:
    """A Gemm, turned either way, of a matrix."""
    rows, inner = g.values[x] if (left := g.pick(0, 1)) == 0 else g.values[x][::-1]
    columns, right = int(g.rng.integers(1, 6)), g.pick(0, 1)
    weights = g.weights(columns, inner) if right else g.weights(inner, columns)
    c = g.pick([], [g.weights(columns)], [g.weights(rows, 1)])
    g.add("Gemm", [x, weights, *c], (rows, columns), transA=left, transB=right, alpha=g.pick(1.0, 0.5))


def contraction(g: Growing, x: str) -> None:
    """An Einsum of three axes and a constant matrix."""
    a, b, c = g.values[x]
    equation, shape, result = g.pick(
        ("abc,cd->abd", (c, 3), (a, b, 3)), ("abc,cd->dab", (c, 3), (3, a, b)), ("abc,bd->acd", (b, 3), (a, c, 3))
    )
    g.add("Einsum", [x, g.weights(*shape)], result, equation=equation)


def odd_reduction(g: Growing, x: str) -> None:
    """A reduction of one axis with more than a sum in it."""
    shape, axis = g.values[x], g.axis(g.values[x])
    result = [1 if place == axis % len(shape) else size for place, size in enumerate(shape)]
    op = g.pick("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "ReduceMin", "ReduceProd")
    g.add(op, [x, g.constant(np.array([axis]))], result)


def odd_resize(g: Growing, x: str) -> None:
    """A Resize to any size, in every mode whose places ONNX Runtime and the standard take alike."""
    n, c, h, w = g.values[x]
    sizes = [int(g.rng.integers(1, 2 * size + 1)) for size in (h, w)]
    mode = g.pick("nearest", "linear", "cubic")
    options = {"mode": mode, "coordinate_transformation_mode": g.pick("half_pixel", "align_corners", "asymmetric")}
    if mode == "nearest":
        options["nearest_mode"] = g.pick("floor", "ceil")
    g.add("Resize", [x, "", "", g.constant(np.array([n, c, *sizes]))], (n, c, *sizes), **options)


def odd_pad(g: Growing, x: str) -> None:
    """A Pad of reflections, or one that cuts."""
    shape = g.values[x]
    if g.pick(True, False):
        pads, mode = [int(g.rng.integers(0, min(size, 3))) for size in (*shape, *shape)], "reflect"
    else:
        pads, mode = [int(g.rng.integers(-1 if size > 2 else 0, 2)) for size in (*shape, *shape)], "constant"
    result = [size + a + b for size, a, b in zip(shape, pads[: len(shape)], pads[len(shape) :], strict=True)]
    g.add("Pad", [x, g.constant(np.array(pads))], result, mode=mode)


def of_rank(*ranks: int) -> Callable[[Sequence[int]], bool]:
    """Whether a value has one of these numbers of axes, and may grow."""
    return lambda shape: len(shape) in ranks and some(shape)


MORE: dict[str, tuple[Maker, Callable[[Sequence[int]], bool]]] = {
    maker.__name__: (maker, fits)
    for fits, makers in (
        (image, (conv_transpose, odd_pool, blocks, odd_resize)),
        (of_rank(3, 5), (conv_other,)),
        (some, (curve, row_normalization, choice, tile, top, running_sum, scattered, odd_reduction, odd_pad)),
        (matrix, (slopes,)),
        (of_rank(3, 4, 5), (instance_normalization,)),
        (of_rank(2), (gemm,)),
        (of_rank(3), (contraction,)),
    )
    for maker in makers
}
"""By name, what adds an operator and which shapes it takes."""
