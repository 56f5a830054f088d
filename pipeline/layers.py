"""Returns how two models differ layer by layer, and which layer makes its difference by itself.

Rounding differences of one step grow from layer to layer, so the outputs alone do not tell a wrong kernel from honest
rounding. Against a QDQ model each layer is therefore judged twice: by what has accumulated up to it, and by its *own*
difference, the reference layer computing from exactly what the artifact's layer saw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.readback.exact import is_whole, operator_of
from edgeship.calibration.types import Array, TensorInfo
from edgeship.pipeline.compare import Difference, OutputComparison
from edgeship.pipeline.explanation import RangeUse, Use, explain

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeship.calibration.types import Session

_MOVERS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""They compute nothing; an artifact may hold their outputs in an order of its own."""
_FED = "__fed"
BUDGET = 2.0
"""Steps that kernels' own rounding may be off by."""


class Layers(Protocol):
    """A model whose every tensor can be seen."""

    @property
    def inputs(self) -> Sequence[TensorInfo]:
        """The inputs."""

    @property
    def steps(self) -> Mapping[str, float]:
        """The scale of each quantized tensor by name."""

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """What each quantized tensor can represent, by name."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every computed tensor by name, as real numbers."""


@dataclass(frozen=True)
class LayerDifference:
    """One layer: what has accumulated up to its output, and what it adds by itself (None: not known)."""

    name: str
    operator: str
    difference: Difference
    own: Difference | None
    use: Use | None = None


def open_layers(path: Path, *, as_reference: bool) -> Layers:
    """The model with every tensor visible; an ONNX model with graph optimisations off where it is the reference.

    Raises InputError for a file that is neither ONNX nor TFLite.
    """
    if path.suffix == ".onnx":
        return OnnxLayers(path, optimise=not as_reference)
    if path.suffix == ".tflite":
        from edgeship.targets.tflite.layers import TFLiteLayers

        return TFLiteLayers(path)
    raise InputError(f"--layers compares .onnx and .tflite files, whose tensors have names; seen: {path}")


class OnnxLayers:
    """An ONNX model with its tensors as outputs: of a QDQ model those that a layer reads, of a float model all."""

    def __init__(self, path: Path, *, optimise: bool) -> None:
        """Loads `path`. Raises InputError for a file that is no model."""
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.targets.onnxruntime import OnnxSession

        model = _load(path)
        boundaries = _boundaries(model)
        values = _float_values(model)
        self.operators = {name: b.operator for name, b in boundaries.items()} or _operators(values)
        self.steps: Mapping[str, float] = {name: b.scale for name, b in boundaries.items()}
        self.ranges: Mapping[str, tuple[float, float]] = {name: b.range for name, b in boundaries.items()}
        self.aliases = {name: b.real for name, b in boundaries.items()}
        self._path = path
        shown = [name for name in values if not boundaries or name in boundaries or values[name].is_graph_output()]
        model.graph.outputs[:] = [values[name] for name in shown]
        self._session: Session = OnnxSession(to_bytes(model), optimise=optimise)
        self.inputs = self._session.inputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every shown tensor by name."""
        return self._session.run(feeds)

    def fed(self, ranks: Mapping[str, int]) -> Session | None:
        """A session in which each layer reads `NAME__fed` inputs instead of what was computed; None for a float model.

        Its outputs are the tensors in `ranks`, which says how many axes each has: the file need not tell.
        """
        from edgeship.calibration.graph.onnx_file import to_bytes
        from edgeship.targets.onnxruntime import open_reference

        model = _load(self._path)
        boundaries = _boundaries(model)
        if not boundaries:
            return None
        values = _float_values(model)
        for name, rank in ranks.items():
            _cut(model, values[name], rank)
        model.graph.outputs[:] = [values[name] for name in ranks]
        _drop_idle_inputs(model)
        return open_reference(to_bytes(model))


def _load(path: Path) -> ir.Model:
    """The model in the file; with operators that take scales themselves as QDQ, whose layers give real numbers."""
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.calibration.readback import QOPERATORS, read_back

    model = load_onnx(path)
    return read_back(model) if any(node.op_type in QOPERATORS for node in model.graph) else model


@dataclass(frozen=True)
class _Boundary:
    """An activation between layers: the name of the tensor that is quantized, its parameters, and who computes it."""

    real: str
    scale: float
    operator: str
    range: tuple[float, float]


def _boundaries(model: ir.Model) -> dict[str, _Boundary]:
    """By the name of what layers read, the output of DequantizeLinear, for every computed activation."""
    import onnx_ir as ir

    found: dict[str, _Boundary] = {}
    for node in model.graph:
        source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if source is None or source.op_type != "QuantizeLinear" or source.inputs[0] is None or is_whole(node, source):
            continue
        maker, scale = source.inputs[0].producer(), node.inputs[1]
        constant = None if scale is None else ir.convenience.get_const_tensor(scale)
        if maker is None or constant is None or constant.size != 1:
            continue
        name, step = str(node.outputs[0].name), float(constant.numpy().reshape(()))
        found[name] = _Boundary(str(source.inputs[0].name), step, operator_of(maker), _representable(node, step))
    return found


def _representable(dequantize: ir.Node, step: float) -> tuple[float, float]:
    """The smallest and largest number that a DequantizeLinear's integers stand for."""
    import onnx_ir as ir

    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    constant = None if zero is None else ir.convenience.get_const_tensor(zero)
    integer = np.zeros((), np.uint8) if constant is None else constant.numpy().reshape(())
    limits = np.iinfo(integer.dtype)
    return (limits.min - int(integer)) * step, (limits.max - int(integer)) * step


def _float_values(model: ir.Model) -> dict[str, ir.Value]:
    import onnx_ir as ir

    return {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype in (None, ir.DataType.FLOAT)
    }


def _operators(values: Mapping[str, ir.Value]) -> dict[str, str]:
    return {name: producer.op_type for name, value in values.items() if (producer := value.producer()) is not None}


def _cut(model: ir.Model, value: ir.Value, rank: int) -> None:
    """Lets every reader of `value` read a new graph input instead."""
    import onnx_ir as ir

    shape = ir.Shape([None] * rank) if value.shape is None else value.shape
    given = ir.Value(name=f"{value.name}{_FED}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    uses = list(value.uses())
    for node, index in uses:
        node.replace_input_with(index, given)
    if _feed_integers(model.graph, value, given) or uses:
        model.graph.inputs.append(given)


def _feed_integers(graph: ir.Graph, value: ir.Value, given: ir.Value) -> bool:
    """Lets those that read a layer's integers in another way than `value` does read the integers of what is given."""
    import onnx_ir as ir

    dequantize = value.producer()
    integers = None if dequantize is None else dequantize.inputs[0]
    source = None if integers is None else integers.producer()
    if source is None or integers is None or source.op_type != "QuantizeLinear":
        return False
    others = [node for node, _ in integers.uses() if node.op_type == "DequantizeLinear" and is_whole(node, source)]
    if others:
        made = ir.Value(name=f"{integers.name}{_FED}", type=integers.type, shape=integers.shape)
        graph.insert_before(graph[0], ir.node("QuantizeLinear", [given, *source.inputs[1:]], outputs=[made]))
        for node in others:
            node.replace_input_with(0, made)
    return bool(others)


def _drop_idle_inputs(model: ir.Model) -> None:
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)


@dataclass
class LayerComparison:
    """The layers that two models have in common, compared over samples; `a` is the reference.

    `inputs`: what `a` calls the inputs of `b`, by their names in `b`; the same where it is not told.
    """

    a: Layers
    b: Layers
    inputs: Mapping[str, str] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _total: dict[str, OutputComparison] = field(default_factory=dict)
    _own: dict[str, OutputComparison] = field(default_factory=dict)
    _use: dict[str, RangeUse] = field(default_factory=dict)
    _fed: Session | None = None

    def update(self, feeds: Mapping[str, Array]) -> None:
        """Takes in one sample. Raises InputError when the models have no tensor in common."""
        others = {own: feeds[name] for own, name in self.inputs.items()} or feeds
        reference, seen = self.a.run(feeds), self.b.run(others)
        if not self._names:
            self._match(reference, seen)
        arranged = {}
        for name, theirs in self._names.items():
            arranged[name] = np.transpose(seen[theirs], self._axes[name])
            self._total[name].update(reference[name], arranged[name])
            if name in self._use:
                self._use[name].update(reference[name], arranged[name])
        if self._fed is not None:
            wanted = {info.name for info in self._fed.inputs}
            given = {f"{name}{_FED}": values for name, values in arranged.items()}
            inputs = {name: values for name, values in {**given, **feeds}.items() if name in wanted}
            for name, values in self._fed.run(inputs).items():
                self._own[name].update(values, arranged[name])

    def _match(self, reference: Mapping[str, Array], seen: Mapping[str, Array]) -> None:
        operators = getattr(self.a, "operators", {})
        aliases: Mapping[str, str] = getattr(self.a, "aliases", {})
        quantized = {real: name for name, real in getattr(self.b, "aliases", {}).items()}
        for name, values in reference.items():
            real = aliases.get(name, name)
            theirs = next((n for n in (name, real, f"{name}__float", quantized.get(real, "")) if n in seen), None)
            axes = None if theirs is None else _axes(values, seen[theirs])
            if theirs is None or axes is None or operators.get(name) in _MOVERS:
                continue
            self._names[name], self._axes[name] = theirs, axes
            step = self.a.steps.get(name) or self.b.steps.get(theirs) or 0.0
            self._total[name] = OutputComparison(name, step)
            self._own[name] = OutputComparison(name, step)
            ends = self.a.ranges.get(name) or self.b.ranges.get(theirs)
            if ends and step:
                self._use[name] = RangeUse(*ends, step)
        if not self._names:
            raise InputError("the models have no tensor name in common; compare them without --layers")
        if isinstance(self.a, OnnxLayers) and self.a.steps:
            self._fed = self.a.fed({name: reference[name].ndim for name in self._names if name in self.a.steps})

    def result(self) -> list[LayerDifference]:
        """Every layer in the order of the reference."""
        operators = getattr(self.a, "operators", {})
        own = {info.name for info in self._fed.outputs} if self._fed is not None else set()
        return [
            LayerDifference(
                name,
                operators.get(name, ""),
                total.result(),
                self._own[name].result() if name in own else None,
                self._use[name].result() if name in self._use else None,
            )
            for name, total in self._total.items()
        ]


def _axes(reference: Array, seen: Array) -> tuple[int, ...] | None:
    """The order of `seen`'s axes that gives the reference's shape: as they are, channels last, or else the closest."""
    rank = reference.ndim
    if seen.ndim != rank:
        return None
    usual: list[tuple[int, ...]] = [tuple(range(rank))]
    if rank > 2:
        usual.append((0, rank - 1, *range(1, rank - 1)))
    every: Iterable[tuple[int, ...]] = itertools.permutations(range(rank)) if rank <= 4 else iter(usual)
    fitting = [axes for axes in dict.fromkeys([*usual, *every]) if np.transpose(seen, axes).shape == reference.shape]
    if not fitting:
        return None
    if len(fitting) == 1:
        return fitting[0]
    errors = [float(np.abs(np.transpose(seen, axes).astype(np.float64) - reference).mean()) for axes in fitting]
    return fitting[int(np.argmin(errors))]


def describe(layers: Sequence[LayerDifference], budget: float = BUDGET) -> str:
    """The layers as a table, and in words where they begin to differ and which layer is off by itself."""
    width = max(len(layer.name) for layer in layers)
    kind = max(len(layer.operator) for layer in layers)
    head = f"  {'layer':<{width}}  {'operator':<{kind}}  {'max':>7} {'mean':>7} steps  {'SQNR':>8}"
    head += f" {'cosine':>8} {'satur.':>7}"
    lines = [head + "  own max    mean steps" if any(layer.own for layer in layers) else head]
    for layer in layers:
        total = layer.difference
        sqnr = "equal" if np.isinf(total.sqnr_db) and total.sqnr_db > 0 else f"{total.sqnr_db:.1f} dB"
        row = f"  {layer.name:<{width}}  {layer.operator:<{kind}}  {total.max_steps:7.3g} {total.mean_steps:7.3g}"
        row += f"        {sqnr:>8} {total.cosine:8.5f} {layer.use.saturated if layer.use else '-':>7}"
        lines.append(row + (f"  {layer.own.max_steps:7.3g} {layer.own.mean_steps:7.3g}" if layer.own else ""))
    return "\n".join([*lines, *_verdict(layers, budget), *(f"  {line}" for line in explain(layers, budget))])


def _verdict(layers: Iterable[LayerDifference], budget: float) -> list[str]:
    every = list(layers)
    lines = []
    first = next((layer for layer in every if layer.difference.max_steps > budget), None)
    if first is not None:
        lines.append(f"  first over {budget:g} steps: {first.name} ({first.operator})")
    judged = [layer for layer in every if layer.own is not None]
    if judged:
        wrong = [layer for layer in judged if layer.own is not None and layer.own.max_steps > budget]
        if wrong:
            names = ", ".join(f"{layer.name} ({layer.operator})" for layer in wrong[:5])
            lines.append(f"  off by more than {budget:g} steps by themselves: {names}")
        else:
            lines.append(
                f"  no layer is off by more than {budget:g} steps by itself: what is above is accumulated rounding"
            )
    return lines


def to_json(layer: LayerDifference) -> dict[str, Any]:
    """The layer as plain values."""
    own = None if layer.own is None else layer.own.to_json()
    use = {} if layer.use is None else layer.use.to_json()
    return {"name": layer.name, "operator": layer.operator, **layer.difference.to_json(), **use, "own": own}


def steps_of(model: Path) -> dict[str, float]:
    """The quantization step of each output of a QDQ model; empty for any other file."""
    if model.suffix != ".onnx":
        return {}
    from edgeship.calibration.graph.onnx_file import load_onnx
    from edgeship.calibration.writing.qdq import output_steps

    return output_steps(load_onnx(model))
