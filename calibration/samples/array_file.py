"""Returns samples from an .npz: keys are input names, the first axis counts samples, values are already preprocessed.

Rows are read one after the other from the archive, so a file larger than memory is no obstacle. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgeship.calibration.errors import InputError
from edgeship.calibration.types import Array

LABELS = ("label", "labels")
_DAMAGED = (ValueError, KeyError, EOFError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class ArraySource:
    """The arrays of one .npz; `shapes` are the model's inputs by name (empty: any shape), batch first and ignored."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._path = path
        headers = self._headers()
        self.input_names = tuple(shapes)
        missing = [name for name in shapes if name not in headers]
        if missing:
            raise InputError(
                f"{path} has the keys {sorted(headers)}; needed: {sorted(shapes)} (the model's input names; a PyTorch "
                "model's is input.name in its recipe), and label if known"
            )
        self._inputs = {name: headers[name] for name in shapes}
        for name, expected in shapes.items():
            _check_shape(path, name, headers[name], expected)
        count = {header.shape[0] for header in self._inputs.values()}
        if len(count) > 1:
            counts = {name: header.shape[0] for name, header in self._inputs.items()}
            raise InputError(f"{path}: the inputs hold different numbers of samples: {counts}")
        total = count.pop()
        self.names = [f"{path.name}[{index}]" for index in range(total)]
        self.labels = self._read_labels(headers, total)

    def _headers(self) -> dict[str, _Header]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                found = {}
                for name in names:
                    with archive.open(name) as member:
                        header = _read_header(member)
                    _check_size(name, header, archive.getinfo(name).file_size)
                    found[name.removesuffix(".npy")] = header
        except _DAMAGED as error:
            raise InputError(f"{self._path} cannot be read as an .npz: {error}") from error
        for name, header in found.items():
            if header.dtype.kind not in "fiub":
                raise InputError(f"{self._path}: key {name!r} holds {header.dtype}; accepted: numbers")
        return found

    def _read_labels(self, headers: Mapping[str, _Header], total: int) -> list[int] | None:
        key = next((key for key in LABELS if key in headers and key not in self.input_names), None)
        if key is None:
            return None
        header = headers[key]
        if header.shape not in ((total,), (total, 1)) or header.dtype.kind not in "iu":
            raise InputError(
                f"{self._path}: key {key!r} is {header.dtype}{list(header.shape)}; accepted: {total} whole numbers"
            )
        with np.load(self._path, allow_pickle=False) as arrays:
            return [int(label) for label in arrays[key].reshape(-1)]

    def read(self, indices: Sequence[int]) -> Iterator[dict[str, Array]]:
        """The feeds, each with a batch of 1, as float32."""
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(self._path))
                rows = {name: self._rows(stack, archive, name, indices) for name in self.input_names}
                for _ in indices:
                    yield {name: _float32(next(row))[np.newaxis] for name, row in rows.items()}
            except _DAMAGED as error:
                raise InputError(f"{self._path} is damaged: {error}") from error

    def _rows(self, stack: ExitStack, archive: zipfile.ZipFile, name: str, indices: Sequence[int]) -> Iterator[Array]:
        header = self._inputs[name]
        member = stack.enter_context(archive.open(f"{name}.npy"))
        if header.fortran:  # samples are interleaved in the file; there is no reading them one by one
            array = np.lib.format.read_array(member, allow_pickle=False)
            return (array[index] for index in indices)
        _read_header(member)
        return _stream(member, header, indices)

    def digest(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The values of the chosen rows."""
        for feeds in self.read(indices):
            for name, values in feeds.items():
                yield name.encode()
                yield hashlib.sha256(values.tobytes()).digest()

    def contents(self, indices: Sequence[int]) -> Iterator[bytes]:
        """SHA-256 of each row's values."""
        for feeds in self.read(indices):
            yield hashlib.sha256(b"".join(name.encode() + values.tobytes() for name, values in feeds.items())).digest()


def _float32(values: Array) -> Array:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is told with the sample's name
        return np.ascontiguousarray(values, np.float32)


def _stream(member: IO[bytes], header: _Header, indices: Sequence[int]) -> Iterator[Array]:
    at = 0
    for index in indices:
        skip = (index - at) * header.row_bytes
        while skip > 0:
            skip -= len(_exactly(member, min(skip, 1 << 20)))
        yield np.frombuffer(_exactly(member, header.row_bytes), header.dtype).reshape(header.shape[1:])
        at = index + 1


def _exactly(member: IO[bytes], count: int) -> bytes:
    content = member.read(count)
    if len(content) != count:
        raise EOFError(f"{count} bytes expected, {len(content)} left")
    return content


def _read_header(member: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return _Header(shape, dtype, fortran)


def _check_size(name: str, header: _Header, size: int) -> None:
    """Raises ValueError where the header promises more than the archive holds: nothing is allocated on its word."""
    if any(side < 0 for side in header.shape) or math.prod(header.shape) * header.dtype.itemsize > size:
        raise ValueError(f"{name} declares {header.dtype}{list(header.shape)} and has {size} bytes")


def _check_shape(path: Path, name: str, header: _Header, expected: Sequence[int]) -> None:
    if not header.shape:
        raise InputError(f"{path}: key {name!r} is a single number; accepted: the first axis counts the samples")
    wanted = tuple(expected)[1:]
    fits = len(wanted) == len(header.shape) - 1 and all(
        want in (-1, seen) for want, seen in zip(wanted, header.shape[1:], strict=True)
    )
    if expected and not fits:
        seen = f"{path}: key {name!r} has the shape {list(header.shape)}; accepted: {['samples', *wanted]}"
        raise InputError(seen + _layout_hint(header.shape[1:], wanted))


def _layout_hint(seen: Sequence[int], wanted: Sequence[int]) -> str:
    """What to do where the shape is that of images with the channels last."""
    if len(seen) != 3 or len(wanted) != 3:
        return ""
    moved = (seen[2], seen[0], seen[1])
    fits = all(want in (-1, side) for want, side in zip(wanted, moved, strict=True))
    return "; these look like NHWC images: give them as NCHW, array.transpose(0, 3, 1, 2)" if fits else ""
