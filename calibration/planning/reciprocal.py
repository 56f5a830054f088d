"""Scales whose reciprocal float32 holds almost exactly.

What a float operator computes becomes integers by division (ONNX's QuantizeLinear: round(x / s)) or by multiplication
(XNNPACK's kernel: round(x r), r = 1 / s in float32). Products and quotients then differ in the last place for about
every third number, and one in a million falls to another integer. With s r = 1 + d they differ where x / s lies within
d of the middle between two float32 numbers. Of neighbouring scales the one with the smallest d is taken; the largest
`d` of any is 2^-24, the smallest of 17 mostly near 2^-28.

A float operator is here one that has no integer kernel, or that a runtime computes in real numbers all the same.
Layers that are kept float by choice do not count: the scales around them stay, so that putting a layer back to float
leaves the integers of all others as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from edgeship.calibration.graph.operators import activation_inputs, constant_array, float_outputs, value_name
from edgeship.calibration.planning.clear_scales import FACTORS
from edgeship.calibration.planning.groups import Groups
from edgeship.calibration.planning.selection import Selection
from edgeship.calibration.types import QuantParams, QuantRules

NEIGHBOURS = 8
"""In units in the last place, to either side: half a millionth of the scale, which no fraction of another's feels."""


def nearly_exact(scale: float) -> float:
    """The float32 number within `NEIGHBOURS` of `scale` that has the most exact reciprocal; of equals the nearest."""
    middle = np.asarray(scale, np.float32)
    places = np.array(sorted(range(-NEIGHBOURS, NEIGHBOURS + 1), key=abs), np.int32)
    candidates = (middle.view(np.int32) + places).view(np.float32)
    products = candidates.astype(np.float64) * (np.float32(1) / candidates).astype(np.float64)
    return float(candidates[int(np.argmin(np.abs(products - 1)))])


def clear_reciprocals(
    selection: Selection,
    rules: QuantRules,
    groups: Groups[str],
    by_group: Mapping[str, QuantParams],
    kept: Collection[str] = (),
) -> dict[str, QuantParams]:
    """The groups' parameters, by root; those of what float operators compute get scales with exact reciprocals.

    `kept`: tensors whose parameters stay, as do those that integers are multiplied or averaged with.
    """
    chosen = dict(by_group)
    settled = {groups.root(name) for name in (*kept, *_multiplied(selection)) if name in groups}
    graph = selection.int8[0].graph
    for node in () if graph is None else graph:
        rule = rules.operators.get(node.op_type)
        if rule is not None and not rule.real:
            continue
        for value in float_outputs(node):
            root = groups.root(value_name(value)) if value_name(value) in groups else None
            if root is not None and root not in settled:
                params = chosen[root]
                chosen[root] = QuantParams(
                    np.asarray(nearly_exact(float(params.scale))), params.zero_point, params.spec
                )
                settled.add(root)
    return chosen


def _multiplied(selection: Selection) -> Iterator[str]:
    """The names of tensors whose scales are factors of a fraction (`clear_scales`)."""
    for node in selection.int8:
        if node.op_type in FACTORS:
            yield from map(value_name, activation_inputs(node))
        elif node.op_type == "MatMul" and constant_array(node.inputs[1]) is None:
            yield from (value_name(value) for value in node.inputs if value is not None)
