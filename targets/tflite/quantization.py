"""Which nodes run in integers, and the QUANTIZE and DEQUANTIZE operators where they meet float ones.

A node runs in int8 when what flows in and out of it is quantized and TFLite has the kernel. Operators that only move
values hand parameters on, so a missing pair of QuantizeLinear/DequantizeLinear around a Reshape costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgeship.calibration.types import Finding, QuantParams, TensorSpec
from edgeship.targets.tflite.graph import BITS, DEQUANTIZE, QUANTIZE, WIDE_BITS, Graph, Node, Tensor, constant
from edgeship.targets.tflite.hybrid import LAYERS, runs_hybrid
from edgeship.targets.tflite.op import Int8, Op

OpOf = Callable[[Node], Op | None]
SIXTEEN = TensorSpec(bits=WIDE_BITS)


def settle(graph: Graph, op_of: OpOf, *, integer_only: bool = False) -> None:
    """Marks the int8 nodes and writes the conversions between them and the float ones into the graph.

    `integer_only`: nodes are int8 wherever there is a kernel, also where real numbers are faster.
    """
    _spread(graph, op_of)
    borders, uses = _Borders(graph), graph.consumers()
    weights_only = not quantizes_activations(graph)
    for node in graph.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            borders.nodes.append(node)
            continue
        op = op_of(node)
        exact = _takes_integers(node, op)
        better = exact and _is_computed_with(uses.get(node.y, ()))
        if op and op.int8 and runs_in_integers(node, op) and (integer_only or not (better or _is_slow(node, op.int8))):
            node.int8 = True
            borders.integer(node, op.int8)
        elif op and weights_only and runs_hybrid(node, op):
            borders.hybrid(node)
        else:
            borders.real(node, keeps=exact)
    graph.nodes = borders.nodes
    graph.prune()


def runs_in_integers(node: Node, op: Op) -> bool:
    """Whether every real-valued tensor of the node is an int8 or int16 one and the kernel can take it."""
    rule = op.int8
    if rule is None:
        return False
    reals = [(i, t) for i, t in enumerate(node.inputs) if t is not None and t.is_float and not _is_free(rule, t, i)]
    reals += [(-1, t) for t in node.outputs if t.is_float]
    if not reals or any(tensor.quant is None for _, tensor in reals):
        return False
    if _widths(reals) == {BITS}:
        return op.int8_refusal(node) is None
    if rule.wide is None or op.int16_refusal(node) is not None:
        return False
    weights = [(i, t) for i, t in reals if i in rule.wide.weights and t.is_constant]
    others = [pair for pair in reals if pair not in weights]
    return _widths(others) == {WIDE_BITS} and _widths(weights) <= {BITS}


def _takes_integers(node: Node, op: Op | None) -> bool:
    """Whether a node in float takes the integers of its first input: exact, so better than a kernel where others
    compute with what it makes.
    """
    if op is None or op.reads_integers is None or not op.reads_integers(node):
        return False
    return not node.x.is_constant and node.x.quant is not None and node.x.quant.spec.bits == BITS


def _is_slow(node: Node, rule: Int8) -> bool:
    return _widths([(0, t) for t in node.outputs]) == {BITS} and rule.is_slow(node)


def _is_computed_with(readers: Sequence[Node]) -> bool:
    return any(node.op_type not in (QUANTIZE, DEQUANTIZE) for node in readers)


def _widths(tensors: Sequence[tuple[int, Tensor]]) -> set[int]:
    return {tensor.quant.spec.bits for _, tensor in tensors if tensor.quant}


def left_in_float(graph: Graph, op_of: OpOf) -> list[Finding]:
    """The nodes that run in real numbers though their computed operands and results are quantized, or their weights
    are where activations are too.
    """
    _spread(graph, op_of)
    static = quantizes_activations(graph)
    findings = []
    for node in graph.nodes:
        op = op_of(node)
        if op is None or node.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        computed = [t for t in (*node.tensors(), *node.outputs) if t.is_float and not t.is_constant]
        if static and (open_end := _open_end(node, computed)) is not None:
            findings.append(Finding(node.where, f"{open_end} is not quantized in the model, and its weights are"))
            continue
        if not computed or any(t.quant is None for t in computed) or runs_in_integers(node, op):
            continue
        is_wide = any(t.quant and t.quant.spec.bits == WIDE_BITS for t in computed)
        reason = op.int16_refusal(node) if is_wide else op.int8_refusal(node)
        reason = reason or "it has a constant operand that is not quantized, or operands of 8 and of 16 bits"
        findings.append(Finding(node.where, reason))
    return findings


def quantizes_activations(graph: Graph) -> bool:
    """Whether more than weights is quantized."""
    return any(tensor.quant for node in graph.nodes for tensor in node.outputs)


def _open_end(node: Node, computed: Sequence[Tensor]) -> str | None:
    """What is not quantized of a layer whose weights are; None for any other node."""
    weights = node.inputs[1] if node.op_type in LAYERS and len(node.inputs) > 1 else None
    if weights is None or not weights.is_constant or not weights.quant:
        return None
    missing = next((tensor for tensor in computed if tensor.quant is None), None)
    return None if missing is None else f"its {'result' if missing in node.outputs else 'input'} {missing.name}"


def _is_free(rule: Int8, tensor: Tensor, index: int) -> bool:
    return index in rule.real_inputs and tensor.is_constant


def _spread(graph: Graph, op_of: OpOf) -> None:
    """Lets parameters flow through operators that only move integers: forwards, then back where nobody else reads."""

    def moves(node: Node) -> bool:
        op = op_of(node)
        if not (op and op.int8 and op.int8.moves and node.x.is_float) or op.int8_refusal(node):
            return False
        widths = {t.quant.spec.bits for t in (node.x, node.y) if t.quant}
        return WIDE_BITS not in widths or op.int16_refusal(node) is None

    for node in graph.nodes:
        if moves(node) and node.x.quant and node.x.quant.spec.axis is None and not _others(node):
            for tensor in node.outputs:
                tensor.quant = tensor.quant or node.x.quant
    uses, kept = graph.consumers(), {*graph.outputs.values(), *graph.inputs.values()}
    for node in reversed(graph.nodes):
        if not moves(node) or node.x.quant or node.x in kept or node.x.is_constant or len(uses[node.x]) != 1:
            continue
        quant = node.y.quant
        if quant and len(node.outputs) == 1 and not _others(node):
            node.x.quant = quant


def _others(node: Node) -> bool:
    """Whether the node has further computed real-valued inputs (Concat), so that one input does not speak for it."""
    return any(t is not None and t.is_float and not t.is_constant for t in node.inputs[1:])


class _Borders:
    """The nodes so far, with the conversions that they need before and after."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.kept = set(graph.outputs.values())
        self.reals: dict[Tensor, Tensor] = {}
        self.requantized: dict[tuple[Tensor, bytes], Tensor] = {}

    def integer(self, node: Node, rule: Int8) -> None:
        """Adds an int8 node; where the kernel's demands on scales are not met, the difference is requantized."""
        after: list[Node] = []
        fixed = rule.wide.fixed_output if node.is_wide and rule.wide else rule.fixed_output
        if fixed:
            spec = SIXTEEN if node.is_wide else TensorSpec()
            wanted = QuantParams(np.array(fixed.scale), np.array(fixed.zero_point), spec)
            after = self._outputs_as(node, wanted)
        elif rule.ties(node):
            data = [i for i, t in enumerate(node.inputs) if t is not None and t.is_float and i not in rule.real_inputs]
            if len(data) > 1 and node.y.quant:
                self._inputs_as(node, data, node.y.quant)
            elif node.x.quant:
                after = self._outputs_as(node, node.x.quant)
        self.nodes += [node, *after]

    def real(self, node: Node, *, keeps: bool = False) -> None:
        """Adds a float node: its integer inputs are dequantized (`keeps`: not the first), its outputs quantized."""
        first = node.inputs[:1] if keeps else []
        rest = node.inputs[len(first) :]
        node.inputs = [*first, *(self._real(t) if t is not None and t.quant else t for t in rest)]
        self.nodes.append(node)
        for index, tensor in enumerate(node.outputs):
            if tensor.quant:
                real = Tensor(f"{tensor.name}/float", tensor.shape, tensor.dtype, signature=tensor.signature)
                node.outputs[index] = real
                self.nodes.append(Node(QUANTIZE, tensor.name, [real], [tensor], opset=node.opset))

    def hybrid(self, node: Node) -> None:
        """Adds a node with int8 weights and float activations."""
        weights = node.tensor(1)
        node.inputs = [t and (self._real(t) if t.quant else t) for t in node.inputs]
        node.inputs[1] = weights
        self.nodes.append(node)

    def _real(self, tensor: Tensor) -> Tensor:
        if tensor not in self.reals:
            if tensor.is_constant:
                self.reals[tensor] = constant(tensor.name, tensor.values())
            else:
                real = Tensor(f"{tensor.name}/float", tensor.shape, tensor.dtype, signature=tensor.signature)
                self.nodes.append(Node(DEQUANTIZE, tensor.name, [tensor], [real]))
                self.reals[tensor] = real
        return self.reals[tensor]

    def _inputs_as(self, node: Node, indices: Sequence[int], wanted: QuantParams) -> None:
        for index in indices:
            tensor = node.tensor(index)
            if tensor.quant and not matches(tensor.quant, wanted):
                node.inputs[index] = self._requantized(tensor, wanted)

    def _requantized(self, tensor: Tensor, wanted: QuantParams) -> Tensor:
        if tensor.is_constant:
            return constant(tensor.name, wanted.quantize(tensor.values()), wanted)
        key = (tensor, wanted.scale.tobytes() + wanted.zero_point.tobytes())
        if key not in self.requantized:
            same = Tensor(f"{tensor.name}/requantized", tensor.shape, tensor.dtype, wanted, signature=tensor.signature)
            self.nodes.append(Node(QUANTIZE, tensor.name, [tensor], [same]))
            self.requantized[key] = same
        return self.requantized[key]

    @staticmethod
    def _outputs_as(node: Node, wanted: QuantParams) -> list[Node]:
        after = []
        for index, tensor in enumerate(node.outputs):
            if tensor.quant and not matches(tensor.quant, wanted):
                own = Tensor(f"{tensor.name}/unscaled", tensor.shape, tensor.dtype, wanted, signature=tensor.signature)
                node.outputs[index] = own
                after.append(Node(QUANTIZE, tensor.name, [own], [tensor], opset=node.opset))
        return after


def matches(a: QuantParams, b: QuantParams) -> bool:
    """Whether a TFLite kernel takes both for the same parameters (it compares the float32 scales)."""
    return (
        a.scale.shape == b.scale.shape
        and np.array_equal(a.scale, b.scale)
        and np.array_equal(a.zero_point, b.zero_point)
    )
