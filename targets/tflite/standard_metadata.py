"""The bytes of TFLite Metadata: what the usual readers (Android's codegen, MediaPipe) take to feed a model.

The schema is TensorFlow Lite Support's metadata_schema.fbs, version 1.1.0, file identifier M001; a comment names the
field of each slot. Normalization and statistics are in the units of the float model, whatever the file's own input
type, as the schema asks. The labels lie in a ZIP archive behind the flatbuffer, stored, with no date.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers

NAME = "TFLITE_METADATA"
IDENTIFIER = b"M001"
PARSER = "1.0.0"
"""The oldest parser that understands every field written here."""
LABELS = "labels.txt"
LABELS_KEY = "edgeship.release.labels"
_IMAGE_PROPERTIES, _FEATURE_PROPERTIES = 2, 1
_NORMALIZATION = 1
_AXIS_LABELS = 2
_COLORS = {"rgb": 1, "gray": 2}
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The earliest date a ZIP archive can hold."""


@dataclass(frozen=True)
class Border:
    """An input or output of the file: its name and its shape as the file has it."""

    name: str
    shape: tuple[int, ...]
    channels_last: bool


def labels_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The classes' names among the facts that the artifact carries."""
    return tuple(json.loads(metadata.get(LABELS_KEY, "[]")))


def with_labels(content: bytes, labels: Sequence[str]) -> bytes:
    """The file with a ZIP archive of the labels behind it; as it is where there are none."""
    if not labels:
        return content
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as packed:
        packed.writestr(zipfile.ZipInfo(LABELS, _EARLIEST), "".join(f"{label}\n" for label in labels))
    return file.getvalue()


def describe(inputs: Sequence[Border], outputs: Sequence[Border], metadata: Mapping[str, str]) -> bytes:
    """The ModelMetadata flatbuffer; `metadata` are the facts that the artifact carries."""
    labels = labels_of(metadata)
    writer = _Writer()
    labelled = next((each for each in outputs if labels and each.shape[-1:] == (len(labels),)), None)
    tensors = [_input(writer, each, metadata) for each in inputs]
    results = [_output(writer, each, each is labelled) for each in outputs]
    subgraph = writer.table(
        {
            2: writer.tables(tensors),  # input_tensor_metadata
            3: writer.tables(results),  # output_tensor_metadata
        }
    )
    model = writer.table(
        {
            0: writer.text(_fact(metadata, "title") or metadata.get("edgeship.model")),  # name
            1: writer.text(_description(metadata)),  # description
            2: writer.text(_fact(metadata, "version")),  # version
            3: writer.tables([subgraph]),  # subgraph_metadata
            4: writer.text(_fact(metadata, "author")),  # author
            5: writer.text(_fact(metadata, "license")),  # license
            7: writer.text(PARSER),  # min_parser_version
        }
    )
    return writer.finish(model)


def _fact(metadata: Mapping[str, str], name: str) -> str | None:
    return metadata.get(f"edgeship.release.{name}")


def _description(metadata: Mapping[str, str]) -> str | None:
    plan = metadata.get("edgeship.plan")
    parts = [_fact(metadata, "description"), f"Quantization plan {plan}." if plan else None]
    return " ".join(part for part in parts if part) or None


def _input(writer: _Writer, border: Border, metadata: Mapping[str, str]) -> int:
    """TensorMetadata of an input, with its preprocessing where it is the image that the metadata speaks of."""
    given = {
        key: json.loads(metadata[f"edgeship.preprocessing.{key}"])
        for key in ("mean", "std", "color")
        if f"edgeship.preprocessing.{key}" in metadata
    }
    slots: dict[int, Any] = {0: writer.text(border.name)}
    declared = json.loads(metadata.get("edgeship.preprocessing.shape", "[]"))
    as_the_model = declared[1:] == list(border.shape[1:])  # of a model that itself has channels last
    is_image = len(border.shape) == 4 and border.shape[3] in (1, 3) and (border.channels_last or as_the_model)
    if not is_image or len(given) != 3:
        slots[3] = _content(writer, _FEATURE_PROPERTIES, writer.table({}))  # content
        return writer.table(slots)
    color = _COLORS.get(given["color"], 0)
    slots[3] = _content(writer, _IMAGE_PROPERTIES, writer.table({0: writer.byte(color)}))  # color_space
    mean, std = given["mean"], given["std"]
    normalization = writer.table({0: writer.floats(mean), 1: writer.floats(std)})
    unit = writer.table({0: writer.byte(_NORMALIZATION), 1: writer.offset(normalization)})
    slots[4] = writer.tables([unit])  # process_units
    pairs = list(zip(*_same_length(mean, std), strict=True))
    stats = {
        0: writer.floats([(255 - m) / s for m, s in pairs]),
        1: writer.floats([(0 - m) / s for m, s in pairs]),
    }
    slots[5] = writer.offset(writer.table(stats))  # max, min
    return writer.table(slots)


def _same_length(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """One value stands for all channels."""
    count = max(len(mean), len(std))
    return [*mean] * (count // len(mean)), [*std] * (count // len(std))


def _output(writer: _Writer, border: Border, labelled: bool) -> int:
    slots: dict[int, Any] = {0: writer.text(border.name)}
    slots[3] = _content(writer, _FEATURE_PROPERTIES, writer.table({}))  # content
    if labelled:
        file = writer.table({0: writer.text(LABELS), 2: writer.byte(_AXIS_LABELS)})
        slots[6] = writer.tables([file])  # associated_files
    return writer.table(slots)


def _content(writer: _Writer, kind: int, properties: int) -> Any:
    return writer.offset(writer.table({0: writer.byte(kind), 1: writer.offset(properties)}))


class _Writer:
    """A flatbuffer written bottom up: values are made before the tables that refer to them."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(512)

    def text(self, value: str | None) -> Any:
        """A string, or nothing."""
        return None if value is None else ("offset", self._builder.CreateString(value))

    def byte(self, value: int) -> Any:
        """A scalar of one byte; zero, the default of all of them, is left out."""
        return ("byte", value) if value else None

    def offset(self, table: int) -> Any:
        """A table inside another."""
        return ("offset", table)

    def floats(self, values: Sequence[float]) -> Any:
        """A vector of float32."""
        self._builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            self._builder.PrependFloat32(value)
        return ("offset", self._builder.EndVector())

    def tables(self, tables: Sequence[int]) -> Any:
        """A vector of tables."""
        self._builder.StartVector(4, len(tables), 4)
        for table in reversed(tables):
            self._builder.PrependUOffsetTRelative(table)
        return ("offset", self._builder.EndVector())

    def table(self, slots: Mapping[int, Any]) -> int:
        """A table with the given values in its slots."""
        self._builder.StartObject(max(slots, default=-1) + 1)
        for slot, value in slots.items():
            if value is None:
                continue
            kind, content = value
            if kind == "byte":
                self._builder.PrependUint8Slot(slot, content, 0)
            else:
                self._builder.PrependUOffsetTRelativeSlot(slot, content, 0)
        return int(self._builder.EndObject())

    def finish(self, root: int) -> bytes:
        """The whole buffer."""
        self._builder.Finish(root, IDENTIFIER)
        return bytes(self._builder.Output())
