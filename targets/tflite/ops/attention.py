"""Attention as vision models use it: softmax(scale * Q K^T + mask) V, in few operators; other uses by the standard's
own definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeship.calibration.types import Array
from edgeship.targets.tflite.expansion import Expansion, Scope
from edgeship.targets.tflite.functions import expand_function
from edgeship.targets.tflite.graph import Node, Tensor


def expand_attention(scope: Scope, node: Node) -> Sequence[Tensor | None]:
    """Two batched products around a Softmax; caches, padding, caps and boolean masks by the standard's definition."""
    if not _is_plain(node):
        return expand_function(scope, node)
    query, key, value = (_heads(scope, node, place) for place in range(3))
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    scale = float(node.attribute("scale") or 1 / np.sqrt(query.shape[3]))
    query = scope.op("Mul", query, np.array(scale, query.dtype))
    length, depth = query.shape[2], value.shape[3]
    if groups > 1:  # the rows of all heads that share a key follow each other
        query = scope.op("Reshape", query, np.array([-1, heads // groups, groups * length, query.shape[3]], np.int64))
    scores = scope.op("MatMul", query, scope.op("Transpose", key, perm=[0, 1, 3, 2]))
    for mask in _masks(node, groups):
        scores = scope.op("Add", scores, mask)
    y = scope.op("MatMul", scope.op("Softmax", scores, axis=-1), value)
    if groups > 1:
        y = scope.op("Reshape", y, np.array([-1, heads, length, depth], np.int64))
    if node.x.rank == 3:
        turned = scope.op("Transpose", y, perm=[0, 2, 1, 3])
        y = scope.op("Reshape", turned, np.array([-1, length, heads * depth], np.int64))
    return [y, *[None] * (len(node.outputs) - 1)]


def _is_plain(node: Node) -> bool:
    """Whether only Y is asked for, from Q, K, V in float32 and added masks that hide no whole row."""
    extra = any(node.has(place) for place in range(4, len(node.inputs)))
    asked = any(tensor.name for tensor in node.outputs[1:])
    if extra or asked or node.attribute("softcap", 0.0) or node.x.dtype != np.float32:
        return False
    hidden = ~_visible(node)
    if node.has(3):
        mask = node.tensor(3)
        one_matrix = _head_counts(node)[0] == _head_counts(node)[1] or mask.rank == 2
        if mask.shape[-1] != hidden.shape[1] or not one_matrix:
            return False
        if mask.data is None:
            return mask.dtype == np.float32 and _head_counts(node)[0] == _head_counts(node)[1]
        hidden = hidden | (~mask.data if mask.dtype == np.bool_ else np.isneginf(mask.values()))
    return not hidden.all(axis=-1).any()


def _head_counts(node: Node) -> tuple[int, int]:
    if node.x.rank == 4:
        return node.x.shape[1], node.tensor(1).shape[1]
    return int(node.attribute("q_num_heads")), int(node.attribute("kv_num_heads"))


def _heads(scope: Scope, node: Node, place: int) -> Tensor:
    """Input `place` as [batch, heads, length, depth]."""
    tensor = node.tensor(place)
    if tensor.rank == 4:
        return tensor
    count = _head_counts(node)[min(place, 1)]
    shape = np.array([-1, tensor.shape[1], count, tensor.shape[2] // count], np.int64)
    return scope.op("Transpose", scope.op("Reshape", tensor, shape), perm=[0, 2, 1, 3])


def _visible(node: Node) -> Array:
    """[queries, keys]: which key each query may see by its place alone, without a cache."""
    queries, keys = np.ogrid[: node.x.shape[-2], : node.tensor(1).shape[-2]]
    left, right = int(node.attribute("left_window_size", -1)), int(node.attribute("right_window_size", -1))
    if node.attribute("is_causal", 0):
        right = 0
    seen = np.ones(np.broadcast_shapes(queries.shape, keys.shape), bool)
    if right >= 0:
        seen &= keys <= queries + right
    return seen & (keys >= queries - left) if left >= 0 else seen


def _masks(node: Node, groups: int) -> list[Tensor | Array]:
    """What is added to the scores: all that is known in one constant, repeated for the heads that share a key."""
    known: Array = np.where(_visible(node), np.float32(0), np.float32(-np.inf))
    computed: list[Tensor | Array] = []
    if node.has(3):
        mask = node.tensor(3)
        if mask.data is None:
            computed.append(mask)
        elif mask.dtype == np.bool_:
            known = known + np.where(mask.data, np.float32(0), np.float32(-np.inf))
        else:
            known = known + mask.values()
    if not known.any():
        return computed
    return [np.tile(known, (groups, 1)) if groups > 1 else known, *computed]


EXPANSIONS = (Expansion("Attention", expand_attention, since=23),)
