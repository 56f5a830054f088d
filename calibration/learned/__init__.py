"""Quantized graphs that learn: an ONNX graph as a torch module, with fake quantization where the plan rounds.

The only place of calibration that may import torch. Nothing imports its modules before torch is needed, but for this
file and `reconstruct_options.py`, which do without.
"""

from __future__ import annotations

from edgeship.calibration.errors import InputError


def require_torch(what: str) -> None:
    """Nothing. Raises InputError that says how to install torch, which `what` needs."""
    try:
        import torch  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        raise InputError(
            f"{what} needs PyTorch, which cannot be imported ({error}); pip install 'edgeship[torch]'"
        ) from error
