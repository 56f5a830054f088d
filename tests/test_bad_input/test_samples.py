"""Samples that are damaged, useless or do not fit the model are refused with the file and what is wrong with it."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FINISHED = ("2-export", "3-simplify")


def header_only(shape: tuple[int, ...]) -> bytes:
    """An .npz whose array declares `shape` and holds 64 bytes."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("image.npy", array.getvalue() + bytes(64))
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read as an .npz"),
        (b"text", "cannot be read as an .npz"),
        (header_only((10**12, 3, 12, 12)), "image.npy declares float32[1000000000000, 3, 12, 12] and has"),
        (header_only((-4, 3, 12, 12)), "image.npy declares float32[-4, 3, 12, 12] and has"),
    ],
)
def test_arrays_that_are_none_are_refused(project: Any, content: bytes, sentence: str) -> None:
    (project.folder / "tiny.npz").write_bytes(content)
    assert sentence in project.refuse_deploy().sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda images: {"picture": images}, "needed: ['image']"),
        (lambda images: {"image": images[:, :1]}, "has the shape [32, 1, 12, 12]; accepted: ['samples', 3, 12, 12]"),
        (lambda images: {"image": images[:0]}, "holds no samples"),
        (lambda images: {"image": images[:1]}, "a single sample"),
        (lambda images: {"image": images * np.float32(np.nan)}, "NaN in input 'image'"),
        (lambda images: {"image": images.astype(np.float64) * 1e300}, "infinite values in input 'image'"),
        (lambda images: {"image": np.ones_like(images)}, "all samples are the same"),
        (lambda images: {"image": images.astype(str)}, "accepted: numbers"),
    ],
)
def test_arrays_that_are_useless_are_refused(
    project: Any, tiny_images: Any, change: Callable[[Any], dict[str, Any]], sentence: str
) -> None:
    np.savez(project.folder / "tiny.npz", **change(tiny_images))
    assert sentence in project.refuse_deploy(kept=FINISHED).sentence


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._trace),))


def test_arrays_of_objects_are_not_unpickled(project: Any) -> None:
    trace = project.folder / "trace"
    np.savez(project.folder / "tiny.npz", image=np.array([Hostile(trace)] * 4, object))
    assert "holds object" in project.refuse_deploy().sentence
    assert not trace.exists()


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_instead_of_weights_does_not_run(project: Any, nested: bool) -> None:
    pytest.importorskip("torch", reason="PyTorch is an extra")
    trace = project.folder / "trace"
    content = {"weight": Hostile(trace)} if nested else Hostile(trace)
    (project.folder / "weights.pt").write_bytes(pickle.dumps(content))
    (project.folder / "net.py").write_text("import torch\ndef build(): return torch.nn.Conv2d(3, 4, 3)\n")
    project.set('"model.onnx"', '"net.py:build"\nweights = "weights.pt"')
    assert "weights.pt" in project.refuse_deploy().sentence
    assert not trace.exists()


def broken(path: Path, kind: str) -> None:
    """Replaces an image by something else."""
    whole = path.read_bytes()
    path.unlink()
    match kind:
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_bytes(b"no picture")
        case "empty":
            path.write_bytes(b"")
        case "16 bit":
            Image.fromarray(np.full((16, 16), 4000, np.uint16)).save(path)
        case "pipe":
            os.mkfifo(path)
        case "dangling":
            path.symlink_to("nowhere.png")


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "16 bit", "pipe", "dangling"])
def test_an_image_that_is_none_is_named(project: Any, images: Callable[[], Path], kind: str) -> None:
    broken(images() / "1.png", kind)
    refusal = project.refuse_deploy(kept=FINISHED)
    assert refusal.code == 2
    assert "1.png" in refusal.sentence
    assert "BytesIO" not in refusal.sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is empty; accepted: a header with the column file"),
        (b"0.png,1\n", "begins with '0.png,1'; accepted: a header with the column file"),
        (b"file;label\n0.png;1\n", "accepted: a header with the column file"),
        (b"file,label\n", "holds no samples"),
        (b"\xef\xbb\xbffile,label\r\nnone.png,1\r\n", "not in"),
        (b"file,label\n0.png,cat\n", "line 2: the label is 'cat'; accepted: a whole number"),
        (b"file,label\n0.png,-1\n", "has the label -1; accepted: 0 or more"),
        (b"file,label\n0.png\n", "line 2: 1 columns, the header has 2"),
        (b"file,label\n0.png,1\n0.png,2\n", "lists files twice: 0.png"),
        ("file\n0.png\n".encode("utf-16"), "not a text file in UTF-8"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(
    project: Any, images: Callable[[], Path], text: bytes, sentence: str
) -> None:
    (images() / "list.csv").write_bytes(text)
    project.set('"images"', '"images/list.csv"\nroot = "images"')
    assert sentence in project.refuse_deploy().sentence


def test_an_archive_is_never_extracted(project: Any, images: Callable[[], Path]) -> None:
    picture = (images() / "0.png").read_bytes()
    with zipfile.ZipFile(project.folder / "images.zip", "w") as archive:
        archive.writestr("../../outside.png", picture)
    project.set('"images"', '"images.zip"')
    project.refuse_deploy(kept=FINISHED)
    assert not list(project.folder.parent.parent.glob("outside.png"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_a_damaged_archive_is_refused(project: Any, images: Callable[[], Path], content: bytes) -> None:
    images()
    (project.folder / "images.zip").write_bytes(content)
    project.set('"images"', '"images.zip"')
    assert "images.zip" in project.refuse_deploy().sentence
