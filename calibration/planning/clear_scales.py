"""Output scales at which coarse kernels round as the function does.

Kernels that compute with few bits (TFLite's HardSwish with 16, XNNPACK's LeakyRelu with a slope in 256ths) map some of
the 256 input integers to a neighbour of the right output, always the same ones: an error with a sign, since activations
crowd at a few integers. Which ones hangs on the scales, so the output's is widened by the smallest of 0, 0.025, 0.05
... 2 % at which the fewest are wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from edgeship.calibration.graph.operators import activation_inputs, float_outputs, value_name
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.planning.selection import Selection
from edgeship.calibration.planning.sharing import quantized_values
from edgeship.calibration.types import OperatorRule, QuantParams, QuantRules

_WIDENINGS = tuple(1 + k / 4000 for k in range(81))


def clear_scales(
    selection: Selection,
    rules: QuantRules,
    groups: Groups[str],
    by_group: Mapping[str, QuantParams],
    kept: Collection[str] = (),
) -> dict[str, QuantParams]:
    """The groups' parameters, by root, with other scales behind coarse kernels.

    `kept`: tensors whose parameters stay, as do those that a kernel dictates.
    """
    settled = {groups.root(name) for name in kept if name in groups} | _dictated(selection, rules, groups)
    chosen = dict(by_group)
    writers: dict[str, list[tuple[ir.Node, OperatorRule, str]]] = {}
    for node in selection.int8:
        rule = rules.operators.get(node.op_type)
        if rule is None or rule.misses is None or len(inputs := activation_inputs(node)) != 1:
            continue
        source, made = (groups.root(value_name(value)) for value in (inputs[0], float_outputs(node)[0]))
        if made not in settled and source != made:
            writers.setdefault(made, []).append((node, rule, source))
    for root, nodes in writers.items():
        chosen[root] = _clearest(nodes, chosen, chosen[root])
    return chosen


def _dictated(selection: Selection, rules: QuantRules, groups: Groups[str]) -> set[str]:
    found = set()
    for node in selection.int8:
        rule = rules.operators.get(node.op_type)
        if rule is not None and rule.fixed_output:
            found |= {groups.root(value_name(v)) for v in quantized_values(node, selection) if v in node.outputs}
    return found


def _clearest(
    nodes: list[tuple[ir.Node, OperatorRule, str]], by_group: Mapping[str, QuantParams], params: QuantParams
) -> QuantParams:
    best, fewest = params, None
    for factor in _WIDENINGS:
        candidate = QuantParams(params.scale * factor, params.zero_point, params.spec)
        wrong = sum(rule.misses(node, by_group[source], candidate) for node, rule, source in nodes if rule.misses)
        if fewest is None or wrong < fewest:
            best, fewest = candidate, wrong
        if not fewest:
            break
    return best
