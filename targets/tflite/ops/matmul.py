"""Matrix products: FULLY_CONNECTED with constant weights, BATCH_MATMUL between computed matrices.

int8 rounding as in convolutions: at most one step from the QDQ reference.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgeship.calibration.types import Array, QuantParams
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Tensor, Unsupported
from edgeship.targets.tflite.layout import Layout, Split, natural
from edgeship.targets.tflite.layout_rules import Rows
from edgeship.targets.tflite.op import Int8, Op
from edgeship.targets.tflite.ops.conv import bias, constant_bias, moderate_rescaling

KNOWN_FLOATS = (np.dtype(np.float32),)


def symmetric_weights(node: Node) -> str | None:
    """Weights are constant and symmetric, or computed with one scale."""
    b = node.tensor(1)
    if b.quant is None:
        return None
    if b.is_constant and b.quant.zero_point.any() and node.op_type == "Gemm":
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


def row_bias(node: Node) -> str | None:
    """A Gemm's C is one number per column."""
    if node.has(2) and not _is_row(node.tensor(2), node.y.shape[-1]):
        return f"its C has shape {list(node.tensor(2).shape)}; accepted: ({node.y.shape[-1]},)"
    return None


def float_or_int8(node: Node) -> str | None:
    """The operands are float32 or int8."""
    return None if node.x.dtype in KNOWN_FLOATS else f"its operands are {node.x.dtype}; accepted: float32"


def _is_row(c: Tensor, columns: int) -> bool:
    return c.size == columns and (c.rank == 0 or c.shape[-1] == columns)


def _matrix(b: Tensor, rows_are_outputs: bool, factor: float, split: Split | None) -> tuple[Array, QuantParams | None]:
    """Constant weights as TFLite has them, [outputs, inputs], their columns in the order the input lies in."""
    data, quant = b.data, b.quant
    if data is None:
        raise Unsupported("needs constant weights", f"{b.name} is computed", "a constant")
    if factor != 1.0:
        data, quant = (b.values() * np.float32(factor)).astype(b.dtype), None
    if not rows_are_outputs:
        data = data.T
    if quant and quant.spec.axis is not None:
        quant = replace(quant, spec=replace(quant.spec, axis=0))
    if split:
        order = [0, *(axis + 1 for axis in split.order)]
        data = data.reshape(len(data), *split.dims).transpose(order).reshape(len(data), -1)
    return np.ascontiguousarray(data), quant


def convert_gemm(emit: Emit) -> None:
    """Writes a Gemm with constant weights as FULLY_CONNECTED; a C that is not one number per column is added after."""
    node, layout = emit.node, emit.arrangement.inputs[0]
    b, transposed = node.tensor(1), bool(node.attribute("transB", 0))
    x = emit.input()
    if b.is_constant:
        data, quant = _matrix(b, transposed, float(node.attribute("alpha", 1.0)), layout.split if layout else None)
        weights = emit.writer.new(b.name, data.shape, data.dtype, quant, data=data)
    else:
        if node.attribute("alpha", 1.0) != 1.0 or node.attribute("transA", 0):
            raise Unsupported("alpha and transA need constant weights", f"{b.name} is computed", "a constant")
        weights = emit.writer.arranged(b, natural(2) if transposed else Layout((1, 0)))
    columns, beta = node.y.shape[-1], float(node.attribute("beta", 1.0))
    fits = not node.has(2) or (beta == 1.0 and node.tensor(2).is_constant and _is_row(node.tensor(2), columns))
    if fits:
        row = _row(emit, columns, weights) if node.has(2) else None
        operands: list[Operand | None] = [x, weights, row] if row else [x, weights]
        emit.operator("FULLY_CONNECTED", operands, emit.output(), fused_activation_function=node.activation)
        return
    product = emit.temporary(emit.output().shape, emit.output(), "product", signature=emit.output().signature)
    emit.operator("FULLY_CONNECTED", [x, weights], product)
    emit.operator("ADD", [product, _scaled_c(emit, beta)], emit.output(), fused_activation_function=node.activation)


def _row(emit: Emit, columns: int, weights: Operand) -> Operand:
    c = emit.node.tensor(2)
    if emit.node.int8:
        return bias(emit, 2, columns, weights)
    return emit.writer.new(c.name, (columns,), c.dtype, data=c.values().reshape(-1))


def _scaled_c(emit: Emit, beta: float) -> Operand:
    c = emit.node.tensor(2)
    if beta == 1.0:
        return emit.input(2)
    return emit.constant("c", (c.values() * np.float32(beta)).astype(c.dtype))


def convert_matmul(emit: Emit) -> None:
    """Writes a MatMul: FULLY_CONNECTED by a constant matrix, BATCH_MATMUL otherwise."""
    node, b = emit.node, emit.node.tensor(1)
    if _by_constant_matrix(node):
        data, quant = _matrix(b, False, 1.0, emit.layout.split)
        weights = emit.writer.new(b.name, data.shape, data.dtype, quant, data=data)
        options = {"keep_num_dims": True} if node.x.rank > 2 else {}
        activation = node.activation
        operands: list[Operand | None] = [emit.input(), weights]
        if node.int8:
            operands.append(bias(emit, 2, data.shape[0], weights))
        emit.operator("FULLY_CONNECTED", operands, emit.output(), fused_activation_function=activation, **options)
        return
    left, right, y = emit.input(0), emit.input(1), emit.output()
    rows = (1, *left.shape) if left.rank == 1 else left.shape
    columns = (*right.shape, 1) if right.rank == 1 else right.shape
    if 1 in (left.rank, right.rank) and (left.is_dynamic or right.is_dynamic):
        raise Unsupported("vectors of dynamic size", f"shape {list(left.signature)}", "a static batch")
    left = emit.writer.reshape(left, rows, rows) if left.rank == 1 else left
    right = emit.writer.reshape(right, columns, columns) if right.rank == 1 else right
    if node.tensor(0).rank > 1 and node.tensor(1).rank > 1:
        emit.operator("BATCH_MATMUL", [left, right], y)
        return
    batch = np.broadcast_shapes(rows[:-2], columns[:-2])
    product = emit.temporary((*batch, rows[-2], columns[-1]), y, "product")
    emit.operator("BATCH_MATMUL", [left, right], product)
    emit.writer.reshape(product, y.shape, y.signature, y)


def _by_constant_matrix(node: Node) -> bool:
    """Whether FULLY_CONNECTED does it."""
    b = node.tensor(1)
    return b.is_constant and b.rank == 2 and node.x.rank >= 2 and not (b.quant and b.quant.zero_point.any())


GEMM_ROWS = Rows(lambda node: 0 if node.attribute("transA", 0) else 1, lambda node: node.tensor(1).is_constant)
MATMUL_ROWS = Rows(lambda node: node.x.rank - 1, _by_constant_matrix)

OPS = (
    Op(
        "Gemm",
        convert_gemm,
        GEMM_ROWS,
        Int8(
            real_inputs=frozenset({2}),
            limits=(constant_matrix, symmetric_weights, unscaled, row_bias, constant_bias, moderate_rescaling),
        ),
        (float_or_int8,),
        fuses=True,
    ),
    Op("MatMul", convert_matmul, MATMUL_ROWS, Int8(limits=(symmetric_weights, moderate_rescaling)), (float_or_int8,)),
)
