"""TFLite Metadata, read by another reader than the writer: slots of the public schema, and MediaPipe's own."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers
import flatbuffers.number_types as types
import numpy as np
import pytest
from flatbuffers.table import Table

from edgeship.calibration.graph.onnx_file import load_onnx
from edgeship.targets.base import ConvertOptions, load
from edgeship.targets.tflite import flatfile
from edgeship.targets.tflite.reader import read_model

MODEL = Path(__file__).parents[2] / "golden" / "residual.qdq.onnx"
FACTS = {
    "edgeship.model": "residual",
    "edgeship.plan": "ab" * 32,
    "edgeship.release.license": "Apache-2.0",
    "edgeship.release.author": "A. Nyone",
    "edgeship.release.version": "1.2.0",
    "edgeship.release.description": "Tells classes apart.",
    "edgeship.preprocessing.mean": "[127.5, 100.0, 90.0]",
    "edgeship.preprocessing.std": "[51.0]",
    "edgeship.preprocessing.color": '"rgb"',
}


class Node:
    """A table of a flatbuffer, read by slot number."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @classmethod
    def root(cls, content: bytes) -> Node:
        assert content[4:8] == b"M001"
        return cls(Table(content, flatbuffers.encode.Get(types.UOffsetTFlags.packer_type, content, 0)))

    def _at(self, slot: int) -> int:
        return int(self._table.Offset(4 + 2 * slot))

    def text(self, slot: int) -> str:
        return bytes(self._table.String(self._at(slot) + self._table.Pos)).decode()

    def byte(self, slot: int) -> int:
        return int(self._table.Get(types.Uint8Flags, self._at(slot) + self._table.Pos)) if self._at(slot) else 0

    def node(self, slot: int) -> Node:
        return Node(Table(self._table.Bytes, self._table.Indirect(self._at(slot) + self._table.Pos)))

    def nodes(self, slot: int) -> list[Node]:
        if not self._at(slot):
            return []
        start, count = self._table.Vector(self._at(slot)), self._table.VectorLen(self._at(slot))
        return [Node(Table(self._table.Bytes, self._table.Indirect(start + 4 * i))) for i in range(count)]

    def floats(self, slot: int) -> list[float]:
        return [float(f) for f in self._table.GetVectorAsNumpy(types.Float32Flags, self._at(slot))]


def converted(facts: dict[str, str], **options: Any) -> bytes:
    return load("tflite").convert(load_onnx(MODEL), ConvertOptions(metadata=facts, **options))


def metadata_of(content: bytes) -> Node:
    model = read_model(content, "model")
    (entry,) = [entry for entry in model.metadata if flatfile.text(entry.name) == "TFLITE_METADATA"]
    return Node.root(bytes(model.buffers[entry.buffer].data))


def classes() -> int:
    return int(read_model(converted({}), "model").subgraphs[0].tensors[-1].shape[-1])


@pytest.mark.parametrize("io_dtype", ["float32", "int8"])
def test_the_model_and_its_image_are_described(io_dtype: str) -> None:
    model = metadata_of(converted(FACTS, io_dtype=io_dtype))
    assert model.text(0) == "residual"
    assert model.text(1) == f"Tells classes apart. Quantization plan {'ab' * 32}."
    assert [model.text(slot) for slot in (2, 4, 5)] == ["1.2.0", "A. Nyone", "Apache-2.0"]
    (subgraph,) = model.nodes(3)
    (image,) = subgraph.nodes(2)
    assert image.text(0) == "image"
    assert image.node(3).byte(0) == 2  # ImageProperties
    assert image.node(3).node(1).byte(0) == 1  # RGB
    (unit,) = image.nodes(4)
    assert unit.byte(0) == 1  # NormalizationOptions
    assert unit.node(1).floats(0) == [127.5, 100.0, 90.0]
    assert unit.node(1).floats(1) == [51.0]
    assert image.node(5).floats(0) == pytest.approx([2.5, 155 / 51, 165 / 51])
    assert image.node(5).floats(1) == pytest.approx([-2.5, -100 / 51, -90 / 51])


def test_a_model_that_reads_channels_first_is_not_called_an_image() -> None:
    (subgraph,) = metadata_of(converted(FACTS, io_layout="nchw")).nodes(3)
    assert subgraph.nodes(2)[0].node(3).byte(0) == 1  # FeatureProperties


def test_labels_lie_behind_the_model_and_change_nothing_else(tmp_path: Path) -> None:
    labels = [f"class {i}" for i in range(classes())]
    content = converted({**FACTS, "edgeship.release.labels": json.dumps(labels)})
    assert content == converted({**FACTS, "edgeship.release.labels": json.dumps(labels)})
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        assert packed.read("labels.txt").decode().splitlines() == labels
    (subgraph,) = metadata_of(content).nodes(3)
    (file,) = subgraph.nodes(3)[0].nodes(6)
    assert (file.text(0), file.byte(2)) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS
    outputs = []
    for name, artifact in (("plain", converted(FACTS)), ("labelled", content)):
        (tmp_path / f"{name}.tflite").write_bytes(artifact)
        session = load("tflite").open(tmp_path / f"{name}.tflite")
        feeds = {each.name: np.full([abs(s) for s in each.shape], 0.5, np.float32) for each in session.inputs}
        outputs.append(session.run(feeds))
    for name, values in outputs[0].items():
        np.testing.assert_array_equal(values, outputs[1][name])


def test_a_file_without_facts_has_no_standard_metadata() -> None:
    model = read_model(converted({}), "model")
    assert "TFLITE_METADATA" not in [flatfile.text(entry.name) for entry in model.metadata]


def test_mediapipe_reads_all_of_it(tmp_path: Path) -> None:
    metadata = pytest.importorskip("mediapipe.tasks.python.metadata.metadata", reason="MediaPipe's reader is missing")
    path = tmp_path / "model.tflite"
    labels = [f"class {i}" for i in range(classes())]
    path.write_bytes(converted({**FACTS, "edgeship.release.labels": json.dumps(labels)}))
    displayer = metadata.MetadataDisplayer.with_model_file(str(path))
    assert displayer.get_packed_associated_file_list() == ["labels.txt"]
    assert json.loads(displayer.get_metadata_json())["license"] == "Apache-2.0"
