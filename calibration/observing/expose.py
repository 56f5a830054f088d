"""Serializes a model with tensors from inside it as its outputs, so that a runtime hands them out."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgeship.calibration.errors import InputError
from edgeship.calibration.graph.operators import value_name


class Exposer:
    """A model that can be had with any of its tensors as the only outputs; it is turned into a message once."""

    def __init__(self, model: ir.Model) -> None:
        self._proto = ir.to_proto(model)
        self._types = {
            value_name(value): value.dtype or ir.DataType.FLOAT
            for node in model.graph
            for value in node.outputs
            if value.name
        }

    def __call__(self, names: Sequence[str]) -> bytes:
        """The model with the tensors `names` as outputs. Raises InputError for an unknown name."""
        unknown = [name for name in names if name not in self._types]
        if unknown:
            raise InputError(f"the model has no tensors called {', '.join(unknown)}")
        del self._proto.graph.output[:]
        for name in names:
            self._proto.graph.output.add(name=name).type.tensor_type.elem_type = int(self._types[name])
        return bytes(self._proto.SerializeToString())
