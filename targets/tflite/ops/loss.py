"""Losses over any number of dimensions, written over one: the standard's definition follows on shapes that every kernel
takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.functions import expand_function
from edgeship.targets.tflite.graph import Node, Tensor


def expand_loss(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """The standard's own definition, with all dimensions after the classes as one."""
    x = node.x
    if x.rank <= 3:
        return expand_function(scope, node)
    classes, places = x.shape[1], int(np.prod(x.shape[2:]))
    flat = scope.op("Reshape", x, np.array([-1, classes, places], np.int64))
    target = scope.op("Reshape", node.tensor(1), np.array([-1, places], np.int64))
    weights = [node.tensor(2)] if node.has(2) else []
    results = scope.ops(node.op_type, len(node.outputs), flat, target, *weights, **node.attributes)
    whole = [results[0]] if results[0].rank == 0 else [_unfolded(scope, results[0], x.shape[2:])]
    return [*whole, *(_unfolded(scope, result, x.shape[1:]) for result in results[1:])]


def _unfolded(scope: Scope, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with its later axes back in `shape`."""
    return scope.op("Reshape", tensor, np.array([-1, *shape], np.int64))


EXPANSIONS = (
    Expansion("NegativeLogLikelihoodLoss", expand_loss, since=12),
    Expansion("SoftmaxCrossEntropyLoss", expand_loss, since=12),
)
