"""Returns an ONNX model's outputs, with its indices compared by the values that they point at.

Where several values are the same, as many zeros after a ReLU, runtimes differ in which of them ArgMax, ArgMin and TopK
name first, and each is right. So an index of the reference counts as the model's own where, in the model itself, both
point at equal values (|a - b| <= TOLERANCE * max |values| + 1e-6): then the reference's stands in the outputs that this
returns. An index of a smaller or larger value stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeship.calibration.errors import StageError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.graph.operators import attribute
from edgeship.calibration.types import Array
from edgeship.pipeline.float_check import FLOOR, TOLERANCE
from edgeship.pipeline.onnx_form import infer_shapes, parse

_CHOOSERS = {"ArgMax": 0, "ArgMin": 0, "TopK": 1}
"""Which output of each operator has indices."""
_SAME_ORDER = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten"})
"""Operators between the indices and the graph's output that leave their order as it is."""


_PREFIX = "edgeship_values_of_"


@dataclass(frozen=True)
class _Choice:
    """Under which name the values are put out that an output's indices point into, and along which axis."""

    values: str
    axis: int


class IndexOutputs:
    """A model in ONNX Runtime, and those of its outputs that are indices, by name."""

    def __init__(self, model: ir.Model) -> None:
        from edgeship.targets.onnxruntime import open_reference

        observed = parse(to_bytes(model))
        infer_shapes(observed)
        self._choices = _choices(observed)
        self._session = open_reference(to_bytes(observed), 1)

    @property
    def names(self) -> tuple[str, ...]:
        """The outputs that are indices."""
        return tuple(self._choices)

    def run(self, feeds: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Array]:
        """The model's own outputs by name, with the `expected` index wherever it points at an equal value."""
        every = self._session.run(feeds)
        found = {name: values for name, values in every.items() if not name.startswith(_PREFIX)}
        for name, choice in self._choices.items():
            if name in expected and expected[name].shape == found[name].shape:
                found[name] = _settled(expected[name], found[name], every[choice.values], choice.axis)
        return found

    def check(self, expected: Mapping[str, Array], found: Mapping[str, Array], what: str) -> None:
        """Raises StageError for an index that is another one in what `run` returned; `what` names the step."""
        for name in self.names:
            if name not in expected or expected[name].shape != found[name].shape:
                continue  # no outputs to compare: `check_agreement` says so
            others = np.argwhere(expected[name] != found[name])
            if len(others):
                place = tuple(int(each) for each in others[0])
                raise StageError(
                    f"{what} changed output {name!r}, an index: {expected[name][place]} at {list(place)} became "
                    f"{found[name][place]}, which points at another value; accepted: the same index, or that of an "
                    "equal value"
                )


def _choices(model: ir.Model) -> dict[str, _Choice]:
    """What each index output chooses from; those values become outputs of `model` as well."""
    choices: dict[str, _Choice] = {}
    for output in list(model.graph.outputs):
        value: ir.Value | None = output
        while value is not None and (node := value.producer()) is not None and node.op_type in _SAME_ORDER:
            value = node.inputs[0]
        node = None if value is None else value.producer()
        if value is None or node is None or _CHOOSERS.get(node.op_type) != value.index() or node.inputs[0] is None:
            continue
        copy = ir.node("Identity", [node.inputs[0]])
        copy.outputs[0].name = f"{_PREFIX}{output.name}"
        copy.outputs[0].type, copy.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape
        model.graph.append(copy)
        model.graph.outputs.append(copy.outputs[0])
        axis = attribute(node, "axis", -1 if node.op_type == "TopK" else 0)
        choices[str(output.name)] = _Choice(str(copy.outputs[0].name), axis)
    return choices


def _settled(expected: Array, found: Array, values: Array, axis: int) -> Array:
    """`found` with the `expected` index where both point at equal `values`."""
    axis %= values.ndim
    shape = (*values.shape[:axis], -1, *values.shape[axis + 1 :])
    ours, theirs = (each.astype(np.int64).reshape(shape) for each in (found, expected))
    usable = (theirs >= 0) & (theirs < values.shape[axis])
    real = values.astype(np.float64)
    finite = np.abs(real[np.isfinite(real)])
    allowed = TOLERANCE * float(finite.max(initial=0.0)) + FLOOR
    one = np.take_along_axis(real, ours, axis)
    other = np.take_along_axis(real, np.where(usable, theirs, 0), axis)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        equal = usable & ((one == other) | (np.abs(one - other) <= allowed))
    return np.where(equal.reshape(found.shape), expected, found)
