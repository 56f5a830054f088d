"""Returns an ONNX model simplified by onnxsim, which is native code: run it in a child process (see isolation.py)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_NOT_NEEDED = ("torch", "sympy")
"""onnxsim imports these for features of its own that simplifying does not use; they take seconds."""


def run_onnxsim(model: bytes) -> bytes:
    """The simplified model's bytes; optimizers and constant folding of onnxsim, without its own numerical check."""
    import onnx

    with _absent(*_NOT_NEEDED):
        import onnxsim  # type: ignore[import-untyped]  # it ships no types

    simplified, _ = onnxsim.simplify(onnx.load_model_from_string(model), check_n=0)
    return bytes(simplified.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Makes optional imports fail, as they do where the package is not installed; what is loaded stays."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system's mark for "not there"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
