"""Scales at which every runtime rounds every result to the same integer.

A result that lies on a rounding boundary, or nearer than the arithmetic is exact, falls to either side: kernels with
fixed-point multipliers, float sums in another order and the QDQ model then differ by a step, and later layers may make
much of it. Where the operands' scales are fractions of the output's with an odd denominator no result can lie there
(`fractions` has the proof). So scales grow a little, from the outputs back to the inputs, each once:

    Add, Sub:               s_a / s_y = m_a / D,  s_b / s_y = m_b / D      the operands' scales grow
    Mul, MatMul:            s_a s_b / s_y = m / D                          the output's, or an operand's
    means over n elements:  s_x / (n s_y) = m / D                          the output's, or the input's

Layers with weights of their own follow by these (`weights.clear_of_boundaries`). Kernels that compute with few bits
(TFLite's HardSwish with 16, XNNPACK's LeakyRelu with a slope in 256ths) map some of the 256 input integers to a
neighbour of the right output, always the same ones, which hang on the scales: there the smallest growth of 0, 0.025,
0.05 ... 2 % is taken at which the fewest are wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgeship.calibration.graph.operators import (
    activation_inputs,
    attribute,
    constant_array,
    constant_operands,
    float_outputs,
    value_name,
)
from edgeship.calibration.planning.fractions import BASE, at_least, at_most
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.planning.selection import Selection, moves
from edgeship.calibration.planning.sharing import quantized_values
from edgeship.calibration.types import OperatorRule, QuantParams, QuantRules, TensorSpec
from edgeship.calibration.values.ranges import choose, range_of

MOST_GROWTH = 1.05
"""Of the scale of an operand that others read, too: what is small beside the sum has few fractions to choose from, and
a step that the sum does not see may be a coarse one to them. 5 % of a step are 0.4 dB of the signal-to-noise ratio.
"""
_WIDENINGS = tuple(1 + k / 4000 for k in range(81))
_SUMS, _PRODUCTS, _MEANS = {"Add", "Sub"}, {"Mul"}, {"AveragePool", "GlobalAveragePool", "ReduceMean"}
FACTORS = frozenset(_PRODUCTS | _MEANS)
"""Operators whose operands' scales are factors of a fraction of the output's."""


def clear_scales(
    selection: Selection,
    rules: QuantRules,
    groups: Groups[str],
    by_group: Mapping[str, QuantParams],
    kept: Collection[str] = (),
) -> dict[str, QuantParams]:
    """The groups' parameters, by root, with scales that keep results clear of rounding boundaries.

    `kept`: tensors whose parameters stay, as do those that a kernel dictates.
    """
    settled = {groups.root(name) for name in kept if name in groups} | _dictated(selection, rules, groups)
    clearing = _Clearing(selection, rules, groups, dict(by_group), settled)
    for node in reversed(_nodes(selection)):
        clearing.clear(node)
    return clearing.chosen


def _nodes(selection: Selection) -> Sequence[ir.Node]:
    """The graph's nodes in order, those that stay float too: a product of two computed matrices may be one."""
    graph = selection.int8[0].graph
    return selection.int8 if graph is None else list(graph)


def operand_params(node: ir.Node, value: ir.Value, output: QuantParams, spec: TensorSpec) -> QuantParams:
    """The parameters of a constant operand of `node`: those of its range, grown where it is added.

    `output`: the parameters of what the node computes.
    """
    array = constant_array(value)
    params = choose(range_of(np.zeros(()) if array is None else array), spec)
    return _on_grid(params, output) if node.op_type in _SUMS else params


def _on_grid(params: QuantParams, output: QuantParams, most: float = np.inf) -> QuantParams:
    """The parameters of what is added, grown to a fraction of the output's scale; as they are beyond `most`."""
    ratio = float(params.scale) / float(output.scale)
    denominator = _denominator(ratio)
    growth = float(np.ceil(ratio * denominator * (1 - 1e-7)) / denominator / ratio)
    return _scaled(params, growth) if growth <= most else params


def _denominator(ratio: float) -> int:
    """Fixed-point kernels keep 20 bits of the larger ratio: the larger it is, the further apart the fractions."""
    return max((BASE + 1) >> max(0, int(np.floor(np.log2(ratio)))), 2) - 1


def _scaled(params: QuantParams, factor: float) -> QuantParams:
    return QuantParams(np.asarray(float(params.scale) * factor), params.zero_point, params.spec)


def _dictated(selection: Selection, rules: QuantRules, groups: Groups[str]) -> set[str]:
    found = set()
    for node in selection.int8:
        rule = rules.operators.get(node.op_type)
        if rule is not None and rule.fixed_output:
            found |= {groups.root(value_name(v)) for v in quantized_values(node, selection) if v in node.outputs}
    return found


class _Clearing:
    """The groups' parameters as far as they are chosen; `settled` groups keep theirs."""

    def __init__(
        self,
        selection: Selection,
        rules: QuantRules,
        groups: Groups[str],
        chosen: dict[str, QuantParams],
        settled: set[str],
    ) -> None:
        self._selection, self._rules, self._groups = selection, rules, groups
        self.chosen = chosen
        self._settled = settled
        self._int8 = set(selection.int8)
        self._readers = Counter(
            groups.root(value_name(value))
            for node in selection.int8
            if not moves(node, rules)
            for value in dict.fromkeys(activation_inputs(node))
            if value_name(value) in groups
        )

    def clear(self, node: ir.Node) -> None:
        """Chooses the scales around one node, as far as they are free."""
        inputs, output = self._roots(node)
        rule = self._rules.operators.get(node.op_type)
        if output is None or not inputs or rule is None or moves(node, self._rules):
            return
        if _multiplies_computed(node):
            self._clear_product(node, inputs, output, 1.0)
        if node not in self._int8:
            return
        if node.op_type in _SUMS:
            self._clear_sum(inputs, output)
        elif node.op_type in _PRODUCTS:
            self._clear_product(node, inputs, output, 1.0)
        elif node.op_type in _MEANS and (count := _averaged(node)):
            self._clear_product(node, inputs, output, 1.0 / count)
        elif rule.misses is not None and len(inputs) == 1:
            self._clear_table(node, rule, inputs[0], output)

    def _roots(self, node: ir.Node) -> tuple[list[str], str | None]:
        """The groups of the computed inputs, and of the output (that of the activation it is folded into)."""
        values = quantized_values(node, self._selection)
        outputs = [v for v in values if v in node.outputs or v in self._folded(node)]
        inputs = _computed(node)
        if len(outputs) != 1 or any(value_name(v) not in self._groups for v in (*inputs, *outputs)):
            return [], None
        return [self._groups.root(value_name(v)) for v in inputs], self._groups.root(value_name(outputs[0]))

    def _folded(self, node: ir.Node) -> list[ir.Value]:
        names = [value_name(v) for v in float_outputs(node)]
        return [self._selection.folds[name].outputs[0] for name in names if name in self._selection.folds]

    def _clear_sum(self, inputs: list[str], output: str) -> None:
        fixed = [root for root in inputs if root in self._settled]
        if output not in self._settled and fixed and output not in inputs:
            # The output's scale follows what is fixed already: s_y = s_a D / m.
            ratio = self._scale(fixed[0]) / self._scale(output)
            denominator = _denominator(ratio)
            numerator = max(np.floor(ratio * denominator * (1 + 1e-7)), 1.0)
            self._grow(output, ratio * denominator / numerator)
        self._settled.add(output)
        for root in dict.fromkeys(inputs):
            if root not in self._settled:
                most = np.inf if self._readers[root] == 1 else MOST_GROWTH
                self.chosen[root] = _on_grid(self.chosen[root], self.chosen[output], most)
                self._settled.add(root)

    def _clear_product(self, node: ir.Node, inputs: list[str], output: str, factor: float) -> None:
        multiplier = factor / self._scale(output)
        for _, value, _ in constant_operands(node):
            multiplier *= float(operand_params(node, value, self.chosen[output], self._rules.activation).scale)
        for root in inputs:
            multiplier *= self._scale(root)
        if output in inputs:
            return  # both sides move together
        free = [root for root in (output, *inputs) if root not in self._settled]
        if free and free[0] == output:
            self._grow(output, multiplier / float(at_most(np.asarray(multiplier))))
        elif free:
            factor = float(at_least(np.asarray(multiplier))) / multiplier
            self._grow(free[0], factor ** (1 / inputs.count(free[0])))
        self._settled.update((output, *inputs))

    def _clear_table(self, node: ir.Node, rule: OperatorRule, source: str, output: str) -> None:
        misses = rule.misses
        free = [root for root in (output, source) if root not in self._settled]
        if misses is None or source == output or not free:
            return

        def wrong(factor: float) -> int:
            changed = {**self.chosen, free[0]: _scaled(self.chosen[free[0]], factor)}
            return misses(node, changed[source], changed[output])

        self._grow(free[0], _first_least(wrong))
        self._settled.update((source, output))

    def _scale(self, root: str) -> float:
        return float(self.chosen[root].scale)

    def _grow(self, root: str, factor: float) -> None:
        self.chosen[root] = _scaled(self.chosen[root], factor)


def _first_least(wrong: Callable[[float], int]) -> float:
    """The first of the widenings with the fewest wrong."""
    best, fewest = 1.0, None
    for factor in _WIDENINGS:
        count = wrong(factor)
        if fewest is None or count < fewest:
            best, fewest = factor, count
        if not fewest:
            break
    return best


def _computed(node: ir.Node) -> list[ir.Value]:
    """The inputs that are computed; both of a product of two computed matrices."""
    return list(node.inputs) if _multiplies_computed(node) else activation_inputs(node)  # type: ignore[arg-type]  # MatMul has both


def _multiplies_computed(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and all(constant_array(value) is None for value in node.inputs)


def _averaged(node: ir.Node) -> int | None:
    """How many elements each mean is over; None where that is not known."""
    if node.op_type == "AveragePool":
        return int(np.prod(attribute(node, "kernel_shape", [])))
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    sizes = [int(size) for size in shape]  # type: ignore[arg-type]  # all of them are
    if node.op_type == "GlobalAveragePool":
        return int(np.prod(sizes[2:]))
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    given = attribute(node, "axes", None) if axes is None else axes.tolist()
    if given is None:
        return int(np.prod(sizes))
    return int(np.prod([sizes[axis] for axis in given]))
