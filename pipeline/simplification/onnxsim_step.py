"""Returns an ONNX model simplified by onnxsim, which is native code: run it in a child process (see isolation.py)."""

from __future__ import annotations


def run_onnxsim(model: bytes) -> bytes:
    """The simplified model's bytes; optimizers and constant folding of onnxsim, without its own numerical check."""
    import onnx
    import onnxsim  # type: ignore[import-untyped]  # it ships no types

    simplified, _ = onnxsim.simplify(onnx.load_model_from_string(model), check_n=0)
    return bytes(simplified.SerializeToString())
