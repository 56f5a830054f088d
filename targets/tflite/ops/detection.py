"""NonMaxSuppression: NON_MAX_SUPPRESSION_V4 for every class of every image.

TFLite's operator gives as many positions as it may select, and how many of them count; the rows (image, class,
position) that count are then gathered.
"""

from __future__ import annotations

import numpy as np

from edgeship.targets.tflite.dtypes import of_types
from edgeship.targets.tflite.emit import Emit, Operand
from edgeship.targets.tflite.graph import Node, Unsupported
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.index import static

MOST_CLASSES = 1000
"""Operators NON_MAX_SUPPRESSION_V4 in one model, images times classes."""


def few_classes(node: Node) -> str | None:
    """Images times classes are at most 1000."""
    images, classes = node.tensor(1).shape[:2]
    count = images * classes
    return f"it runs over {count} images and classes; accepted: {MOST_CLASSES}" if count > MOST_CLASSES else None


def convert_nms(emit: Emit) -> None:
    """Writes a NonMaxSuppression."""
    node, boxes, scores, y = emit.node, emit.input(0), emit.input(1), emit.output()
    static(emit, boxes, scores)
    images, classes, count = scores.shape
    most = min((node.ints("max_output_boxes_per_class", 2) or [0])[0], count)
    if most <= 0:
        raise Unsupported("selects no boxes", f"max_output_boxes_per_class is {most}", "1 or more")
    # TFLite drops a box from the threshold on, ONNX beyond it: the next number up makes them one.
    overlap = np.nextafter(_threshold(emit, "iou_threshold", 3, 0.0), np.float32(np.inf))
    score = _threshold(emit, "score_threshold", 4, float(np.finfo(np.float32).min))
    limits = [
        emit.ints("most", most),
        emit.constant("overlap", np.asarray(overlap)),
        emit.constant("score", np.asarray(score)),
    ]
    if node.attribute("center_point_box", 0):
        boxes = _corners(emit, boxes)
    rows, counts = [], []
    for image in range(images):
        corners = _row(emit, boxes, (image,))
        for kind in range(classes):
            chosen = emit.writer.new(f"{node.name}/selected", (most,), np.dtype(np.int32))
            valid = emit.writer.new(f"{node.name}/valid", (), np.dtype(np.int32))
            emit.operator(
                "NON_MAX_SUPPRESSION_V4", [corners, _row(emit, scores, (image, kind)), *limits], [chosen, valid]
            )
            rows.append(_labelled(emit, chosen, image, kind))
            counts.append(emit.compute("LESS", [emit.ints("order", range(most)), valid], (most,), dtype=np.bool_))
    every, counted = (_joined(emit, parts) for parts in (rows, counts))
    places = emit.compute("WHERE", [counted], (y.shape[0], 1), dtype=np.int64)
    places = emit.compute("SQUEEZE", [places], (y.shape[0],), squeeze_dims=[1])
    found = emit.compute("GATHER", [every, places], y.shape, axis=0)
    emit.operator("CAST", [found], y)


def _threshold(emit: Emit, name: str, index: int, default: float) -> np.float32:
    value = emit.node.parameter(name, index)
    return np.float32(default if value is None or not value.size else value.reshape(-1)[0])


def _row(emit: Emit, x: Operand, places: tuple[int, ...]) -> Operand:
    """`x[places]`."""
    kept = x.shape[len(places) :]
    begin, size = [*places, *[0] * len(kept)], [*[1] * len(places), *kept]
    if tuple(size) != x.shape:
        x = emit.compute("SLICE", [x, emit.ints("begin", begin), emit.ints("size", size)], size)
    return emit.writer.reshape(x, kept, kept)


def _corners(emit: Emit, boxes: Operand) -> Operand:
    """(x, y, width, height) about a centre as (y1, x1, y2, x2), by a constant matrix."""
    matrix = np.zeros((4, 4), np.float32)
    for row, (centre, size, sign) in enumerate(((1, 3, -0.5), (0, 2, -0.5), (1, 3, 0.5), (0, 2, 0.5))):
        matrix[row, centre], matrix[row, size] = 1, sign
    return emit.compute("FULLY_CONNECTED", [boxes, emit.constant("corners", matrix)], boxes.shape, keep_num_dims=True)


def _labelled(emit: Emit, chosen: Operand, image: int, kind: int) -> Operand:
    """(image, class, position) for every position."""
    count = chosen.shape[0]
    column = emit.writer.reshape(chosen, (count, 1), (count, 1))
    labels = emit.ints("labels", np.tile([image, kind], (count, 1)))
    return emit.compute("CONCATENATION", [labels, column], (count, 3), dtype=np.int32, axis=1)


def _joined(emit: Emit, parts: list[Operand]) -> Operand:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return emit.compute("CONCATENATION", parts, shape, axis=0)


OPS = (Op("NonMaxSuppression", convert_nms, limits=(of_types("float32"), few_classes), since=10),)
