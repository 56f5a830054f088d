"""A model's tables and its constants as one flatbuffer, the constants written once and never held twice.

A flatbuffer refers forwards only. So the tables are packed first, with a hole for each constant's address; the
constants follow, each on a multiple of 16 bytes (`force_align` of the schema), and the holes are filled.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array

FILE_IDENTIFIER = b"TFL3"
ALIGNMENT = 16
LARGEST_FILE = 2**31 - 1
_VTABLE_HEAD = 4
"""Bytes of a vtable before the entry of the first field, which in a Buffer is `data`."""


def pack(schema: Any, model: Any, contents: list[Array]) -> bytes:
    """The file of `model` with `contents` as its buffers. Raises StageError beyond what a flatbuffer addresses (2 GB).

    A content may be a view in any order: it is written as its elements in C order. `contents` is empty afterwards.
    """
    constants = sum(content.nbytes + ALIGNMENT for content in contents)
    if constants > LARGEST_FILE:
        raise StageError(f"the constants take {constants} bytes; a TFLite file holds at most {LARGEST_FILE}")
    tables: list[int] = []
    model.buffers = _placeholders(schema, contents, tables)
    builder = _SharingBuilder(1 << 16)
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    head = bytearray(builder.Output())
    addresses, end = _addresses(contents, len(head))
    if end > LARGEST_FILE:
        raise StageError(f"the model takes {end} bytes; a TFLite file holds at most {LARGEST_FILE}")
    for table, content, address in zip(tables, contents, addresses, strict=True):
        if content.size:
            field = _data_field(head, len(head) - table)
            struct.pack_into("<I", head, field, address - field)
    return _joined(head, contents, addresses, end)


def _addresses(contents: Sequence[Array], start: int) -> tuple[list[int], int]:
    """Where each content's length stands, four bytes before its aligned first element, and where the last one ends."""
    addresses, end = [], start
    for content in contents:
        first = -(-(end + 4) // ALIGNMENT) * ALIGNMENT
        addresses.append(first - 4)
        end = first + content.nbytes if content.size else end
    return addresses, end


def _data_field(head: bytearray, table: int) -> int:
    """The position of the field `data` of the Buffer whose table is at `table`."""
    (distance,) = struct.unpack_from("<i", head, table)
    (field,) = struct.unpack_from("<H", head, table - distance + _VTABLE_HEAD)
    return table + int(field)


def _joined(head: bytearray, contents: list[Array], addresses: Sequence[int], size: int) -> bytes:
    """The tables, and each content at its address; a content is let go when it is written."""
    file = io.BytesIO()
    file.seek(size - 1)
    file.write(b"\0")  # takes the memory at once: growing step by step would copy, and take more
    file.seek(0)
    file.write(head)
    contents.reverse()
    for address in addresses:
        content = contents.pop()
        if content.size:
            file.seek(address)
            file.write(struct.pack("<I", content.nbytes))
            file.write(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)
    return file.getvalue()


def _placeholders(schema: Any, contents: Sequence[Array], tables: list[int]) -> list[Any]:
    """A BufferT for each content that notes in `tables`, counted from the end of the file, where its table is."""

    class Placeholder(schema.BufferT):  # type: ignore[misc]  # the schema module has no types
        def __init__(self, filled: bool) -> None:
            super().__init__()
            self.filled = filled

        def Pack(self, builder: Any) -> Any:  # noqa: N802 - flatbuffers' name
            schema.BufferStart(builder)
            if self.filled:
                builder.PrependUOffsetTRelative(builder.Offset())
                builder.Slot(0)
            tables.append(schema.BufferEnd(builder))
            return tables[-1]

    return [Placeholder(bool(content.size)) for content in contents]


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]  # has no types
    """Writes equal vectors once: the zero points of weights and biases are all zeros, shapes repeat."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.written: dict[bytes, Any] = {}

    def CreateNumpyVector(self, x: Array) -> Any:  # noqa: N802 - flatbuffers' name
        key = hashlib.sha256(x.dtype.str.encode() + x.tobytes()).digest()
        if key not in self.written:
            self.written[key] = super().CreateNumpyVector(x)
        return self.written[key]
