"""What an operator's function sees of its node: the attributes and the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.types import Finding


@dataclass(frozen=True, eq=False)
class Call:
    """One application of an operator; an absent optional input is None, `outputs` is how many results are read."""

    name: str
    op_type: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: Sequence[Tensor | None]
    outputs: int

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default`."""
        return self.attributes.get(name, default)

    def has(self, index: int) -> bool:
        """Whether input `index` is there."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def tensor(self, index: int = 0) -> Tensor:
        """Input `index`. Raises InputError when the node has none."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise InputError(f"node {self.name} ({self.op_type}): input {index} is missing")
        return value

    def optional(self, index: int) -> Tensor | None:
        """Input `index`, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def ints(self, index: int, attribute: str | None = None) -> list[int] | None:
        """The integers of input `index`, or of an older opset's `attribute`, or None where neither is given."""
        if self.has(index):
            return [int(value) for value in self.tensor(index).reshape(-1).tolist()]
        found = None if attribute is None else self.get(attribute)
        if found is None:
            return None
        return [int(value) for value in (found if isinstance(found, list | tuple) else [found])]

    def refuse(self, what: str, accepted: str) -> UnsupportedError:
        """The error for a form of the operator that is not here."""
        where = f"node {self.name} ({self.op_type})"
        return UnsupportedError("learning runs the model in torch, which refuses", [Finding(where, what, "", accepted)])


Operator = Callable[[Call], Tensor | Sequence[Tensor]]
