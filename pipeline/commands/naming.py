"""Returns a model under the names that another one has for its input and its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array, Session, TensorInfo


class Renamed:
    """A session whose inputs and outputs have other names; `inputs` and `outputs` give them by the session's own."""

    def __init__(self, session: Session, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self._session = session
        self._inputs, self._outputs = inputs, outputs

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs by their other names."""
        return [replace(info, name=self._inputs[info.name]) for info in self._session.inputs]

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The outputs by their other names."""
        return [replace(info, name=self._outputs[info.name]) for info in self._session.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by their other names for one batch of inputs by theirs."""
        found = self._session.run({own: feeds[other] for own, other in self._inputs.items()})
        return {self._outputs[name]: values for name, values in found.items()}


def other_names(a: Sequence[TensorInfo], b: Sequence[TensorInfo], what: str) -> dict[str, str]:
    """The name in `a` of each tensor of `b`: the same, or of the only one. `what`: "input" or "output".

    Raises InputError where there are several of other names: their order means nothing.
    """
    names, others = [info.name for info in a], [info.name for info in b]
    if set(names) == set(others):
        return {name: name for name in names}
    if len(names) == len(others) == 1:
        return {others[0]: names[0]}
    raise InputError(
        f"the models have other {what}s: {', '.join(names)}, and {', '.join(others)}; accepted: the same names, or one "
        f"{what} each"
    )
