"""Serializes a model with tensors from inside it as its outputs, so that a runtime hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import value_name
from edgeship.calibration.types import Array

if TYPE_CHECKING:
    import onnx

_NUMPY = frozenset(
    {ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT64")}
)
_LARGE = 1024
"""Bytes of a tensor. Smaller ones (shapes, scales, bounds) decide how a runtime reads the graph, and stay in it."""


class Exposer:
    """A model that can be had with any of its tensors as the only outputs; it is serialized once, without its weights.

    What two messages hold, one after the other in one file, is what a message with the repeated fields of both holds
    (Protocol Buffers, "Encoding", Last One Wins): a graph's outputs may follow the rest of it.

    `weights` are the values by name of the initializers that the serialized model only names, as external data: a
    session can take them from memory, where they are already.
    """

    def __init__(self, model: ir.Model) -> None:
        proto = ir.to_proto(model)
        del proto.graph.output[:]
        self.weights: dict[str, Array] = {}
        for tensor in proto.graph.initializer:
            held = model.graph.initializers[tensor.name].const_value
            if held is not None and held.nbytes >= _LARGE and held.dtype in _NUMPY:
                self.weights[tensor.name] = np.ascontiguousarray(held.numpy())
                _take_out(tensor, held.nbytes)
        self._rest: bytes = proto.SerializeToString()
        self._types = {
            value_name(value): value.dtype or ir.DataType.FLOAT
            for node in model.graph
            for value in node.outputs
            if value.name
        }

    def __call__(self, names: Sequence[str]) -> bytes:
        """The model with the tensors `names` as outputs. Raises InputError for an unknown name."""
        import onnx

        unknown = [name for name in names if name not in self._types]
        if unknown:
            raise InputError(f"the model has no tensors called {', '.join(unknown)}")
        outputs = onnx.ModelProto()
        for name in names:
            outputs.graph.output.add(name=name).type.tensor_type.elem_type = int(self._types[name])
        return self._rest + bytes(outputs.SerializeToString())


def _take_out(tensor: onnx.TensorProto, size: int) -> None:
    """Nothing; the tensor only names its values from here on."""
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    for key, text in (("location", "memory"), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=text)
