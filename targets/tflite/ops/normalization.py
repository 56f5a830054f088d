"""Normalizations with statistics known at conversion: y = x * a + b with a = scale / sqrt(var + epsilon), b = bias -
mean * a.
"""

from __future__ import annotations

import numpy as np

from edgeship.targets.tflite.emit import Emit
from edgeship.targets.tflite.graph import Node
from edgeship.targets.tflite.layout_rules import AlongAxes
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.elementwise import of_types


def inference(node: Node) -> str | None:
    """Statistics are constants: the node is in inference mode."""
    if node.attribute("training_mode", 0) or len(node.outputs) > 1:
        return "it is in training mode; accepted: inference"
    computed = [node.tensor(i).name for i in range(1, 5) if not node.tensor(i).is_constant]
    return f"its statistics {', '.join(computed)} are computed at run time" if computed else None


def convert_batch_normalization(emit: Emit) -> None:
    """Writes a BatchNormalization as MUL and ADD."""
    node, x, y = emit.node, emit.input(), emit.output()
    scale, bias, mean, variance = (node.tensor(i).values().astype(np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + float(node.attribute("epsilon", 1e-5)))
    offset = bias - mean * factor
    shape = [1] * node.x.rank
    shape[emit.layout.axis(1)] = -1
    scaled = emit.temporary(y.shape, y, "scaled")
    emit.operator("MUL", [x, emit.constant("factor", factor.astype(np.float32).reshape(shape))], scaled)
    emit.operator(
        "ADD",
        [scaled, emit.constant("offset", offset.astype(np.float32).reshape(shape))],
        y,
        fused_activation_function=node.activation,
    )


OPS = (
    Op(
        "BatchNormalization",
        convert_batch_normalization,
        AlongAxes(),
        None,
        (of_types("float32"), inference),
        fuses=True,
    ),
)
