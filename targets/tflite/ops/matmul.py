"""Matrix products: FULLY_CONNECTED with constant weights, BATCH_MATMUL between computed matrices.

int8 rounding as in convolutions: at most one step from the QDQ reference. A computed second matrix (the keys and
values of attention) is planned with zero point 0. With another, LiteRT 2.3 has XNNPACK leave the product to a kernel
that takes 7 to 30 times as long and rounds twice, which puts up to 0.4 % of the results a step off; and the XNNPACK
delegate of TensorFlow 2.21 takes the zero point for 0 all the same (up to 25 steps off).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeship.calibration.types import Array, QuantParams
from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported
from edgeship.targets.tflite.layout import Layout, natural
from edgeship.targets.tflite.layout_matrices import PRODUCTS, Rows
from edgeship.targets.tflite.layout_matrices import WIDEST as WIDEST_PRODUCT
from edgeship.targets.tflite.layout_rules import ByNode
from edgeship.targets.tflite.op import Int8, Int16, Op
from edgeship.targets.tflite.ops.conv import bias, constant_bias, moderate_rescaling

KNOWN_FLOATS = (np.dtype(np.float32),)
MOST_PRODUCTS = 1 << 22
"""Products of integers that are written out before they are summed."""


def symmetric_weights(node: Node) -> str | None:
    """Weights are constant and symmetric, or computed with one scale."""
    b = node.tensor(1)
    if b.quant is None:
        return None
    if b.is_constant and b.quant.zero_point.any() and (node.op_type == "Gemm" or b.quant.spec.axis is not None):
        return f"its weights have zero points up to {np.abs(b.quant.zero_point).max()}; TFLite's are symmetric"
    outputs = b.rank - 2 if node.attribute("transB", 0) else b.rank - 1
    if b.quant.spec.axis is not None and (b.quant.spec.axis != outputs or b.rank > 2):
        return f"its weights are quantized along axis {b.quant.spec.axis}; accepted: {outputs} of a constant matrix"
    return None


def unscaled(node: Node) -> str | None:
    """alpha and beta are 1."""
    factors = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    return None if factors == (1.0, 1.0) else f"alpha and beta are {factors}; accepted: 1"


def constant_matrix(node: Node) -> str | None:
    """The second matrix of a Gemm is a constant."""
    return None if node.tensor(1).is_constant else f"its weights {node.tensor(1).name} are computed at run time"


def scales_of_columns(node: Node) -> str | None:
    """The weights have one scale, or one for each column."""
    b = node.tensor(1)
    if b.quant is None or b.quant.spec.axis in (None, b.rank - 1):
        return None
    return f"its weights are quantized along axis {b.quant.spec.axis}; accepted: {b.rank - 1}"


def one_stack(node: Node) -> str | None:
    """Weights are one matrix, or one stack of them beside a stack of as many: of more axes LiteRT's own kernel computes
    something else.
    """
    x, b = node.x, node.tensor(1)
    if x.rank > 1 and (b.rank == 2 or (x.rank == b.rank == 3 and x.shape[0] == b.shape[0])):
        return None
    return f"it multiplies {list(x.shape)} by {list(b.shape)}"


def flat_if_constant(node: Node) -> str | None:
    """A constant matrix has two axes."""
    return flat_matrix(node) if node.tensor(1).is_constant else None


def flat_matrix(node: Node) -> str | None:
    """The constant matrix has two axes, the other operand at least as many."""
    return None if node.tensor(1).rank == 2 and node.x.rank > 1 else f"its weights have {node.tensor(1).rank} axes"


def row_bias(node: Node) -> str | None:
    """A Gemm's C is one number per column."""
    if node.has(2) and not _is_row(node.tensor(2), node.y.shape[-1]):
        return f"its C has shape {list(node.tensor(2).shape)}; accepted: ({node.y.shape[-1]},)"
    return None


def _is_row(c: Tensor, columns: int) -> bool:
    return c.size == columns and (c.rank == 0 or c.shape[-1] == columns)


def _matrix(
    b: Tensor, rows_are_outputs: bool, factor: float, layout: Layout | None, axis: int
) -> tuple[Array, QuantParams | None]:
    """Constant weights as TFLite has them, [outputs, inputs], their columns in the order that the input's reduced axis
    lies in.
    """
    data, quant = b.data, b.quant
    if data is None:
        raise Unsupported("needs constant weights", f"{b.name} is computed", "a constant")
    if factor != 1.0:
        data, quant = (b.values() * np.float32(factor)).astype(b.dtype), None
    if not rows_are_outputs:
        data = data.T
    if quant and quant.spec.axis is not None:
        quant = replace(quant, spec=replace(quant.spec, axis=0))
    if layout and not layout.holds_whole([axis]):
        # Indexing would leave rows scattered in memory, to be gathered twice: for the digest and for the file.
        data = np.take(data, layout.only(axis).lay(np.arange(data.shape[1])).reshape(-1), axis=1)
    return data, quant


def convert_gemm(emit: Emit) -> None:
    """Writes a Gemm as FULLY_CONNECTED; a C that is not one number per column, alpha of a computed matrix and beta of a
    computed C follow it.
    """
    node = emit.node
    columns, beta = node.y.shape[-1], float(node.attribute("beta", 1.0))
    x, weights, alpha = _gemm_operands(emit)
    if _fits(node) and alpha == 1.0:
        _fully_connected(emit, x, weights, _row(emit, columns, weights) if node.has(2) else None)
        return
    y = emit.output()
    product = emit.compute("FULLY_CONNECTED", [x, weights], y.shape, signature=y.signature)
    activation = {"fused_activation_function": node.activation}
    if not node.has(2):
        emit.operator("MUL", [product, emit.constant("alpha", np.array(alpha, np.float32))], y, **activation)
        return
    if alpha != 1.0:
        scale = emit.constant("alpha", np.array(alpha, np.float32))
        product = emit.compute("MUL", [product, scale], y.shape, signature=y.signature)
    emit.operator("ADD", [product, _scaled_c(emit, beta)], y, **activation)


def _fits(node: Node) -> bool:
    """Whether a Gemm's C can be FULLY_CONNECTED's bias."""
    if not node.has(2):
        return True
    c = node.tensor(2)
    return float(node.attribute("beta", 1.0)) == 1.0 and c.is_constant and _is_row(c, node.y.shape[-1])


def _fully_connected(emit: Emit, x: Operand, weights: Operand, row: Operand | None) -> None:
    """Writes the product of the rows of `x`, which are its last axis, under whatever shape the others have."""
    options = _rounding(x, weights) | ({"keep_num_dims": True} if x.rank > 2 else {})
    shape, signature = ((*extent[:-1], weights.shape[0]) for extent in (x.shape, x.signature))
    operands: list[Operand | None] = [x, weights, row] if row else [x, weights]
    y = emit.output_as(shape, signature)
    emit.operator("FULLY_CONNECTED", operands, y, fused_activation_function=emit.node.activation, **options)


def _gemm_operands(emit: Emit) -> tuple[Operand, Operand, float]:
    """The matrices as FULLY_CONNECTED takes them, and the factor that is still to come."""
    node, layout = emit.node, emit.arrangement.inputs[0]
    b, alpha, transposed = node.tensor(1), float(node.attribute("alpha", 1.0)), bool(node.attribute("transB", 0))
    if b.is_constant:
        axis = GEMM_ROWS.axis(node)
        data, quant = _matrix(b, transposed, alpha, layout, axis)
        return emit.rows(axis), emit.writer.new(b.name, data.shape, data.dtype, quant, data=data), 1.0
    x = emit.writer.arranged(node.x, Layout((1, 0))) if node.attribute("transA", 0) else emit.input()
    return x, emit.writer.arranged(b, natural(2) if transposed else Layout((1, 0))), alpha


def _row(emit: Emit, columns: int, weights: Operand) -> Operand:
    if emit.node.int8:
        return bias(emit, 2, columns, weights)
    c = emit.node.tensor(2)
    return emit.writer.new(c.name, (columns,), c.dtype, data=c.values().reshape(-1))


def _scaled_c(emit: Emit, beta: float) -> Operand:
    c = emit.node.tensor(2)
    if beta == 1.0:
        return emit.input(2)
    if c.is_constant:
        return emit.constant("c", (c.values() * np.float32(beta)).astype(c.dtype))
    return emit.compute("MUL", [emit.input(2), emit.constant("beta", np.array(beta, np.float32))])


def convert_matmul(emit: Emit) -> None:
    """Writes a MatMul: FULLY_CONNECTED by a constant matrix, BATCH_MATMUL otherwise."""
    node, b = emit.node, emit.node.tensor(1)
    if _by_constant_matrix(node):
        axis = node.x.rank - 1
        data, quant = _matrix(b, False, 1.0, emit.layout, axis)
        weights = emit.writer.new(b.name, data.shape, data.dtype, quant, data=data)
        row = _row(emit, len(data), weights) if node.int8 or node.has(2) else None
        _fully_connected(emit, emit.rows(axis), weights, row)
        return
    if emit.output_layout.perm != natural(node.y.rank).perm or _turned(emit):
        left, right = emit.input(0), emit.input(1)
        emit.operator("BATCH_MATMUL", [left, right], emit.output(), adj_y=_turned(emit), **_rounding(left, right))
        return
    left, right = _matrices(emit)
    y = emit.output()
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, left.shape[-2], right.shape[-1])
    multiply = _product if left.dtype in KNOWN_FLOATS or left.quant else _integer_product
    if shape == y.shape and y.rank <= WIDEST_PRODUCT:
        multiply(emit, left, right, y)
        return
    if left.is_dynamic or right.is_dynamic:
        raise Unsupported(
            "vectors, or more than 5 axes, of dynamic size", f"shape {list(y.signature)}", "a static batch"
        )
    if len(shape) > WIDEST_PRODUCT:
        left, right = _flat(emit, left, batch), _flat(emit, right, batch)
        shape = (left.shape[0], *shape[-2:])
    product = emit.temporary(shape, y, "product")
    multiply(emit, left, right, product)
    emit.writer.reshape(product, y.shape, y.signature, y)


def _turned(emit: Emit) -> bool:
    """Whether the second stack's matrices lie with their columns as rows."""
    right = emit.arrangement.inputs[1]
    return right is not None and right.perm[-2:] == (right.perm[-1] + 1, right.perm[-1])


def _matrices(emit: Emit) -> tuple[Operand, Operand]:
    """The operands with at least two axes: a vector is a row on the left, a column on the right."""
    left, right = emit.input(0), emit.input(1)
    if 1 in (left.rank, right.rank) and (left.is_dynamic or right.is_dynamic):
        raise Unsupported("vectors of dynamic size", f"shape {list(left.signature)}", "a static batch")
    if left.rank == 1:
        left = emit.writer.reshape(left, (1, *left.shape), (1, *left.shape))
    if right.rank == 1:
        right = emit.writer.reshape(right, (*right.shape, 1), (*right.shape, 1))
    return left, right


def _flat(emit: Emit, x: Operand, batch: tuple[int, ...]) -> Operand:
    """`x` with `batch` in front as one axis."""
    full = (*batch, *x.shape[-2:])
    if full != x.shape:
        x = emit.compute("BROADCAST_TO", [x, emit.ints("shape", full)], full)
    shape = (int(np.prod(batch)), *x.shape[-2:])
    return emit.writer.reshape(x, shape, shape)


def _product(emit: Emit, left: Operand, right: Operand, into: Operand) -> None:
    emit.operator("BATCH_MATMUL", [left, right], into, **_rounding(left, right))


def _rounding(left: Operand, right: Operand) -> dict[str, bool]:
    """The option of real rows by int8 columns: every row is rounded with a zero point of its own."""
    return {"asymmetric_quantize_inputs": True} if right.quant and not left.quant else {}


def _integer_product(emit: Emit, left: Operand, right: Operand, into: Operand) -> None:
    """All products, then their sums: TFLite multiplies integer matrices only where they are quantized."""
    rows, columns = (*left.shape, 1), (*right.shape[:-2], 1, *right.shape[-2:])
    if len(rows) > WIDEST_PRODUCT or len(columns) > WIDEST_PRODUCT or left.is_dynamic or right.is_dynamic:
        seen = f"{list(left.signature)} by {list(right.signature)}"
        raise Unsupported("products of integer matrices of this shape", seen, "4 static axes")
    if int(np.prod(np.broadcast_shapes(rows, columns))) > MOST_PRODUCTS:
        raise Unsupported("too many products of integers", f"{list(rows)} by {list(columns)}", f"{MOST_PRODUCTS}")
    every = emit.compute("MUL", [emit.writer.reshape(left, rows, rows), emit.writer.reshape(right, columns, columns)])
    emit.operator("SUM", [every, emit.ints("axis", [every.rank - 2])], into)


def _by_constant_matrix(node: Node) -> bool:
    """Whether FULLY_CONNECTED does it."""
    b = node.tensor(1)
    if not b.is_float or not b.is_constant or b.rank != 2 or node.x.rank < 2:
        return False
    return not (b.quant and b.quant.zero_point.any())


GEMM_ROWS = Rows(lambda node: 0 if node.attribute("transA", 0) else 1, lambda node: node.tensor(1).is_constant, _fits)
MATMUL_ROWS = Rows(lambda node: node.x.rank - 1, _by_constant_matrix)

OPS = (
    Op(
        "Gemm",
        convert_gemm,
        GEMM_ROWS,
        Int8(
            real_inputs=frozenset({2}),
            limits=(constant_matrix, symmetric_weights, unscaled, row_bias, constant_bias, moderate_rescaling),
            wide=Int16(weights=frozenset({1})),
        ),
        (of_types("float32"),),
        hybrid=(constant_matrix, symmetric_weights, unscaled, row_bias),
        fuses=True,
    ),
    Op(
        "MatMul",
        convert_matmul,
        ByNode(lambda node: MATMUL_ROWS if _by_constant_matrix(node) else PRODUCTS),
        Int8(
            real_inputs=frozenset({2}),
            symmetric=frozenset({1}),
            limits=(symmetric_weights, moderate_rescaling),
            wide=Int16(weights=frozenset({1}), limits=(flat_if_constant,)),
        ),
        (of_types("float32", "int32", "int64"),),
        hybrid=(constant_matrix, one_stack, scales_of_columns),
        fuses=_by_constant_matrix,
    ),
)
