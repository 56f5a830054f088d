"""Operators that move quantized values and say no more about them: their results are quantized once more, by the same.

    DQ -> MaxPool -> Conv   becomes   DQ -> MaxPool -> Q -> DQ -> Conv      (Brevitas writes the former)

What is picked out of numbers that integers stand for is such a number, and comes back as the same integer. A runtime
that looks for the pair around each of its integer kernels finds it then.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeship.calibration.readback.rewrite import DATA_TYPES, dtype_of, known, place

MOVERS = frozenset(
    {
        "DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip


def requantize_moved(graph: ir.Graph) -> None:
    """Writes the pair, in place, behind each such operator whose results somebody computes with."""
    for node in list(graph):
        if needs_pair(node):
            for index in range(1 if node.op_type == "MaxPool" else len(node.outputs)):
                _write_pair(graph, node, index)


def needs_pair(node: ir.Node) -> bool:
    """Whether the node moves numbers that integers stand for to a reader that wants none."""
    dequantize = _source(node)
    return dequantize is not None and any(reader.op_type != "QuantizeLinear" for reader, _ in node.outputs[0].uses())


def _source(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear, of computed integers with one scale, that makes what the node moves."""
    value = place(node, 0)
    maker = value.producer() if value is not None and node.op_type in MOVERS and not node.domain else None
    if maker is None or maker.op_type != "DequantizeLinear" or maker.domain or known(place(maker, 0)) is not None:
        return None
    scale = known(place(maker, 1))
    zero = place(maker, 2)
    return maker if scale is not None and scale.size == 1 and dtype_of(zero) in DATA_TYPES else None


def _write_pair(graph: ir.Graph, node: ir.Node, index: int) -> None:
    dequantize, moved = _source(node), node.outputs[index]
    if dequantize is None:
        return
    parameters = list(dequantize.inputs[1:3])
    readers = [(reader, at) for reader, at in moved.uses() if reader.op_type != "QuantizeLinear"]
    stem = f"{moved.name}/moved"
    quantize = ir.node("QuantizeLinear", [moved, *parameters], name=f"{stem}_q", version=node.version)
    real = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=f"{stem}_dq", version=node.version)
    for made in (quantize, real):
        made.outputs[0].name, made.outputs[0].shape = str(made.name), moved.shape
    quantize.outputs[0].dtype = dtype_of(parameters[1]) or ir.DataType.UINT8
    real.outputs[0].dtype = ir.DataType.FLOAT
    graph.insert_after(node, [quantize, real])
    for reader, at in readers:
        reader.replace_input_with(at, real.outputs[0])
