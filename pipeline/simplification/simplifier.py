"""Returns a float graph in the form the quantizer and the targets want, with a record of what was done to it.

onnxsim goes first, in a child process; where it crashes, hangs, runs out of memory or changes the numbers, the graph
goes on without it and a note says so. Then come the rewrites of this package. The result is compared with the
original on given and seeded random inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeship.calibration.errors import EdgeshipError, StageError
from edgeship.calibration.graph.onnx_file import to_bytes
from edgeship.calibration.types import Array
from edgeship.pipeline.float_check import check_sessions, random_feeds
from edgeship.pipeline.isolation import Limits, run_isolated
from edgeship.pipeline.onnx_form import parse, plain_form, run_passes
from edgeship.pipeline.onnx_source import SMALLEST_OPSET, upgrade

_RANDOM_INPUTS = 2


@dataclass(frozen=True)
class Simplified:
    """The model, the operators before and after, how often each rewrite was applied, and remarks."""

    model: ir.Model
    before: Mapping[str, int]
    after: Mapping[str, int]
    rewrites: Mapping[str, int]
    notes: tuple[str, ...] = ()
    largest_error: float = 0.0

    @property
    def done(self) -> list[str]:
        """What was done, in words, one entry for each rewrite."""
        return [f"{name}: {count}" for name, count in self.rewrites.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain values for simplify.json."""
        return {
            "operators": {"before": dict(self.before), "after": dict(self.after)},
            "rewrites": dict(self.rewrites),
            "notes": list(self.notes),
            "largest_relative_error": self.largest_error,
        }


@dataclass
class _Notes:
    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)


def simplify_model(
    model: ir.Model | bytes,
    *,
    feeds: Sequence[Mapping[str, Array]] = (),
    onnxsim: bool = True,
    limits: Limits | None = None,
) -> Simplified:
    """`model` (not modified) simplified, with shape and type of every value; names and metadata are kept.

    `feeds` are inputs to compare on besides two random ones. Raises InputError for a model that cannot be simplified or
    run, StageError when the result does not compute the same.
    """
    from edgeship.targets.onnxruntime import open_reference

    start = _prepared(parse(to_bytes(model) if isinstance(model, ir.Model) else model))
    original = to_bytes(start)
    inputs = [*feeds, *random_feeds(start, _RANDOM_INPUTS)]
    reference = open_reference(original, 1)
    notes = _Notes()
    candidate = _after_onnxsim(original, inputs, limits, notes) if onnxsim else None
    result = parse(original) if candidate is None else candidate
    applied = _rewrite(result)
    _restore(result, start)
    _check_values(result, notes)
    worst = check_sessions(reference, open_reference(to_bytes(result), 1), inputs, "simplification")
    before, after = operators(start), operators(result)
    return Simplified(result, before, after, dict(sorted(applied.items())), tuple(notes.texts), worst)


def _rewrite(model: ir.Model) -> Counter[str]:
    from edgeship.pipeline.simplification.rewrites import apply_rewrites

    return apply_rewrites(model)


def _after_onnxsim(
    original: bytes, inputs: Sequence[Mapping[str, Array]], limits: Limits | None, notes: _Notes
) -> ir.Model | None:
    """The model as onnxsim leaves it; None, with a note, where that is of no use."""
    from edgeship.pipeline.simplification.onnxsim_step import run_onnxsim
    from edgeship.targets.onnxruntime import open_reference

    try:
        content = run_isolated(run_onnxsim, original, limits=limits)
        result = parse(content)
        foreign = {node.domain for node in result.graph} - {node.domain for node in parse(original).graph}
        if foreign:
            raise StageError(f"onnxsim brought in operators of {', '.join(sorted(foreign))}")
        check_sessions(open_reference(original, 1), open_reference(content, 1), inputs, "onnxsim")
    except EdgeshipError as error:
        notes.add(f"went on without onnxsim: {error}")
        return None
    return result


def _prepared(model: ir.Model) -> ir.Model:
    """The model with its weights apart from its inputs, without functions, at opset 17 or later."""
    run_passes(model, passes.InlinePass(), passes.RemoveInitializersFromInputsPass())
    if model.opset_imports.get("", 0) >= SMALLEST_OPSET:
        return model
    upgraded, _ = upgrade(model)
    return upgraded


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes there are of each operator, most frequent first."""
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _restore(model: ir.Model, original: ir.Model) -> None:
    """Puts `model` (in place) in plain form, with the facts about the model that a rewrite may lose."""
    model.metadata_props.clear()
    model.metadata_props.update(original.metadata_props)
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.domain, model.graph.name = original.domain, original.graph.name
    model.ir_version = original.ir_version
    plain_form(model)


def _check_values(model: ir.Model, notes: _Notes) -> None:
    """Raises StageError where a value has no type or rank: the quantizer and the targets need both."""
    lost = [
        value
        for node in model.graph
        for value in node.outputs
        if value.name and (value.dtype is None or value.shape is None)
    ]
    if lost:
        first = ", ".join(f"{value.name} ({_made_by(value)})" for value in lost[:3])
        raise StageError(f"{len(lost)} values have no inferable shape or type, first {first}")
    batch = {str(value.shape[0]) for value in model.graph.inputs if value.shape and not isinstance(value.shape[0], int)}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and any(
                not isinstance(size, int) for size in list(value.shape)[1 if batch else 0 :]
            ):
                notes.add(f"the shape of {value.name} ({_made_by(value)}) is not static: {value.shape}")


def _made_by(value: ir.Value) -> str:
    node = value.producer()
    return node.op_type if node is not None else "input"
