"""Returns why a runtime executes layers of a quantized model in float: the plan's reasons, or the target's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import Finding

QUANTIZED = "quantized in the model, and no integer kernel of the runtime takes it"
"""The reason where neither the plan nor the target knows one."""
_FUSED = frozenset({"Add", "Clip", "DequantizeLinear", "Identity", "QuantizeLinear", "Relu", "Reshape", "Transpose"})
"""What a runtime can do as a part of the layer before it, so that the result has its name and not the layer's."""


@dataclass(frozen=True)
class FloatLayer:
    """A layer as the artifact calls it, the ONNX node it comes from and why it is float; None where not known."""

    layer: str
    node: str | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def explained(layers: Iterable[str], model: ir.Model, notes: Sequence[Finding]) -> list[FloatLayer]:
    """Each of the `layers` that an artifact of the quantized `model` has in float, named as `integer_share` does.

    `notes`: what the target itself says of the model.
    """
    from edgeship.calibration.graph.operators import node_key
    from edgeship.calibration.writing.qdq import float_nodes

    own = {finding.where: finding.rule for finding in notes}  # targets call a node as in: Conv 'name'
    planned = float_nodes(model)
    nodes = {node_key(node): node for node in model.graph}
    makers = {value.name: node for node in model.graph for value in node.outputs if value.name}
    found = []
    for layer in layers:
        node = nodes.get(layer.rpartition(" (")[0]) or nodes.get(layer) or _maker(layer, makers)
        if node is None:
            found.append(FloatLayer(layer, None, None))
            continue
        name = f"{node_key(node)} ({node.op_type})"
        told = own.get(f"{node.op_type} {node.name!r}")
        found.append(FloatLayer(layer, name, planned.get(node_key(node)) or told or QUANTIZED))
    return found


def _maker(layer: str, makers: Mapping[str, ir.Node]) -> ir.Node | None:
    """The node that makes the tensor called so, or called so before a suffix; the layer before it where it is fused."""
    from edgeship.calibration.graph.operators import MAC_OPERATORS

    node = makers.get(layer) or makers.get(layer.rpartition("/")[0])
    start = node
    while node is not None and node.op_type in _FUSED:
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node if node is not None and node.op_type in MAC_OPERATORS else start
