"""A model's tables and its constants as one flatbuffer, the constants written once and never held twice.

A flatbuffer refers forwards only. So the tables are packed first, with a hole for each constant's address; the
constants follow, each on a multiple of 16 bytes (`force_align` of the schema), and the holes are filled.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import Any

import flatbuffers  # type: ignore[import-untyped]  # has no types
import numpy as np

from edgeship.calibration.errors import StageError
from edgeship.calibration.types import Array

FILE_IDENTIFIER = b"TFL3"
ALIGNMENT = 16
LARGEST_FILE = 2**31 - 1
_VTABLE_HEAD = 4
"""Bytes of a vtable before the entry of the first field, which in a Buffer is `data`."""


def pack(schema: Any, model: Any, contents: Sequence[Array]) -> bytes:
    """The file of `model` with `contents` as its buffers. Raises StageError beyond what a flatbuffer addresses (2 GB).

    A content may be a view in any order: it is written as its elements in C order.
    """
    constants = sum(content.nbytes + ALIGNMENT for content in contents)
    if constants > LARGEST_FILE:
        raise StageError(f"the constants take {constants} bytes; a TFLite file holds at most {LARGEST_FILE}")
    tables: list[int] = []
    model.buffers = [_placeholder(schema, bool(content.size), tables) for content in contents]
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
    return _joined(head, contents, addresses)


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


def _joined(head: bytearray, contents: Sequence[Array], addresses: Sequence[int]) -> bytes:
    file = io.BytesIO()
    file.write(head)
    for content, address in zip(contents, addresses, strict=True):
        if content.size:
            file.write(bytes(address - file.tell()))
            file.write(struct.pack("<I", content.nbytes))
            file.write(np.ascontiguousarray(content).reshape(-1).view(np.uint8).data)
    return file.getvalue()


def _placeholder(schema: Any, filled: bool, tables: list[int]) -> Any:
    """A BufferT that notes in `tables`, counted from the end of the file, where its table is."""

    class Placeholder(schema.BufferT):  # type: ignore[misc]  # the schema module has no types
        def Pack(self, builder: Any) -> Any:  # noqa: N802 - flatbuffers' name
            schema.BufferStart(builder)
            if filled:
                builder.PrependUOffsetTRelative(builder.Offset())
                builder.Slot(0)
            tables.append(schema.BufferEnd(builder))
            return tables[-1]

    return Placeholder()


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]  # has no types
    """Writes equal vectors once: the zero points of weights and biases are all zeros, shapes repeat."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.written: dict[tuple[str, bytes], Any] = {}

    def CreateNumpyVector(self, x: Array) -> Any:  # noqa: N802 - flatbuffers' name
        key = (x.dtype.str, x.tobytes())
        if key not in self.written:
            self.written[key] = super().CreateNumpyVector(x)
        return self.written[key]
