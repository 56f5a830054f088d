"""Normalizations: y = (x - mean) / sqrt(variance + epsilon) * scale + bias, over the axes each of them names.

Statistics known at conversion (BatchNormalization) become one factor and one offset per channel. The others are written
in any memory order, with the variance as the mean of squared differences, as exact as float32 allows.

Rows of 8-bit integers are summed as they are (`edgeship.calibration.writing.exact` has the formulas): whole numbers,
which no order of adding changes, and single operations behind them. The length of a vector is made by POW, since
XNNPACK's SQRT is now and then a unit in the last place off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.calibration.types import EXACT_ROW
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_plan import LayoutRule
from edgeship.targets.tflite.layout_rules import CHANNELS_LAST, NATURAL, AlongAxes, ByNode, LastAxis
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.activation import SIGNED_UNIT
from edgeship.targets.tflite.ops.broadcast import apply


def convert_batch_normalization(emit: Emit) -> None:
    """Writes a BatchNormalization as MUL and ADD, with the statistics computed where they are not constants."""
    node, x, y = emit.node, emit.input(), emit.output()
    epsilon = float(node.attribute("epsilon", 1e-5))
    if _trains(node):
        _train_batch_normalization(emit, epsilon)
        return
    if all(node.tensor(i).is_constant for i in range(1, 5)):
        scale, bias, mean, variance = (node.tensor(i).values().astype(np.float64) for i in range(1, 5))
        factors = scale / np.sqrt(variance + epsilon)
        factor = _per_channel(emit, "factor", factors)
        offset = _per_channel(emit, "offset", bias - mean * factors)
    else:
        gain, shift, centre, spread = (_parameter(emit, i, [1]) for i in range(1, 5))
        factor = _op(emit, "MUL", [_inverse_root(emit, spread, epsilon), gain], spread)
        offset = _op(emit, "SUB", [shift, _op(emit, "MUL", [centre, factor], centre)], shift)
    scaled = _op(emit, "MUL", [x, factor], y)
    emit.operator("ADD", [scaled, offset], y, fused_activation_function=node.activation)


def _trains(node: Node) -> bool:
    return bool(node.attribute("training_mode", 0))


def _train_batch_normalization(emit: Emit, epsilon: float) -> None:
    """The statistics of the batch itself, and the running ones moved towards them by 1 - momentum."""
    node, x, y = emit.node, emit.input(), emit.output()
    places = [0, *range(2, x.rank)]
    mean = _mean(emit, x, places)
    centred = _op(emit, "SUB", [x, mean], x)
    variance = _variance(emit, centred, places)
    factor = _op(emit, "MUL", [_inverse_root(emit, variance, epsilon), _parameter(emit, 1, [1])], variance)
    scaled = _op(emit, "MUL", [centred, factor], y)
    emit.operator("ADD", [scaled, _parameter(emit, 2, [1])], y, fused_activation_function=node.activation)
    momentum = float(node.attribute("momentum", 0.9))
    for index, current in ((1, mean), (2, variance)):
        if _wanted(node, index):
            old = _op(emit, "MUL", [emit.input(index + 2), _number(emit, "momentum", momentum)], emit.output(index))
            flat = emit.writer.reshape(current, old.shape, old.shape)
            new = _op(emit, "MUL", [flat, _number(emit, "rest", 1 - momentum)], old)
            emit.operator("ADD", [old, new], emit.output(index))


def _number(emit: Emit, name: str, value: float) -> Operand:
    return emit.constant(name, np.array(value, np.float32))


def _per_channel(emit: Emit, name: str, values: np.ndarray) -> Operand:
    shape = [1] * emit.node.x.rank
    shape[emit.layout.axis(1)] = -1
    return emit.constant(name, values.astype(np.float32).reshape(shape))


def _parameter(emit: Emit, index: int, axes: Sequence[int]) -> Operand:
    """Input `index`, whose axes are the data's `axes`, where they lie in memory."""
    tensor, layout = emit.node.tensor(index), emit.layout
    sizes = dict(zip(axes, tensor.shape, strict=True))
    shape = [sizes.get(axis, 1) for axis in layout.perm]
    if tensor.is_constant:
        order = sorted(range(len(axes)), key=lambda place: layout.axis(axes[place]))
        return emit.constant(tensor.name, tensor.values().transpose(order).astype(np.float32).reshape(shape))
    return emit.writer.reshape(emit.input(index), shape, shape)


def _op(emit: Emit, name: str, inputs: Sequence[Operand], like: Operand, shape: Sequence[int] = ()) -> Operand:
    """The result of one operator, of the shape of `like` or another."""
    target = emit.temporary(tuple(shape) or like.shape, like, name.lower())
    emit.operator(name, inputs, target)
    return target


def _mean(emit: Emit, x: Operand, places: Sequence[int], target: Operand | None = None) -> Operand:
    """The mean over physical axes, which stay with size 1."""
    shape = [1 if place in places else size for place, size in enumerate(x.shape)]
    target = target or emit.temporary(shape, x, "mean")
    emit.operator("MEAN", [x, emit.ints("axes", sorted(places))], target, keep_dims=True)
    return target


def _inverse_root(emit: Emit, variance: Operand, epsilon: float, target: Operand | None = None) -> Operand:
    """1 / sqrt(variance + epsilon)."""
    safe = _op(emit, "ADD", [variance, _number(emit, "epsilon", epsilon)], variance)
    target = target or emit.temporary(variance.shape, variance, "rsqrt")
    emit.operator("RSQRT", [safe], target)
    return target


def _centred(emit: Emit, x: Operand, places: Sequence[int], mean: Operand | None = None) -> Operand:
    return _op(emit, "SUB", [x, _mean(emit, x, places, mean)], x)


def _variance(emit: Emit, centred: Operand, places: Sequence[int]) -> Operand:
    return _mean(emit, _op(emit, "MUL", [centred, centred], centred), places)


def _scaled(emit: Emit, x: Operand, scale: Operand | None, bias: Operand | None, y: Operand) -> None:
    """Writes x * scale + bias to `y`."""
    factors = [] if scale is None else [("MUL", scale)]
    terms = [*factors, *([] if bias is None else [("ADD", bias)])]
    if not terms:
        emit.writer.reshape(x, y.shape, y.signature, y)
    for place, (name, operand) in enumerate(terms):
        target = y if place == len(terms) - 1 else emit.temporary(y.shape, y, name.lower())
        emit.operator(name, [x, operand], target)
        x = target


def _trailing(node: Node) -> list[int]:
    """The axes from `axis` on."""
    return list(range(node.axis(-1), node.x.rank))


def _is_of_rows(emit: Emit) -> bool:
    """Whether what is normalized are the rows along the last axis in memory, and nothing else is asked for."""
    node = emit.node
    return _trailing(node) == [emit.layout.perm[-1]] and not _wanted(node, 1) and not _wanted(node, 2)


def _normalized(emit: Emit) -> tuple[Operand, Operand, list[int]]:
    """Input, output, and the physical axes to normalize over; of rows the other axes have whatever shape they have."""
    if _is_of_rows(emit):
        x = emit.rows(emit.node.x.rank - 1)
        return x, emit.output_as(x.shape, x.signature), [x.rank - 1]
    return emit.input(), emit.output(), [emit.layout.axis(axis) for axis in _trailing(emit.node)]


def _trailing_parameter(emit: Emit, index: int) -> Operand | None:
    rank = emit.node.x.rank
    if not emit.node.has(index):
        return None
    tensor = emit.node.tensor(index)
    if _is_of_rows(emit) and tensor.is_constant:
        return emit.constant(tensor.name, tensor.values().astype(np.float32).reshape(-1))
    return _parameter(emit, index, range(rank - emit.node.tensor(index).rank, rank))


def _integers(emit: Emit, x: Operand) -> Operand:
    """Quantized numbers as they are stored, in float32."""
    real = emit.writer.new(f"{emit.node.name}/integers", x.shape, np.dtype(np.float32), signature=x.signature)
    emit.operator("CAST", [x], real)
    return real


def _sum(emit: Emit, x: Operand, places: Sequence[int]) -> Operand:
    """The sum over physical axes, which stay with size 1."""
    shape = [1 if place in places else size for place, size in enumerate(x.shape)]
    target = emit.temporary(shape, x, "sum")
    emit.operator("SUM", [x, emit.ints("axes", sorted(places))], target, keep_dims=True)
    return target


def _exact_layer_normalization(emit: Emit, x: Operand, y: Operand, places: Sequence[int]) -> None:
    """Writes a LayerNormalization of 8-bit integers."""
    node, quant = emit.node, x.quant
    size = _number(emit, "size", float(np.prod([x.shape[place] for place in places])))
    step = 1.0 if quant is None else float(quant.scale.reshape(()))
    epsilon = _number(emit, "epsilon", float(node.attribute("epsilon", 1e-5)) / step**2)
    x = _integers(emit, x)
    square = _op(emit, "MUL", [x, x], x)
    total, squares = _sum(emit, x, places), _sum(emit, square, places)
    mean = _op(emit, "DIV", [total, size], total)
    difference = emit.temporary(total.shape, total, "variance")
    terms = [_op(emit, "DIV", [squares, size], total), _op(emit, "MUL", [mean, mean], total)]
    emit.operator("SUB", terms, difference, fused_activation_function="RELU")
    variance = _op(emit, "ADD", [difference, epsilon], total)
    root = _op(emit, "SQRT", [variance], total)
    twice = _op(emit, "ADD", [root, _op(emit, "DIV", [variance, root], total)], total)
    inverse = _op(emit, "DIV", [_number(emit, "two", 2.0), twice], total)
    normal = _op(emit, "MUL", [_op(emit, "SUB", [x, mean], x), inverse], y)
    _scaled(emit, normal, _trailing_parameter(emit, 1), _trailing_parameter(emit, 2), y)


def _is_summed_exactly(node: Node) -> bool:
    """Whether a row's integers, and their squares, add up in float32 without rounding."""
    sizes = [node.x.shape[axis] for axis in _trailing(node)]
    return int(np.prod(sizes)) <= EXACT_ROW and not _wanted(node, 1) and not _wanted(node, 2)


def _is_one_vector_exactly(node: Node) -> bool:
    return euclidean(node) is None and node.x.shape[node.axis(-1)] <= EXACT_ROW


def fitting_parameters(node: Node) -> str | None:
    """Scale and bias have the shape of the axes that are normalized, or repeat to it."""
    for tensor in (t for t in node.inputs[1:] if t is not None):
        rows = [node.x.shape[axis] for axis in _trailing(node)]
        sizes = [1] * (len(rows) - tensor.rank) + list(tensor.shape)
        if len(sizes) > len(rows) or any(size not in (1, row) for size, row in zip(sizes, rows, strict=True)):
            return f"its {tensor.name} has shape {list(tensor.shape)}; accepted: what repeats to {rows}"
    return None


def convert_layer_normalization(emit: Emit) -> None:
    """Writes a LayerNormalization; Mean and InvStdDev too where they are read."""
    node, (x, y, places) = emit.node, _normalized(emit)
    if x.quant is not None:
        _exact_layer_normalization(emit, x, y, places)
        return
    mean = emit.output(1) if _wanted(node, 1) else None
    spread = emit.output(2) if _wanted(node, 2) else None
    centred = _centred(emit, x, places, mean)
    factor = _inverse_root(emit, _variance(emit, centred, places), float(node.attribute("epsilon", 1e-5)), spread)
    normal = _op(emit, "MUL", [centred, factor], y)
    _scaled(emit, normal, _trailing_parameter(emit, 1), _trailing_parameter(emit, 2), y)


def _wanted(node: Node, index: int) -> bool:
    return index < len(node.outputs) and bool(node.outputs[index].name)


def convert_rms_normalization(emit: Emit) -> None:
    """Writes an RMSNormalization."""
    node, (x, y, places) = emit.node, _normalized(emit)
    factor = _inverse_root(emit, _variance(emit, x, places), float(node.attribute("epsilon", 1e-5)))
    _scaled(emit, _op(emit, "MUL", [x, factor], y), _trailing_parameter(emit, 1), None, y)


def convert_instance_normalization(emit: Emit) -> None:
    """Writes an InstanceNormalization; the scale joins the factor, which has one number per channel."""
    node, x, y = emit.node, emit.input(), emit.output()
    places = [emit.layout.axis(axis) for axis in range(2, node.x.rank)]
    centred = _centred(emit, x, places) if places else _op(emit, "SUB", [x, x], x)
    variance = _variance(emit, centred, places) if places else centred
    factor = _inverse_root(emit, variance, float(node.attribute("epsilon", 1e-5)))
    factor = _op(emit, "MUL", [factor, _parameter(emit, 1, [1])], factor)
    emit.operator("ADD", [_op(emit, "MUL", [centred, factor], y), _parameter(emit, 2, [1])], y)


def convert_group_normalization(emit: Emit) -> None:
    """Writes a GroupNormalization: the channels split into groups by a RESHAPE, in the order they lie."""
    shape: tuple[int, ...]
    node, x, y = emit.node, emit.input(), emit.output()
    groups, batch = int(node.attribute("num_groups")), x.shape[0]
    size = node.x.shape[1] // groups
    space = node.x.size // max(1, batch * node.x.shape[1])
    if groups == 1:
        shape, places = (batch, size * space), [1]
    elif emit.layout.perm[-1] == 1:
        shape, places = (batch, space, groups, size), [1, 3]
    else:
        shape, places = (batch, groups, size * space), [2]
    signature = (x.signature[0], *shape[1:])
    split = emit.writer.reshape(x, shape, signature)
    centred = _centred(emit, split, places)
    factor = _inverse_root(emit, _variance(emit, centred, places), float(node.attribute("epsilon", 1e-5)))
    normal = _op(emit, "MUL", [centred, factor], centred)
    joined = emit.writer.reshape(normal, y.shape, y.signature)
    _scaled(emit, joined, _parameter(emit, 1, [1]), _parameter(emit, 2, [1]), y)


def convert_lp_normalization(emit: Emit) -> None:
    """Writes an LpNormalization: L2_NORMALIZATION along the last axis in memory, or a sum of absolute values."""
    node, x, y = emit.node, emit.input(), emit.output()
    if int(node.attribute("p", 2)) == 2:
        if x.quant is None or node.int8:
            emit.operator("L2_NORMALIZATION", [x], y)
        else:
            _exact_unit_vectors(emit, x, y, int(x.quant.zero_point.reshape(())))
        return
    sizes = _op(emit, "ABS", [x], x)
    norm = emit.temporary((*x.shape[:-1], 1), x, "norm")
    emit.operator("SUM", [sizes, emit.ints("axes", [x.rank - 1])], norm, keep_dims=True)
    tiny = _number(emit, "tiny", float(np.finfo(np.float32).tiny))
    emit.operator("DIV", [x, _op(emit, "MAXIMUM", [norm, tiny], norm)], y)


def _exact_unit_vectors(emit: Emit, x: Operand, y: Operand, zero_point: int) -> None:
    """Writes an LpNormalization of 8-bit integers in real numbers, which takes half the time of the int8 kernel."""
    x = _integers(emit, x)
    if zero_point:
        x = _op(emit, "SUB", [x, _number(emit, "zero_point", float(zero_point))], x)
    length = apply(emit, "POW", _sum(emit, _op(emit, "MUL", [x, x], x), [x.rank - 1]), 0.5)
    tiny = _number(emit, "tiny", float(np.finfo(np.float32).tiny))
    emit.operator("DIV", [x, _op(emit, "MAXIMUM", [length, tiny], length)], y)


def euclidean(node: Node) -> str | None:
    """p is 2."""
    return None if int(node.attribute("p", 2)) == 2 else "its p is 1; accepted: 2"


def odd_size(node: Node) -> str | None:
    """The window is odd, so that it reaches as far to both sides."""
    size = int(node.attribute("size"))
    return None if size % 2 else f"its size is {size}; accepted: an odd number"


def convert_lrn(emit: Emit) -> None:
    """Writes an LRN: LOCAL_RESPONSE_NORMALIZATION, whose alpha belongs to one element instead of the window."""
    node, x, y = emit.node, emit.input(), emit.output()
    size = int(node.attribute("size"))
    shape, signature = (
        (s[0], int(np.prod(s[1:-1])), 1, s[-1]) if len(s) != 4 else tuple(s) for s in (x.shape, x.signature)
    )
    source = emit.writer.reshape(x, shape, signature)
    target = y if source is x else emit.temporary(shape, y, "normal", signature=signature)
    emit.operator(
        "LOCAL_RESPONSE_NORMALIZATION",
        [source],
        target,
        radius=size // 2,
        bias=float(node.attribute("bias", 1.0)),
        alpha=float(node.attribute("alpha", 1e-4)) / size,
        beta=float(node.attribute("beta", 0.75)),
    )
    if target is not y:
        emit.writer.reshape(target, y.shape, y.signature, y)


def computed_parameters(node: Node) -> bool:
    """Whether a parameter of several axes is computed: it lies in ONNX's order, and so must the data."""
    return any(t is not None and not t.is_constant and t.rank > 1 for t in node.inputs[1:])


_NORMS = ByNode(lambda node: NATURAL if computed_parameters(node) else AlongAxes(1, _trailing))
_CHANNELS = AlongAxes()


def _group_layout(node: Node) -> LayoutRule:
    return CHANNELS_LAST if node.x.rank > 2 else NATURAL


def _batch_layout(node: Node) -> LayoutRule:
    return NATURAL if _trains(node) else _CHANNELS


_REAL = (of_types("float32"),)
_ROWS = (*_REAL, fitting_parameters)

OPS = (
    Op("BatchNormalization", convert_batch_normalization, ByNode(_batch_layout), None, _REAL, fuses=True),
    Op("LayerNormalization", convert_layer_normalization, _NORMS, None, _ROWS, reads_integers=_is_summed_exactly),
    Op("RMSNormalization", convert_rms_normalization, _NORMS, None, _ROWS),
    Op("InstanceNormalization", convert_instance_normalization, _CHANNELS, None, _REAL),
    Op("GroupNormalization", convert_group_normalization, ByNode(_group_layout), None, _REAL, since=21),
    Op(
        "LpNormalization",
        convert_lp_normalization,
        LastAxis(lambda node: node.axis(-1), torn=True),
        Int8(fixed_output=SIGNED_UNIT, limits=(euclidean,)),
        _REAL,
        reads_integers=_is_one_vector_exactly,
    ),
    Op("LRN", convert_lrn, CHANNELS_LAST, None, (*_REAL, odd_size)),
)
