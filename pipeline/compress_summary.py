"""Returns what compression gained and lost as lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
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
        lines.append(f"zeros        {100 * after['sparsity']:.1f} % of the weights")
    for name, latency in facts.get("latency", {}).items():
        noisy = " (noisy)" if latency["noisy"] else ""
        lines.append(
            f"{name:<12} {latency['before']['median_ms']:.3g} ms -> {latency['after']['median_ms']:.3g} ms"
            f"  ({latency['speedup']:.2f}x), float artifacts{noisy}"
        )
    return [*lines, *facts["notes"]]


def _removed(facts: Mapping[str, Any]) -> list[str]:
    channels, blocks = sum(facts["cuts"].values()), facts.get("blocks", [])
    lines = []
    if channels:
        layers = list(facts["cuts"])
        places = ", ".join(layers) if len(layers) <= NAMED else f"{len(layers)} layers"
        lines.append(f"removed      {channels:,} channels, from {places}")
    if blocks:
        lines.append(f"removed      {len(blocks)} residual blocks: {', '.join(blocks)}")
    return lines
