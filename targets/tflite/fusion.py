"""What is written into the operator before it: TFLite's kernels clamp for free what a RELU would read and write again,
and an int8 kernel makes the integers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE, Graph, Node, Tensor, Unsupported
from edgeship.targets.tflite.op import Op

_RANGES = {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}


def clip_range(node: Node) -> tuple[float, float]:
    """The interval a Relu or Clip clamps to. Raises Unsupported when it is computed at run time."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = node.parameter("min", 1), node.parameter("max", 2)
    largest = float(np.finfo(np.float32).max)
    bottom = -np.inf if low is None or not low.size else float(low.reshape(-1)[0])
    top = np.inf if high is None or not high.size else float(high.reshape(-1)[0])
    return -np.inf if bottom <= -largest else bottom, np.inf if top >= largest else top


def activation_of(node: Node) -> str | None:
    """The schema's name of the fused activation that does what `node` does, or None."""
    if node.op_type not in ("Relu", "Clip") or not node.x.is_float:
        return None
    try:
        return _RANGES.get(clip_range(node))
    except Unsupported:
        return None


def fuse_activations(graph: Graph, op_of: Callable[[Node], Op | None]) -> None:
    """Removes each Relu or Clip whose producer can do it and whose input nobody else reads.

    Between integers only where both tensors have the same parameters: then clamping before or after is the same.
    """
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        activation = activation_of(node)
        if activation is None:
            continue
        producer = producers.get(node.x)
        if producer is None or producer.activation != "NONE" or node.x in kept or len(uses[node.x]) != 1:
            continue
        op = op_of(producer)
        if op is None or not op.fuses or len(producer.outputs) != 1:
            continue
        if node.x.quant and not (node.y.quant and node.x.quant.same_as(node.y.quant)):
            continue
        producer.activation = activation
        producer.outputs = [node.y]
        producers[node.y] = producer
        graph.nodes.remove(node)


def absorb_quantizers(graph: Graph, read_as: Mapping[Tensor, str]) -> None:
    """Lets a node whose only reader is QuantizeLinear write the integers itself.

    Quantizers add to the name of either side of the pair; the shorter one is the original's.
    """
    uses, producers = graph.consumers(), graph.producers()
    kept = set(graph.outputs.values())
    for node in list(graph.nodes):
        if node.op_type != QUANTIZE or node.x.quant or node.x in kept or len(uses[node.x]) != 1:
            continue
        producer = producers.get(node.x)
        if producer is None or producer.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        node.y.name = min(node.x.name, read_as.get(node.y, node.x.name), key=len)
        producer.outputs = [node.y if tensor is node.x else tensor for tensor in producer.outputs]
        producers[node.y] = producer
        graph.nodes.remove(node)
