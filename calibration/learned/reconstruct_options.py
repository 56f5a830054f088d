"""How layers are reconstructed; apart from the search itself, so that a recipe can be read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReconstructOptions:
    """`positions`: output positions of each sample that are looked at; `sweeps`: rounds over a layer's weights for each
    strength of the ridge; `memory_mb`: for the samples' values, fewer samples are used where they do not fit; `seed`
    draws the positions.
    """

    positions: int = 512
    sweeps: int = 4
    memory_mb: int = 1024
    seed: int = 0
