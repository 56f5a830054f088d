"""Returns what a compression came to: the goal that the recipe set, and what was reached of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from edgeship.pipeline.compress_sections import Prune
from edgeship.pipeline.compression.artifact import latency_of
from edgeship.pipeline.compression.compressor import CONFIRMING_RUNS, Compressed
from edgeship.pipeline.compression.removal import Removal
from edgeship.pipeline.compression.structured import prunable
from edgeship.pipeline.compression.training_data import input_shape

if TYPE_CHECKING:
    from edgeship.pipeline.recipe import Recipe


def goal_facts(
    recipe: Recipe, prune: Prune, result: Compressed, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """The goal's key in [compress.prune] as `name`, its value as `limit`, and what the network has as `reached`.

    A latency is measured once more; what was measured while something was removed decided what went. `before` and
    `after`: what both networks cost. Raises StageError where the latency cannot be measured.
    """
    facts: dict[str, Any] = {"name": prune.goal, "limit": getattr(prune, prune.goal)}
    if prune.goal == "macs":
        facts["reached"] = round(after["macs"] / max(1, before["macs"]), 6)
    elif prune.goal == "max_bytes":
        facts["reached"] = 4 * after["parameters"]
    elif prune.goal == "max_latency_ms":
        facts["reached"] = round(latency_of(recipe, result.model, prune.latency_target, CONFIRMING_RUNS), 4)
    else:
        facts["reached"] = round(_share_gone(recipe, prune, result, after), 6)
    return facts


def _share_gone(recipe: Recipe, prune: Prune, result: Compressed, after: Mapping[str, Any]) -> float:
    """Of the channels, blocks or weights that may go."""
    example = torch.zeros(input_shape(recipe))
    if prune.kind == "unstructured":
        return float(after["sparsity"])
    if prune.kind == "blocks":
        return len(result.blocks) / len(Removal(result.dense, example, prune).blocks())
    whole = sum(group.size for group in prunable(result.dense, example, prune).groups)
    return sum(len(cut.channels) for cut in result.cuts) / whole


def goal_notes(facts: Mapping[str, Any], result: Compressed) -> list[str]:
    """What a user must know of the goal: that it was met without removing anything, or was missed after all."""
    name, limit, reached = facts["name"], facts["limit"], facts["reached"]
    if not (result.cuts or result.blocks or result.masked):
        met = f"{name} = {limit} is met without: the network has {reached}"
        return [f"nothing was removed: {f'ratio = {limit:g} rounds to none' if name == 'ratio' else met}"]
    if name == "max_latency_ms" and reached > limit:
        return [
            f"max_latency_ms = {limit:g} was met when the last removal was chosen, and {reached:g} ms were measured at "
            "the end: where it must hold, ask for less"
        ]
    return []
