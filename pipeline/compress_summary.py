"""Returns what compression gained and lost as lines for a person."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NAMED = 4
"""More layers than these are counted."""


def compress_rows(facts: Mapping[str, Any]) -> list[str]:
    """A line each for parameters, multiply-accumulates, size, top-1 and latency, before and after."""
    before, after = facts["before"], facts["after"]
    fewer = before["macs"] / max(1, after["macs"])
    lines = [
        *_removed(facts),
        f"parameters   {before['parameters']:,} -> {after['parameters']:,}",
        f"MACs         {before['macs'] / 1e6:,.1f} M -> {after['macs'] / 1e6:,.1f} M  ({fewer:.2f}x fewer)",
        f"compressed   {before['compressed_bytes']:,} -> {after['compressed_bytes']:,} bytes of float weights",
    ]
    if "top1" in before and "top1" in after:
        lines.append(f"top-1        {before['top1']:.2f} % -> {after['top1']:.2f} %, as trained")
    if "sparsity" in after:
        rest = f" that may go; left dense: {_named(facts['left_dense'])}" if facts["left_dense"] else ""
        lines.append(f"zeros        {100 * after['sparsity']:.1f} % of the weights{rest}")
    if "goal" in facts:
        lines.append(_goal(facts["goal"]))
    for name, latency in facts.get("latency", {}).items():
        noisy = " (noisy)" if latency["noisy"] else ""
        lines.append(
            f"{name:<12} {latency['before']['median_ms']:.3g} ms -> {latency['after']['median_ms']:.3g} ms"
            f"  ({latency['speedup']:.2f}x), float artifacts{noisy}"
        )
    return [*lines, *facts["notes"]]


def _goal(goal: Mapping[str, Any]) -> str:
    values = (goal["limit"], goal["reached"])
    limit, reached = (f"{each:,}" if isinstance(each, int) else f"{each:.4g}" for each in values)
    missed = goal["name"] == "max_latency_ms" and goal["reached"] > goal["limit"]
    return f"goal         {goal['name']} = {limit}; reached: {reached}{', missed' if missed else ''}"


def _named(layers: Collection[str]) -> str:
    return ", ".join(layers) if len(layers) <= NAMED else f"{len(layers)} layers"


def _removed(facts: Mapping[str, Any]) -> list[str]:
    channels, blocks = sum(facts["cuts"].values()), facts.get("blocks", [])
    lines = []
    if channels:
        lines.append(f"removed      {channels:,} channels, from {_named(facts['cuts'])}")
    if blocks:
        lines.append(f"removed      {len(blocks)} residual blocks: {', '.join(blocks)}")
    return lines
