"""Returns what kind of file some bytes look like, for the sentence about a file that is not what it should be."""

from __future__ import annotations

ONNX, TFLITE = "an ONNX model", "a TFLite model"
_LFS = b"version https://git-lfs"
_BEGINNINGS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch's .pt and .pt2 are"),
    (b"\x80\x02", "a pickle, as PyTorch's older .pt files are"),
    (b"\x89HDF", "an HDF5 file, as Keras's .h5 are"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"<", "a web page or XML"),
    (b"{", "JSON"),
)


def is_lfs_pointer(content: bytes) -> bool:
    """Whether this is what Git keeps in the place of a large file that nobody fetched."""
    return content.startswith(_LFS)


def looks_like(content: bytes, wanted: str = "") -> str:
    """What the first bytes tell, with what to do where that is known; empty where they tell nothing.

    `wanted`: the kind that it should be; a file that begins as one is damaged.
    """
    if is_lfs_pointer(content):
        return "it is a Git LFS pointer; `git lfs pull` fetches the file itself"
    kind = _kind(content)
    if kind and kind == wanted:
        return f"it begins as {kind}, and is damaged"
    return f"it looks like {kind}" if kind else ""


def _kind(content: bytes) -> str:
    if content[4:8] == b"TFL3":
        return TFLITE
    if content[:1] == b"\x08" and content[2:3] == b"\x12":  # the version of the form, and who wrote it
        return ONNX
    start = content.lstrip()[:16] if content[:1].isspace() else content[:16]
    return next((name for beginning, name in _BEGINNINGS if start.startswith(beginning)), "")
