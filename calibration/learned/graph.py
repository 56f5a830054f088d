"""An ONNX graph as a torch module: the same operators in the same order, with gradients.

Values keep their ONNX names. Whatever has a name can be given from outside (a weight that is being learnt, a scale);
what is given is not computed. QuantizeLinear and DequantizeLinear in a row become one fake quantization.

Many graphs are exported with a batch of 1, some with this 1 inside a Reshape. A larger batch runs through `torch.vmap`:
as if every sample ran alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgeship.calibration.errors import InputError, UnsupportedError
from edgeship.calibration.graph.operators import constant_array, node_key, value_name
from edgeship.calibration.learned.call import Call, Operator
from edgeship.calibration.learned.operators import OPERATORS
from edgeship.calibration.learned.operators.quantization import fake_quantize
from edgeship.calibration.types import Finding


@dataclass(frozen=True, eq=False)
class Step:
    """One node, ready to run; `dead` are the values that nothing after it reads."""

    name: str
    op_type: str
    function: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...] = ()


class TorchGraph(nn.Module):
    """Computes the outputs of an ONNX model (float or QDQ); its constants are buffers, nothing in it is trained.

    Raises UnsupportedError for a graph with operators that are not in `OPERATORS`, naming all of them.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.opset = int(model.opset_imports.get("", 0))
        self.inputs = tuple(value_name(v) for v in model.graph.inputs if not v.is_initializer())
        self.outputs = tuple(value_name(value) for value in model.graph.outputs)
        batches = {v.shape[0] for v in model.graph.inputs if not v.is_initializer() and v.shape}
        self.single = batches == {1}
        self._buffers_by_value: dict[str, str] = {}
        self._settings: dict[str, Tensor] = {}
        for value in _constants(model.graph):
            self._keep(value_name(value), constant_array(value))
        check_operators(model)
        self.steps = _steps(model.graph, set(self.outputs))

    def forward(
        self, feeds: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None, keep: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The outputs by name, and the values in `keep`; `given` replaces values of the graph by name.

        Samples run side by side along the first axis, also where the graph was exported for a single one.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise InputError(f"no values for the model's inputs {', '.join(missing)}")
        wanted = (*self.outputs, *keep)
        if not self.single or all(feeds[name].shape[0] == 1 for name in self.inputs):
            return self._run({name: feeds[name] for name in self.inputs}, given or {}, wanted)

        def alone(sample: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._run({name: value.unsqueeze(0) for name, value in sample.items()}, given or {}, wanted)

        many = torch.vmap(alone)({name: feeds[name] for name in self.inputs})
        return {name: value.flatten(0, 1) for name, value in many.items()}

    def constants(self) -> dict[str, Tensor]:
        """The values known before anything runs, by name."""
        found = {name: self.get_buffer(buffer) for name, buffer in self._buffers_by_value.items()}
        return {**found, **self._settings}

    def run_step(self, step: Step, values: MutableMapping[str, Tensor]) -> None:
        """Nothing; the results of `step` are in `values`, where its inputs were."""
        inputs = [None if name is None else values[name] for name in step.inputs]
        call = Call(step.name, step.op_type, self.opset, step.attributes, inputs, len(step.outputs))
        result = step.function(call)
        results = (result,) if isinstance(result, Tensor) else result
        values.update((name, value) for name, value in zip(step.outputs, results, strict=False) if name)

    def _run(
        self, feeds: Mapping[str, Tensor], given: Mapping[str, Tensor], wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        values = {**self.constants(), **feeds, **given}
        kept = {*wanted, *given}
        for step in self.steps:
            if not all(name in given for name in step.outputs):
                self.run_step(step, values)
            for name in step.dead:
                if name not in kept:
                    values.pop(name, None)
        return {name: values[name] for name in wanted}

    def _keep(self, name: str, array: Any) -> None:
        array = np.array(array)  # a copy: the model's own may be read-only
        if array.dtype not in _TORCH_TYPES:
            raise InputError(f"constant {name} has type {array.dtype}; accepted: {', '.join(map(str, _TORCH_TYPES))}")
        tensor = torch.from_numpy(array)
        if array.dtype == np.float32:
            buffer = f"constant_{len(self._buffers_by_value)}"
            self.register_buffer(buffer, tensor, persistent=False)
            self._buffers_by_value[name] = buffer
        else:
            # Shapes, axes and zero points steer the operators from Python: they stay where Python is.
            self._settings[name] = tensor


_TORCH_TYPES = tuple(map(np.dtype, ("f4", "f8", "f2", "?", "i8", "i4", "i2", "i1", "u1", "u2")))


def check_operators(model: ir.Model) -> None:
    """Nothing. Raises UnsupportedError with every operator of the graph that torch cannot run here."""
    findings = []
    for node in model.graph:
        standard = node.domain in {"", "ai.onnx"}
        if not (standard and (node.op_type in OPERATORS or node.op_type == "Constant")):
            name = node.op_type if standard else f"{node.domain}.{node.op_type}"
            findings.append(Finding(f"node {node_key(node)}", f"{name} has no form in torch here"))
    if findings:
        raise UnsupportedError(
            f"learning runs the model in torch, with the operators {', '.join(sorted(OPERATORS))}; it refuses",
            findings,
        )


def _constants(graph: ir.Graph) -> list[ir.Value]:
    found = list(graph.initializers.values())
    for node in graph:
        if node.op_type == "Constant":
            found.extend(node.outputs)
    return found


def _steps(graph: ir.Graph, outputs: set[str]) -> list[Step]:
    steps: list[Step] = []
    fused: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Constant" or node in fused:
            continue
        reader = _dequantizer_of(node)
        if reader is not None:
            fused.add(reader)
        results = (reader or node).outputs
        steps.append(
            Step(
                node_key(node),
                node.op_type,
                OPERATORS[node.op_type] if reader is None else fake_quantize,
                {name: attribute.value for name, attribute in node.attributes.items()},
                tuple(None if value is None else value_name(value) for value in node.inputs),
                tuple(value.name or "" for value in results),
            )
        )
    return _with_deaths(steps, outputs)


def _with_deaths(steps: Sequence[Step], outputs: set[str]) -> list[Step]:
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        for name in (*step.inputs, *step.outputs):
            if name:
                last[name] = i
    dead: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in outputs:
            dead.setdefault(i, []).append(name)
    return [
        Step(s.name, s.op_type, s.function, s.attributes, s.inputs, s.outputs, tuple(dead.get(i, ())))
        for i, s in enumerate(steps)
    ]


def _dequantizer_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that alone reads a QuantizeLinear, one scale for the whole tensor, the same for both."""
    if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "DequantizeLinear":
        return None
    reader = uses[0][0]
    scale, zero_point = (constant_array(value) for value in (*node.inputs[1:3], *[None] * (3 - len(node.inputs))))
    same = [_same(a, b) for a, b in zip(node.inputs[1:], reader.inputs[1:], strict=False)]
    whole = scale is not None and scale.size == 1 and (len(node.inputs) < 3 or zero_point is not None)
    return reader if whole and len(node.inputs) == len(reader.inputs) and all(same) else None


def _same(a: ir.Value | None, b: ir.Value | None) -> bool:
    first, second = constant_array(a), constant_array(b)
    return a is b or (first is not None and second is not None and np.array_equal(first, second))
